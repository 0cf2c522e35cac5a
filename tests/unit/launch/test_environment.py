"""`megatron-cpt env` says what is there; what would stop a run, or train on something else, is one error before it."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch import environment
from megatron_cpt.launch.environment import read_environment, refuse_broken_environment

REPO = Path(__file__).resolve().parents[3]


def test_env_prints_the_versions_that_are_installed_and_json_alone_when_asked() -> None:
    command = [sys.executable, "-m", "megatron_cpt", "env", "--json"]
    done = subprocess.run(command, cwd=REPO, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for name in ("torch", "megatron-core", "numpy", "pyarrow"):
        assert report["packages"][name] == importlib.metadata.version(name)
    assert report["torch"]["version"] == torch.__version__
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(report["available"]).isdisjoint(report["missing"]) and "training" in report["available"]
    assert report["problems"] == []


def test_what_is_not_installed_is_missing_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed_version", lambda name: None if name in ("pyarrow", "torch") else "1")
    found = read_environment()
    assert found.packages["pyarrow"] is None and found.torch is None
    assert "megatron-cpt[parquet]" in found.missing["Parquet and Arrow inputs"]
    assert "training" in found.missing and "training" not in found.available


def test_a_torch_that_cannot_be_imported_is_a_line_of_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "TORCH_PROBE", "raise OSError('libcudart.so.13: cannot open shared object file')")
    found = read_environment()
    assert found.torch is None
    assert ["libcudart.so.13" in problem.what for problem in found.problems] == [True]


def megatron_core(folder: Path) -> Path:
    (folder / "megatron" / "core").mkdir(parents=True)
    (folder / "megatron" / "core" / "__init__.py").write_text("")
    return folder / "megatron" / "core"


def test_two_megatron_cores_on_the_path_are_a_problem_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = megatron_core(tmp_path / "Megatron-LM")
    monkeypatch.syspath_prepend(str(tmp_path / "Megatron-LM"))
    found = read_environment()
    assert str(checkout) in found.megatron_core_folders and len(found.megatron_core_folders) == 2
    assert ["two Megatron-Cores" in problem.what for problem in found.problems] == [True]


def test_a_cpu_torch_on_a_machine_with_gpus_is_refused_unless_they_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "count_nvidia_gpus", lambda: 8)
    monkeypatch.setattr(environment, "torch_build", lambda: ("2.13.0+cpu", None))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(LaunchError, match=r"8 NVIDIA GPUs, and torch 2.13.0\+cpu is built for the CPU"):
        refuse_broken_environment()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refuse_broken_environment()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(environment, "torch_build", lambda: ("2.13.0", "13.0"))
    refuse_broken_environment()


def test_the_build_of_torch_is_read_without_importing_it() -> None:
    import torch

    assert environment.torch_build() == (torch.__version__, torch.version.cuda)


def test_a_half_installed_environment_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    there = environment.installed_version
    monkeypatch.setattr(environment, "installed_version", lambda name: None if name == "einops" else there(name))
    with pytest.raises(LaunchError, match="half-installed: einops missing"):
        refuse_broken_environment()


def test_without_the_packages_that_only_give_speed_a_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    there = environment.installed_version
    monkeypatch.setattr(
        environment, "installed_version", lambda name: None if name in ("fastokens", "rensa") else there(name)
    )
    refuse_broken_environment()


def test_a_command_whose_package_is_missing_says_so_without_a_traceback() -> None:
    script = (
        "import sys\nsys.modules['pydantic'] = None\n"
        "sys.argv = ['megatron-cpt', 'plan', 'config.yaml']\n"
        "from megatron_cpt.cli import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, text=True, capture_output=True, check=False)
    assert done.returncode == 1
    assert "the Python package pydantic is not installed" in done.stderr and "hint: make setup" in done.stderr
    assert "Traceback" not in done.stderr
