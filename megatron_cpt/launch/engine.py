"""Which Megatron-Core a run would use, and whether this project is proven with it; found without importing it.

`package_info.py` of Megatron-Core is read as text: importing any part of it would import torch, and since 0.18 that
file starts git when it runs.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.errors import LaunchError

FIRST_PROVEN, LAST_PROVEN = (0, 16), (0, 19)  # every minor version from first to last; see `make test-matrix`
CONSTRAINT = "megatron-core>=0.16,<0.20"


@dataclass(frozen=True)
class Engine:
    """A Megatron-Core that Python can find."""

    folder: Path  # of the package megatron.core
    version: tuple[int, int, int] | None  # None: it does not say

    def __str__(self) -> str:
        named = "of an unknown version" if self.version is None else ".".join(map(str, self.version))
        return f"Megatron-Core {named} in {self.folder}"


def installed_engines() -> list[Engine]:
    """Every Megatron-Core on the path, the one that Python imports first."""
    spec = importlib.util.find_spec("megatron")
    found = list(spec.submodule_search_locations or ()) if spec is not None else []
    found += [str(Path(entry or ".") / "megatron") for entry in sys.path]  # behind a package that is no namespace
    folders = [(Path(parent) / "core").resolve() for parent in found]
    return [Engine(folder, _version(folder)) for folder in dict.fromkeys(folders) if (folder / "__init__.py").is_file()]


def _version(folder: Path) -> tuple[int, int, int] | None:
    try:
        text = (folder / "package_info.py").read_text(encoding="utf-8")
    except OSError:
        return None
    numbers = [re.search(rf"^{name} *= *(\d+)", text, re.MULTILINE) for name in ("MAJOR", "MINOR", "PATCH")]
    major, minor, patch = (int(number[1]) if number else -1 for number in numbers)
    return None if -1 in (major, minor, patch) else (major, minor, patch)


def check_engine() -> Engine:
    """Return the Megatron-Core that this process uses.

    Raises:
        LaunchError: there is none or more than one, or its version is outside the proven range.
    """
    engines = installed_engines()
    install = f"pip install '{CONSTRAINT}'"
    if not engines:
        raise LaunchError(f"Megatron-Core is not installed for {sys.executable}", hint=install)
    engine, *others = engines
    if others:
        raise LaunchError(
            f"two Megatron-Cores are on Python's path: {engine}, and {others[0]}",
            hint="keep one: `pip uninstall megatron-core`, or take the folder of the other out of PYTHONPATH",
        )
    if engine.version is None or not FIRST_PROVEN <= engine.version[:2] <= LAST_PROVEN:
        first, last = (".".join(map(str, version)) for version in (FIRST_PROVEN, LAST_PROVEN))
        raise LaunchError(
            f"{engine}: megatron-cpt is proven with {first} to {last}, and another version may compute other gradients",
            hint=install,
        )
    return engine
