"""Make .venv and install megatron-cpt into it. `make setup` calls this with the Python that find_python.sh chose.

Standard library only: it runs before anything is installed. What it does, in this order:
check the interpreter, replace an environment that is broken or of another kind, create it, let pip install, and
write `.venv/.installed` last, so that a half-installed environment is completed by the next call.

TORCH=system builds on the torch, TransformerEngine and apex of the interpreter (an NGC container): they stay
visible in .venv, and torch's version is a constraint, so that pip can never install a second one.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

REPO = Path(__file__).resolve().parents[1]
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
WHEELHOUSE_RECORD = "wheelhouse.json"  # written by wheelhouse.py
LINK_TO_SYSTEM = "interpreters_own_packages.pth"
NETWORK_WORDS = re.compile(
    r"NewConnectionError|NameResolution|name resolution|ConnectTimeout|ReadTimeout|ProxyError|Max retries exceeded|"
    r"Network is unreachable|Connection refused|connection broken",
    re.IGNORECASE,
)
# pip knows the version of torch's metadata, which may lack the build that torch.__version__ ends in.
TORCH_PROBE = (
    "import importlib.metadata, json, sys, torch\n"
    "print(json.dumps({'version': importlib.metadata.version('torch'), 'file': torch.__file__,\n"
    " 'path': [p for p in sys.path if p.endswith(('site-packages', 'dist-packages'))]}))"
)


@dataclass(frozen=True)
class Choice:
    """How an environment is made; kept in `.venv/.setup.json`, so that a later `make train` does not change it."""

    torch: str = "pip"  # or "system"
    extras: str = "dev,quickstart"
    wheelhouse: str | None = None  # a folder: install from it alone
    python: str = sys.executable


class SetupError(Exception):
    """What is wrong and what to do about it; shown without a traceback."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def main() -> None:
    options = _options()
    try:
        setup(options)
    except SetupError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        sys.exit(2)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make .venv and install megatron-cpt into it.")
    parser.add_argument("--project", type=Path, default=REPO, help="the checkout to install")
    parser.add_argument("--torch", help="`system`: build on the interpreter's own torch")
    parser.add_argument("--wheelhouse", type=Path, help="install from this folder alone, without a network")
    parser.add_argument("--extras", help="optional dependencies; default dev,quickstart")
    parser.add_argument("--python-was-named", action="store_true", help="a .venv of another Python is replaced")
    return parser.parse_args()


def setup(options: argparse.Namespace) -> None:
    """Bring `.venv` below the project to what the options ask for; a second call does nothing."""
    venv: Path = options.project / ".venv"
    choice = choose(options, venv / ".setup.json")
    if choice.python != sys.executable and Path(choice.python).exists():  # the one that .venv was made with
        os.execv(choice.python, [choice.python, *sys.argv, "--python-was-named"])
    wheelhouse = read_wheelhouse(choice.wheelhouse)
    if options.extras is None and "extras" in wheelhouse:
        choice = replace(choice, extras=wheelhouse["extras"])
    why = why_unusable(venv, choice.torch == "system", options.python_was_named)
    if venv.is_symlink() and why is None:
        return  # somebody's own arrangement: it works, and what it links to is not ours to change
    stamp, wanted = venv / ".installed", fingerprint(options.project, choice)
    if why is None and stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    torch = system_torch(sys.executable) if choice.torch == "system" else None
    if torch is None and "torch" in wheelhouse.get("without", []):
        raise SetupError(
            f"{choice.wheelhouse} holds no torch",
            "make setup TORCH=system WHEELHOUSE=... with a PYTHON that has torch, or make wheelhouse without WITHOUT",
        )
    if why is not None:
        create(venv, why, torch)
    stamp.unlink(missing_ok=True)  # until pip has finished, this environment is half-installed
    (venv / ".setup.json").write_text(json.dumps(asdict(choice)), encoding="utf-8")
    install(options.project, venv, choice, torch)
    stamp.write_text(wanted, encoding="utf-8")
    say(f"done: {venv / 'bin' / 'megatron-cpt'} env shows what is there")


def choose(options: argparse.Namespace, standing: Path) -> Choice:
    """What was asked for now; else what .venv was made with; else the defaults."""
    try:
        before = Choice(**json.loads(standing.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        before = Choice()
    torch = options.torch or before.torch
    if torch not in ("pip", "system"):
        raise SetupError(f"TORCH={torch} is neither pip nor system", "make setup, or make setup TORCH=system")
    wheelhouse = str(options.wheelhouse.resolve()) if options.wheelhouse else before.wheelhouse
    python = sys.executable if options.python_was_named else before.python
    return Choice(torch, options.extras or before.extras, wheelhouse, python)


def fingerprint(project: Path, choice: Choice) -> str:
    """Changes when another installation is asked for: the stamp of a finished one."""
    files = [path for name in ("pyproject.toml", "constraints.txt") if (path := project / name).is_file()]
    content = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(content + f"{choice.torch} {choice.extras}".encode()).hexdigest()


def read_wheelhouse(folder: str | None) -> dict[str, Any]:
    """The record of a wheelhouse, empty when none is used.

    Raises:
        SetupError: not a wheelhouse, or one for another Python.
    """
    if folder is None:
        return {}
    record = Path(folder) / WHEELHOUSE_RECORD
    try:
        found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError(f"{folder} is no wheelhouse: {record.name}: {error}", "make wheelhouse writes one") from error
    if found.get("python") != VERSION:
        raise SetupError(
            f"{folder} holds wheels for Python {found.get('python')}, and {sys.executable} is {VERSION}",
            f"make setup PYTHON=/path/to/python{found.get('python')}, or make wheelhouse with this machine's Python",
        )
    return found


def why_unusable(venv: Path, on_system_torch: bool, python_was_named: bool) -> str | None:
    """Why an environment has to be made (again), None when the one that stands can be kept.

    Raises:
        SetupError: `.venv` is something that this script did not make and must not remove.
    """
    if venv.is_symlink() and not venv.exists():
        raise SetupError(f"{venv} is a link to {venv.readlink()}, which is not there", "remove the link")
    if not venv.exists():
        return "it is not there yet"
    if not (venv / "pyvenv.cfg").is_file() and any(venv.iterdir()):
        raise SetupError(f"{venv} is there and is no virtual environment", "move it away")
    python = venv / "bin" / "python"
    probe = "import pip, sys; print('%d.%d' % sys.version_info[:2])"
    done = _output([python, "-c", probe]) if python.exists() else None
    if done is None or done.returncode:
        return "it is broken: its Python does not run or has no pip"
    found = done.stdout.strip()
    if found != VERSION and (python_was_named or not _is_proven(python)):
        return f"it has Python {found}, and {VERSION} is wanted"
    is_on_system = "include-system-site-packages = true" in (venv / "pyvenv.cfg").read_text(encoding="utf-8")
    if is_on_system != on_system_torch:
        return "it was made " + ("on the system's torch" if is_on_system else "with a torch of its own")
    return None


def _output(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, capture_output=True, check=False)


def _is_proven(python: Path) -> bool:
    script = Path(__file__).with_name("find_python.sh")
    return _output(["bash", script, python]).returncode == 0


def system_torch(python: str) -> dict[str, Any]:
    """Version, file and package folders of the torch that an interpreter has of its own."""
    done = _output([python, "-c", TORCH_PROBE])
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it ended without a message"]
        raise SetupError(
            f"TORCH=system: {python} cannot import torch: {last[0]}",
            "name the Python that has it: make setup TORCH=system PYTHON=/path/to/python, or make setup without TORCH",
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def create(venv: Path, why: str, torch: dict[str, Any] | None) -> None:
    """Make the environment, in place of one that cannot be used; nothing is removed before Python is checked."""
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        raise SetupError(
            f"{sys.executable} has no venv module, which makes virtual environments",
            f"apt-get install python{VERSION}-venv (Debian, Ubuntu), or another Python: make PYTHON=/path/to/python",
        )
    if venv.is_symlink():
        raise SetupError(f"{venv} links to {venv.readlink()}, and {why}", "remove the link, or make its target work")
    if venv.exists():
        say(f"{venv} is made again: {why}")
        shutil.rmtree(venv)
    say(f"creating {venv} with Python {VERSION} ({sys.executable})")
    flags = ["--system-site-packages"] if torch else []
    done = _output([sys.executable, "-m", "venv", *flags, venv])
    if done.returncode:
        shutil.rmtree(venv, ignore_errors=True)
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise SetupError(f"{sys.executable} -m venv {venv} failed: {last[0]}", "check the free space of this disk")
    if torch:
        _link_packages(venv, torch)


def _link_packages(venv: Path, torch: dict[str, Any]) -> None:
    """Show .venv the packages of an interpreter that is a virtual environment itself; else they are shown already."""
    python = venv / "bin" / "python"
    done = _output([python, "-c", TORCH_PROBE])
    if done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["file"] == torch["file"]:
        return
    site = next((venv / "lib").glob("python*/site-packages"))
    (site / LINK_TO_SYSTEM).write_text("\n".join(torch["path"]) + "\n", encoding="utf-8")


def install(project: Path, venv: Path, choice: Choice, torch: dict[str, Any] | None) -> None:
    """pip install of the project, editable, with its extras; then proof that torch is the one meant."""
    with tempfile.TemporaryDirectory() as scratch:
        constraints = project / "constraints.txt"
        if torch:
            constraints = Path(scratch) / "constraints.txt"
            constraints.write_text(f"torch=={torch['version']}\n", encoding="utf-8")
            say(f"building on torch {torch['version']} of {Path(torch['file']).parent}")
        arguments = ["-c", str(constraints)] if constraints.is_file() else []
        if choice.wheelhouse:
            arguments += ["--no-index", "--find-links", choice.wheelhouse]
        say(f"pip installs megatron-cpt[{choice.extras}]" + ("" if torch else "; torch is the large part of it"))
        quiet = [] if sys.stderr.isatty() else ["--quiet"]
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", *quiet]
        code, errors = run_pip([*pip, *arguments, "-e", f"{project}[{choice.extras}]"], choice.wheelhouse is not None)
    if code:
        raise_pip_failure(errors, choice.wheelhouse)
    if torch:
        _check_one_torch(venv, torch)


def run_pip(command: list[str], offline: bool) -> tuple[int, str]:
    """Run pip with its errors shown as they come; return the exit code and their text."""
    environment = dict(os.environ)
    if offline:  # a wheelhouse is complete: no other place may answer
        environment = {k: v for k, v in environment.items() if k not in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL")}
        environment["PIP_CONFIG_FILE"] = os.devnull
    errors = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            errors.append(line)
            if not line.startswith("WARNING: Retrying"):
                sys.stderr.write(line)
    return process.returncode, "".join(errors)


def raise_pip_failure(errors: str, wheelhouse: str | None) -> NoReturn:
    """One sentence from what pip wrote: which package, and whether the network, the disk or a version is to blame."""
    again = "the next make continues"
    match = re.search(r"(?:No matching distribution found for|satisfies the requirement) (\S+)", errors)
    package = match.group(1).rstrip(".;") if match else None
    if "ResolutionImpossible" in errors:
        raise SetupError("pip found versions that exclude each other; it names them above", again)
    if "No space left on device" in errors:
        raise SetupError("the disk is full", f"free some space (torch alone needs up to 8 GB); {again}")
    if wheelhouse is not None and package:
        raise SetupError(
            f"{wheelhouse} holds no wheel of {package} for Python {VERSION}",
            f"on a machine with a network: pip download --only-binary :all: -d wheelhouse '{package}', or make "
            "wheelhouse again, with the same Python and EXTRAS; then copy the folder here",
        )
    if NETWORK_WORDS.search(errors) or "(from versions: none)" in errors:
        is_sure = NETWORK_WORDS.search(errors) is not None
        raise SetupError(
            f"no network{'' if is_sure else ', or no such package in the index'}: pip could not fetch "
            f"{package or 'a package'}",
            f"check the connection or pip's proxy and index settings; {again}. Without a network: make wheelhouse on "
            "a machine that has one, then make setup WHEELHOUSE=folder here",
        )
    if package:
        raise SetupError(
            f"there is no wheel of {package} for Python {VERSION} on this machine",
            "another Python may have one: make PYTHON=/path/to/python3.11",
        )
    raise SetupError("pip failed; its words stand above", again)


def _check_one_torch(venv: Path, torch: dict[str, Any]) -> None:
    done = _output([venv / "bin" / "python", "-c", TORCH_PROBE])
    found = json.loads(done.stdout.splitlines()[-1])["file"] if done.returncode == 0 else "none"
    if found != torch["file"]:
        raise SetupError(
            f"TORCH=system: .venv sees torch at {found}, not the interpreter's at {torch['file']}",
            "remove .venv and run make setup TORCH=system again",
        )


if __name__ == "__main__":
    main()
