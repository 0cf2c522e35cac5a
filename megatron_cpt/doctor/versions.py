"""Versions on this machine: what would stop a run, and what is known to fail later."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.doctor.check import Check
from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.engine import check_engine
from megatron_cpt.launch.environment import installed_version, problems, torch_build

KNOWN_BAD = Path(__file__).with_name("known_bad.yaml")

Installed = Callable[[str], str | None]  # distribution -> its version, None when it is not installed


def check_versions(installed: Installed = installed_version) -> list[Check]:
    """Check this environment as `megatron-cpt train` does, and its versions against known_bad.yaml."""
    return [_environment(), *_known_bad(installed)]


def _environment() -> Check:
    looked_at = "installed packages, Megatron-Core, the build of torch"
    try:
        engine = check_engine()
    except LaunchError as error:
        return Check("environment", looked_at, "error", error.message, error.hint)
    for problem in problems():
        return Check("environment", looked_at, "error", problem.what, problem.hint)
    build = torch_build()
    torch = "no torch" if build is None else f"torch {build[0]} for {f'CUDA {build[1]}' if build[1] else 'the CPU'}"
    return Check("environment", looked_at, "ok", f"{engine}, {torch}")


def _known_bad(installed: Installed) -> list[Check]:
    entries = yaml.safe_load(KNOWN_BAD.read_text(encoding="utf-8"))
    found = [check for entry in entries for check in _matches(entry, installed)]
    if found:
        return found
    packages = sorted({package for entry in entries for package in entry["packages"]})
    present = [f"{package} {version}" for package in packages if (version := installed(package))]
    looked_at = f"versions of {', '.join(packages)} against {len(entries)} reports"
    if not present:
        return [Check("known bad versions", looked_at, "not checked", "none of them is installed as a package")]
    return [Check("known bad versions", looked_at, "ok", ", ".join(present))]


def _matches(entry: dict[str, Any], installed: Installed) -> list[Check]:
    return [
        Check(
            "known bad versions",
            f"{package} {version}",
            entry["verdict"],
            f"{entry['what']} ({entry['source']})",
            entry["hint"],
        )
        for package in entry["packages"]
        if _in_range(version := installed(package), entry)
    ]


def _in_range(version: str | None, limits: dict[str, Any]) -> bool:
    if version is None:
        return False
    return _numbers(str(limits["first"])) <= _numbers(version) < _numbers(str(limits["fixed"]))


def _numbers(version: str) -> tuple[int, ...]:
    """`2.29.3+cu13` -> (2, 29, 3)."""
    numbers = [int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3]]
    return tuple(numbers + [0] * (3 - len(numbers)))
