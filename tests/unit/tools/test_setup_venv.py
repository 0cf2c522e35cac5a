"""`make setup`: any proven Python, one torch, and one clear error for each way in which an installation fails."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parents[3]
FIND = REPO / "tools" / "find_python.sh"
SETUP = REPO / "tools" / "setup_venv.py"
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(scope="module")
def setup_venv() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("setup_venv", SETUP)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["setup_venv"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["setup_venv"]


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text + "\n")
    path.chmod(0o755)
    return path


def find(
    folder: Path, versions: dict[str, str | None], named: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    """find_python.sh with only these commands on PATH; a version of None is a command that fails, as pyenv's shims."""
    for name, version in versions.items():
        executable(folder / name, f"echo {version}" if version else "exit 127")
    environment = {"PATH": str(folder), **env}
    command = ["/bin/bash", str(FIND), named]
    return subprocess.run(command, env=environment, text=True, capture_output=True, check=False)


def test_the_first_proven_python_that_runs_is_taken(tmp_path: Path) -> None:
    found = find(tmp_path, {"python3.11": None, "python3.12": "3.12", "python3": "3.13"})
    assert found.stdout.strip() == str(tmp_path / "python3.12")


def test_on_the_systems_torch_the_python3_of_the_container_comes_first(tmp_path: Path) -> None:
    found = find(tmp_path, {"python3.11": "3.11", "python3": "3.12"}, TORCH="system")
    assert found.stdout.strip() == str(tmp_path / "python3")


@pytest.mark.parametrize(
    ("versions", "named", "says"),
    [
        ({"python3": "3.10", "python": "2.7"}, "", "python3 is Python 3.10; python is Python 2.7;"),
        ({}, "", "there is no python3 at all"),
        ({"old": "3.9"}, "old", "PYTHON=old is Python 3.9; megatron-cpt runs on 3.11, 3.12, 3.13"),
        ({"new": "3.14"}, "new", "PYTHON=new is Python 3.14"),
        ({}, "absent", "PYTHON=absent is no Python that runs"),
    ],
)
def test_a_wrong_python_is_one_error_with_a_hint(
    tmp_path: Path, versions: dict[str, str | None], named: str, says: str
) -> None:
    found = find(tmp_path, versions, named)
    assert found.returncode == 2 and found.stdout == ""
    assert says in found.stderr and "hint: " in found.stderr and len(found.stderr.splitlines()) == 2


def test_the_proven_pythons_are_those_of_the_package() -> None:
    proven = re.findall(r"\d\.\d+", re.search(r'^proven="(.*)"', FIND.read_text(), re.MULTILINE).group(1))  # type: ignore[union-attr]
    metadata = (REPO / "pyproject.toml").read_text()
    assert re.findall(r"Python :: (3\.\d+)", metadata) == proven
    below = f"3.{int(proven[-1].split('.')[1]) + 1}"
    assert f'requires-python = ">={proven[0]},<{below}"' in metadata


# A project whose build backend needs no network: the real sequence of venv and pip, in seconds.
BACKEND = """
import zipfile
def _wheel(folder):
    name = "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(folder + "/" + name, "w") as wheel:
        wheel.writestr("tiny.py", "")
        requires = "".join(f"Requires-Dist: {line}\\n" for line in open("requires.txt").read().split("\\n") if line)
        head = "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\nProvides-Extra: dev\\nProvides-Extra: quickstart\\n"
        wheel.writestr("tiny-1.dist-info/METADATA", head + requires)
        tags = "Wheel-Version: 1.0\\nGenerator: t\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr("tiny-1.dist-info/WHEEL", tags)
        wheel.writestr("tiny-1.dist-info/RECORD", "")
    return name
def build_wheel(folder, *_, **__): return _wheel(folder)
def build_editable(folder, *_, **__): return _wheel(folder)
"""


def project(folder: Path, *requires: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "backend.py").write_text(BACKEND)
    (folder / "requires.txt").write_text("\n".join(requires))
    system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (folder / "pyproject.toml").write_text(system)
    return folder


def run_setup(folder: Path, *options: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    """setup_venv.py without any index: no package can come from outside."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [python, str(SETUP), "--project", str(folder), *options]
    return subprocess.run(command, text=True, capture_output=True, check=False, env=environment)


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter that has a torch: a virtual environment with a package of that name and version."""
    home = tmp_path_factory.mktemp("with_torch") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    site = next((home / "lib").glob("python*/site-packages"))
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text(
        "__version__ = '2.11.0a0+container.cuda'\nclass version:\n    cuda = '13.0'\n"
    )
    (site / "torch-2.11.0a0+container.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0a0+container\n"
    (site / "torch-2.11.0a0+container.dist-info" / "METADATA").write_text(metadata)
    return str(home / "bin" / "python")


def test_setup_on_the_systems_torch_installs_no_second_one(tmp_path: Path, with_torch: str) -> None:
    folder = project(tmp_path / "job", "torch>=2.6,<3")
    done = run_setup(folder, "--torch", "system", python=with_torch)
    assert done.returncode == 0, done.stderr
    assert "building on torch 2.11.0a0+container" in done.stdout
    venv = folder / ".venv"
    site = next((venv / "lib").glob("python*/site-packages"))
    assert (site / "tiny-1.dist-info").is_dir()
    assert sorted(site.glob("torch*")) == []
    shown = subprocess.run(
        [venv / "bin" / "python", "-c", "import torch; print(torch.__version__)"], text=True, capture_output=True
    )
    assert shown.stdout.strip() == "2.11.0a0+container.cuda"

    # A plain call afterwards keeps the choice, and one that is satisfied does nothing.
    again = run_setup(folder)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")

    # A requirement that the system's torch does not meet is an error, never a download of another torch.
    project(folder, "torch>=99")
    (folder / "pyproject.toml").write_text((folder / "pyproject.toml").read_text() + "\n")
    refused = run_setup(folder)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr and "hint: " in refused.stderr
    assert sorted(site.glob("torch*")) == []


def test_a_half_installed_or_broken_environment_is_completed_or_made_again(tmp_path: Path) -> None:
    folder = project(tmp_path / "job", "there-is-no-such-package==1")
    first = run_setup(folder)
    assert first.returncode == 2 and "could not fetch there-is-no-such-package==1" in first.stderr
    assert not (folder / ".venv" / ".installed").exists()

    project(folder)
    second = run_setup(folder)
    assert second.returncode == 0, second.stderr
    assert "made again" not in second.stdout  # what was there is used

    (folder / ".venv" / "bin" / "python").unlink()
    third = run_setup(folder)
    assert third.returncode == 0, third.stderr
    assert "is made again: it is broken" in third.stdout


def test_an_environment_of_another_python_is_replaced_only_when_a_python_is_named(
    tmp_path: Path, setup_venv: ModuleType
) -> None:
    venv = tmp_path / ".venv"
    executable(venv / "bin" / "python", "echo 3.12" if HERE != "3.12" else "echo 3.13")
    (venv / "pyvenv.cfg").write_text("include-system-site-packages = false\n")
    assert setup_venv.why_unusable(venv, False, False) is None
    why = setup_venv.why_unusable(venv, False, True)
    assert why is not None and f"and {HERE} is wanted" in why
    executable(venv / "bin" / "python", "echo 3.9")  # never proven: replaced either way
    assert "it has Python 3.9" in setup_venv.why_unusable(venv, False, False)


def test_what_is_no_environment_is_never_removed(tmp_path: Path) -> None:
    folder = project(tmp_path / "job")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "precious").write_text("data")
    done = run_setup(folder)
    assert done.returncode == 2 and "no virtual environment" in done.stderr and "move it away" in done.stderr
    assert (folder / ".venv" / "precious").read_text() == "data"


def test_an_interpreter_without_torch_is_named(tmp_path: Path, setup_venv: ModuleType) -> None:
    python = executable(tmp_path / "python", "echo \"ModuleNotFoundError: No module named 'torch'\" >&2; exit 1")
    with pytest.raises(setup_venv.SetupError, match="cannot import torch: ModuleNotFoundError") as caught:
        setup_venv.system_torch(str(python))
    assert "PYTHON=/path/to/python" in caught.value.hint


def test_a_python_without_the_venv_module_creates_nothing(
    tmp_path: Path, setup_venv: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else found(name))
    with pytest.raises(setup_venv.SetupError, match="has no venv module") as caught:
        setup_venv.create(tmp_path / ".venv", "it is not there yet", None)
    assert f"python{HERE}-venv" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_no_network_says_which_wheel_is_missing(
    tmp_path: Path, setup_venv: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip's own words, from an index that refuses the connection."""
    command = [sys.executable, "-m", "pip", "download", "--isolated", "--index-url", "http://127.0.0.1:9/simple"]
    command += ["--retries", "1", "-d", str(tmp_path), "orjson==3.13.0"]
    code, errors = setup_venv.run_pip(command, offline=False)
    assert code != 0
    with pytest.raises(setup_venv.SetupError, match=r"no network: pip could not fetch orjson==3\.13\.0") as caught:
        setup_venv.raise_pip_failure(errors, None)
    assert "make wheelhouse" in caught.value.hint
    capsys.readouterr()


@pytest.mark.parametrize(
    ("errors", "wheelhouse", "says"),
    [
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            None,
            "disk is full",
        ),
        (
            "ERROR: No matching distribution found for rensa<0.6,>=0.5",
            "house",
            "house holds no wheel of rensa<0.6,>=0.5",
        ),
        ("ERROR: No matching distribution found for torch==9", None, f"no wheel of torch==9 for Python {HERE}"),
        ("ERROR: something else", None, "pip failed"),
    ],
)
def test_pips_failures_become_one_sentence(
    setup_venv: ModuleType, errors: str, wheelhouse: str | None, says: str
) -> None:
    with pytest.raises(setup_venv.SetupError, match=re.escape(says)):
        setup_venv.raise_pip_failure(errors, wheelhouse)


def test_a_wheelhouse_for_another_python_or_none_at_all_is_refused(tmp_path: Path, setup_venv: ModuleType) -> None:
    with pytest.raises(setup_venv.SetupError, match="is no wheelhouse"):
        setup_venv.read_wheelhouse(str(tmp_path))
    (tmp_path / "wheelhouse.json").write_text(json.dumps({"python": "3.9", "extras": "test"}))
    with pytest.raises(setup_venv.SetupError, match=re.escape("wheels for Python 3.9")):
        setup_venv.read_wheelhouse(str(tmp_path))


def test_a_wheelhouse_leaves_out_torch_and_what_only_torch_needs(tmp_path: Path) -> None:
    """The walk over pip's report: shared needs stay, torch's own go, extras count only when asked for."""
    source = (REPO / "tools" / "wheelhouse.py").read_text()
    walk = re.search(r'^REACHABLE = """(.*?)"""', source, re.DOTALL | re.MULTILINE)
    assert walk is not None

    def item(name: str, *requires: str) -> dict[str, object]:
        return {"metadata": {"name": name, "version": "1", "requires_dist": list(requires)}}

    needs = [
        "torch>=2",
        "numpy",
        "mypy; extra == 'dev'",
        "megatron-cpt[test]; extra == 'dev'",
        "pytest; extra == 'test'",
    ]
    report = [item("megatron-cpt", *needs, "rich"), item("torch", "sympy", "filelock", "numpy"), item("numpy")]
    report += [
        item("sympy"),
        item("filelock"),
        item("mypy"),
        item("pytest"),
        item("rich", "filelock", "absent; extra == 'x'"),
    ]
    (tmp_path / "report.json").write_text(json.dumps({"install": report}))
    (tmp_path / "walk.py").write_text(textwrap.dedent(walk.group(1)))

    def packages(extras: str, without: str) -> list[str]:
        command = [sys.executable, str(tmp_path / "walk.py"), str(tmp_path / "report.json"), extras, without]
        return list(json.loads(subprocess.run(command, text=True, capture_output=True, check=True).stdout))

    assert packages("dev", "") == ["filelock", "mypy", "numpy", "pytest", "rich", "sympy", "torch"]
    assert packages("test", "torch,numpy") == ["filelock", "pytest", "rich"]
