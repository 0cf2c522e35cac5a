"""The cells of the matrix: a Python and a Megatron-Core each, and a virtual environment for every cell.

A build of torch with CUDA has some GB, so the cells of one Python share a base environment with torch and every other
dependency. A cell adds its Megatron-Core on top.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
TORCH = "2.13.0"
PYTHONS = ("3.11", "3.12", "3.13")
ENGINES = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")  # the newest patch of each
DEFAULT = {("3.11", "0.16.1"), ("3.12", "0.16.1"), ("3.12", "0.17.1"), ("3.12", "0.18.2"), ("3.12", "0.19.2")} | {
    ("3.13", "0.19.2")
}
_EXTRAS = ("test", "parquet", "corpus", "quickstart")
_NOT_FOR_TESTS = ("megatron-core", "megatron-cpt", "torch", "ruff", "mypy", "types-", "matplotlib")


class NoCell(Exception):
    """Why a cell cannot be made."""


@dataclass(frozen=True)
class Cell:
    python: str  # 3.12
    engine: str  # 0.19.2
    torch: str = TORCH

    @property
    def name(self) -> str:
        return f"python{self.python}-mcore{self.engine}-torch{self.torch}"


def all_cells(torch: str = TORCH) -> list[Cell]:
    return [Cell(python, engine, torch) for python in PYTHONS for engine in ENGINES]


def find_python(version: str) -> Path:
    """Return an interpreter of `version` (3.12): on PATH, of pyenv, or of uv. Raises NoCell when there is none."""
    candidates = [shutil.which(f"python{version}")]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates += [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python{version}"), reverse=True)]
    if uv := shutil.which("uv"):
        candidates.append(_output(uv, "python", "find", "--no-python-downloads", version))
    for candidate in filter(None, candidates):  # a shim of pyenv is on PATH even where it leads nowhere
        if _output(candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])") == version:
            return Path(candidate)
    raise NoCell(f"no python{version} on PATH, in pyenv or in uv")


def make_cell(cell: Cell, folder: Path) -> Path:
    """Return the interpreter of the cell's environment in `folder`, which is made when it is not there yet.

    Raises:
        NoCell: there is no such interpreter, or pip refuses a package for it.
    """
    base = _make_base(cell, folder)
    home = folder / cell.name
    python = home / "bin" / "python"
    if (home / "complete").exists():
        return python
    shutil.rmtree(home, ignore_errors=True)
    _run([str(find_python(cell.python)), "-m", "venv", "--without-pip", str(home)])
    site = Path(_site_packages(python))
    pip = [str(base), "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    _run([*pip, f"megatron-core=={cell.engine}"])
    (site / "base.pth").write_text(_site_packages(base) + "\n")
    (home / "complete").touch()
    return python


def _make_base(cell: Cell, folder: Path) -> Path:
    """The interpreter of the environment with torch and all dependencies but Megatron-Core."""
    home = folder / f"python{cell.python}-torch{cell.torch}"
    python = home / "bin" / "python"
    if (home / "complete").exists():
        return python
    shutil.rmtree(home, ignore_errors=True)
    print(f"making {home}: torch alone may be some GB", file=sys.stderr)
    _run([str(find_python(cell.python)), "-m", "venv", str(home)])
    install = [str(python), "-m", "pip", "install", "--quiet"]
    if cell.torch == TORCH:  # the pins are of what this torch needs
        constraints = folder / "constraints.txt"
        pinned = (REPO / "constraints.txt").read_text().splitlines()
        constraints.write_text("\n".join(pin for pin in pinned if not pin.startswith(("torch==", "megatron-core=="))))
        install += ["-c", str(constraints)]
    _run([*install, f"torch=={cell.torch}", *_dependencies()])
    (home / "complete").touch()
    return python


def _dependencies() -> list[str]:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(r for name in _EXTRAS for r in extras[name])]
    return sorted({requirement for requirement in wanted if not requirement.startswith(_NOT_FOR_TESTS)})


def _site_packages(python: Path) -> str:
    return _output(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")


def _output(*command: str) -> str:
    """What the command prints, or nothing when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        package, _, version = command[-1].partition("==")
        if needed := re.search(rf"[ ,;]{re.escape(version)} Requires-Python ([^;\s]+)", done.stderr):
            raise NoCell(f"pip refuses {package} {version}: it requires Python {needed[1]}")
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NoCell((said or done.stderr.splitlines() or ["it failed"])[-1].removeprefix("ERROR: ")[:200])
