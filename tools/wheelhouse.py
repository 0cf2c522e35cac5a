"""Gather every wheel that an installation needs in one folder, for a machine without a network.

`make wheelhouse` calls this with the Python that find_python.sh chose; the other machine needs the same Python version
and platform. `make setup WHEELHOUSE=folder` installs from the folder alone. WITHOUT=torch is for a machine that has
its own torch: torch, numpy and what only torch needs are left out, and of the extras only what the tests import.

Standard library only, and the pip of a scratch environment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from setup_venv import REPO, VERSION, WHEELHOUSE_RECORD, SetupError, raise_pip_failure, run_pip, say

COMES_WITH = {"torch": ["torch", "numpy"]}  # wherever a torch is at home, its numpy is too

# Runs with pip's own copy of `packaging`: the packages reachable from the project without going through `without`.
REACHABLE = """
import json, sys
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name
report, extras, without = json.load(open(sys.argv[1])), sys.argv[2].split(','), sys.argv[3].split(',')
items = {canonicalize_name(i['metadata']['name']): i['metadata'] for i in report['install']}
seen = {}
def visit(name, extras):
    if name in without or name not in items or seen.get(name, set()) >= extras | {''}:
        return
    seen.setdefault(name, set()).update(extras | {''})
    for text in items[name].get('requires_dist', []):
        need = Requirement(text)
        if need.marker is None or any(need.marker.evaluate({'extra': e}) for e in seen[name]):
            visit(canonicalize_name(need.name), set(need.extras))
visit('megatron-cpt', set(extras))
print(json.dumps({name: items[name]['version'] for name in sorted(seen) if name != 'megatron-cpt'}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Gather every wheel that an installation needs in one folder.")
    parser.add_argument("--to", type=Path, default=Path("wheelhouse"), help="the folder")
    parser.add_argument("--without", help="packages that the other machine has: torch, or torch,numpy")
    parser.add_argument("--extras", help="optional dependencies; default dev,quickstart, and test with --without")
    options = parser.parse_args()
    named = [name.strip().lower() for name in (options.without or "").split(",") if name.strip()]
    without = [package for name in named for package in COMES_WITH.get(name, [name])]
    extras = options.extras or ("test" if without else "dev,quickstart")
    try:
        build(options.to, without, extras)
    except SetupError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        sys.exit(2)


def build(folder: Path, without: list[str], extras: str) -> None:
    """Fill `folder` with wheels and, last, the record that `make setup WHEELHOUSE=` checks."""
    if folder.is_dir() and not (folder / WHEELHOUSE_RECORD).is_file() and any(folder.iterdir()):
        raise SetupError(f"{folder} is there and is no wheelhouse", "give a new folder: make wheelhouse DIR=folder")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "venv", scratch], check=True)
        pip = [str(Path(scratch) / "bin" / "python"), "-m", "pip"]
        packages = resolve(pip, Path(scratch) / "report.json", without, extras)
        say(f"{len(packages)} packages for Python {VERSION} into {folder}")
        wanted = [f"{name}=={version}" for name, version in packages.items()]
        _run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *wanted, *_build_backend()])
    wheels = _keep_newest_run(folder, packages)
    record = {"python": VERSION, "platform": f"{platform.system()} {platform.machine()}", "extras": extras}
    record_of_wheels = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in wheels}
    text = json.dumps({**record, "without": without, "wheels": record_of_wheels}, indent=1)
    (folder / WHEELHOUSE_RECORD).write_text(text + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in wheels)
    say(f"{len(wheels)} wheels, {size / 1e6:.1f} MB. On the other machine, in this checkout:")
    say(f"make setup WHEELHOUSE={folder}{' TORCH=system' if 'torch' in without else ''}")


def resolve(pip: list[str], report: Path, without: list[str], extras: str) -> dict[str, str]:
    """Name -> exact version of what the project needs, less `without` and what only those need."""
    constraints = REPO / "constraints.txt"
    arguments = ["-c", str(constraints)] if constraints.is_file() else []
    resolving = ["install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report)]
    _run([*pip, *resolving, *arguments, f"{REPO}[{extras}]"])
    command = [pip[0], "-c", REACHABLE, str(report), extras, ",".join(without)]
    done = subprocess.run(command, text=True, capture_output=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _build_backend() -> list[str]:
    """What pip needs to build the checkout itself, which is installed from source."""
    project: dict[str, Any] = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
    requires: list[str] = project["build-system"]["requires"]
    return requires


def _run(command: list[str]) -> None:
    code, errors = run_pip(command, offline=False)
    if code:
        raise_pip_failure(errors, None)


def _keep_newest_run(folder: Path, packages: dict[str, str]) -> list[Path]:
    """The wheels of this run; those of an earlier one, in other versions or no longer needed, are removed."""
    kept = []
    names = {name.replace("-", "_").lower(): version for name, version in packages.items()}
    for path in sorted(folder.glob("*.whl")):
        name, version = path.name.split("-")[:2]
        key = name.lower().replace(".", "_").replace("-", "_")
        if key == "setuptools" or names.get(key) == version:
            kept.append(path)
        else:
            path.unlink()
    return kept


if __name__ == "__main__":
    main()
