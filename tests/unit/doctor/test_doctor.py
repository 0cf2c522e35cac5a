"""`megatron-cpt doctor` finds each fault that is put there, and finds nothing where there is none."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megatron_cpt.config.load import build_config
from megatron_cpt.corpus.dataset.manifest import bin_path
from megatron_cpt.doctor import gpus, storage
from megatron_cpt.doctor.check import Check, failed
from megatron_cpt.doctor.examine import examine_machine
from megatron_cpt.doctor.gpus import SmiError, check_gpus
from megatron_cpt.doctor.network import check_meeting_place
from megatron_cpt.doctor.versions import check_versions
from tests.configs import tiny_run, write_tiny_run
from tests.synthetic_data import random_documents, write_dataset
from tests.synthetic_model import write_model

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    write_dataset(tmp_path / "data", random_documents(60, 128, 1))
    return tmp_path


def examine(folder: Path, **sections: object) -> dict[str, Check]:
    checks = examine_machine(build_config(tiny_run(folder, **sections)), "config.yaml")
    return {check.name: check for check in checks}


def doctor(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys\n"
        "for name in ('torch', 'megatron', 'transformers'): sys.modules[name] = None\n"
        "from megatron_cpt.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, "doctor", str(write_tiny_run(folder)), *arguments]
    return subprocess.run(command, cwd=REPO, text=True, capture_output=True, check=False)


def test_without_a_fault_no_check_is_an_error_and_torch_is_not_imported(inputs: Path) -> None:
    done = doctor(inputs, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["failed"] is False
    assert {check["verdict"] for check in report["checks"]} <= {"ok", "not checked"}
    assert all(check["looked_at"] and check["detail"] for check in report["checks"])
    assert not (inputs / "run").exists()


def test_a_wrong_config_is_exit_code_2_and_a_failed_check_is_1(inputs: Path) -> None:
    assert doctor(inputs, "batch.seq_lenght=3").returncode == 2
    bin_path(inputs / "data").write_bytes(bin_path(inputs / "data").read_bytes()[:-2])
    done = doctor(inputs)
    assert done.returncode == 1
    assert "error        dataset data:" in done.stdout and "hint:" in done.stdout


@pytest.mark.parametrize("removed", [1, 2, 4096])
def test_a_bin_shorter_than_its_index_says_is_an_error(inputs: Path, removed: int) -> None:
    content = bin_path(inputs / "data").read_bytes()
    bin_path(inputs / "data").write_bytes(content[:-removed])
    found = examine(inputs)
    assert found["dataset data"].verdict == "error"
    assert found["untrained tokens"].verdict == "not checked"


def test_data_of_another_tokenizer_is_an_error(inputs: Path) -> None:
    (inputs / "model" / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})
    )
    found = examine(inputs)["dataset data"]
    assert found.verdict == "error" and "not the model's" in found.detail


def test_a_missing_dataset_does_not_hide_the_other_checks(inputs: Path) -> None:
    sources = [{"name": "lost", "prefix": str(inputs / "lost")}, {"name": "data", "prefix": str(inputs / "data")}]
    found = examine(inputs, data={"train": sources})
    assert found["dataset lost"].verdict == "error"
    assert found["dataset data"].verdict == found["untrained tokens"].verdict == "ok"


def zero_rows(folder: Path, rows: list[int]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][rows] *= 1e-4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_ids_with_rows_near_zero_are_named_when_they_occur_and_only_then(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_dataset(tmp_path / "data", [np.array([1, 2, 3, 7, 7, 0] * 30)] * 20)
    zero_rows(tmp_path / "model", [7, 90])
    found = examine(tmp_path)["untrained tokens"]
    assert found.verdict == "warning"
    assert "1 ids that occur 1,200 times" in found.detail and "id 7" in found.detail and "90" not in found.detail


def test_a_budget_that_repeats_a_source_too_often_is_an_error(inputs: Path) -> None:
    assert examine(inputs, data={"max_epochs": 1})["epochs"].verdict == "error"


@pytest.mark.parametrize(("free", "verdict"), [(1000, "error"), (4_000_000, "error"), (10**9, "ok")])
def test_the_disk_must_hold_the_checkpoints_that_stay_at_once(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, free: int, verdict: str
) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda root: free)
    assert examine(inputs, checkpoint={"save_every": "1 iters"})["disk"].verdict == verdict


def test_a_run_folder_that_cannot_be_written_is_an_error(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(storage.tempfile, "NamedTemporaryFile", read_only)
    found = examine(inputs)["run folder"]
    assert found.verdict == "error" and "Read-only file system" in found.detail


def test_a_taken_port_is_an_error_and_a_free_one_is_not() -> None:
    with socket.create_server(("", 0)) as taken:
        environ = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(taken.getsockname()[1])}
        assert check_meeting_place(environ).verdict == "error"
        held = environ | {"RANK": "1", "WORLD_SIZE": "2"}
        assert check_meeting_place(held).verdict == "ok"  # rank 0 listens there
    assert check_meeting_place(environ).verdict == "ok"
    assert check_meeting_place({}).verdict == "not checked"
    assert check_meeting_place({"MASTER_PORT": "http"}).verdict == "error"


@pytest.mark.parametrize(
    ("versions", "verdict"),
    [
        ({"nvidia-nccl-cu12": "2.29.2"}, "error"),
        ({"nvidia-nccl-cu13": "2.29.2"}, "error"),
        ({"nvidia-nccl-cu12": "2.21.5"}, "warning"),
        ({"nvidia-nccl-cu12": "2.26.2"}, "ok"),
        ({"nvidia-nccl-cu12": "2.29.3"}, "ok"),
        ({}, "not checked"),
    ],
)
def test_versions_that_are_known_to_fail_are_found_with_their_source(versions: dict[str, str], verdict: str) -> None:
    found = [check for check in check_versions(versions.get) if check.name == "known bad versions"]
    assert [check.verdict for check in found] == [verdict]
    if verdict in ("error", "warning"):
        assert "https://" in found[0].detail and found[0].hint


def smi(memory_used: str = "3", ecc: str = "0", processes: str = "", count: int = 8) -> gpus.Smi:
    def answer(arguments: list[str]) -> str:
        if "compute-apps" in arguments[0]:
            return processes
        return "".join(f"{i}, NVIDIA H100 80GB HBM3, 81559, {memory_used}, {ecc}\n" for i in range(count))

    return answer


def verdicts(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.verdict for check in checks if check.verdict not in ("ok", "not checked")}


def test_healthy_gpus_give_no_warning_and_each_fault_gives_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert verdicts(check_gpus(8, smi())) == {}
    assert verdicts(check_gpus(8, smi(count=7))) == {"number of GPUs": "error"}
    assert verdicts(check_gpus(8, smi(memory_used="40000"))) == {"GPU memory": "warning"}
    assert verdicts(check_gpus(8, smi(ecc="2"))) == {"GPU memory errors": "error"}
    assert verdicts(check_gpus(8, smi(processes="77, python, 30000\n"))) == {"processes on GPUs": "warning"}
    unknown = {check.name: check.verdict for check in check_gpus(8, smi(ecc="[N/A]", memory_used="[N/A]"))}
    assert unknown["GPU memory errors"] == unknown["GPU memory"] == "not checked"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert verdicts(check_gpus(8, smi())) == {"number of GPUs": "error"}


def test_a_driver_that_does_not_answer_is_an_error_only_where_there_are_gpus() -> None:
    def silent(arguments: list[str]) -> str:
        raise SmiError("nvidia-smi did not answer within 30 seconds")

    assert failed(check_gpus(8, silent, lambda: 8))
    assert [check.verdict for check in check_gpus(8, silent, lambda: 0)] == ["not checked"]


def test_nvidia_smi_that_hangs_is_ended_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpus, "SMI_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(SmiError, match="did not answer"):
        gpus.run_smi(["-L"])


def preflight(folder: Path, *overrides: str) -> dict[str, dict[str, str]]:
    command = [sys.executable, "-m", "megatron_cpt", "doctor", str(write_tiny_run(folder)), *overrides]
    command += ["--preflight", "--json"]
    done = subprocess.run(command, cwd=REPO, text=True, capture_output=True, check=False)
    report = json.loads(done.stdout)
    assert done.returncode == int(report["failed"]), done.stderr
    assert not (folder / "run").exists()
    return {check["name"]: check for check in report["checks"]}


def test_the_first_loss_of_weights_that_know_nothing_is_an_error(inputs: Path) -> None:
    found = preflight(inputs, "model.check_start=true")["start of training"]
    assert found["verdict"] == "error" and "know nothing of this text" in found["detail"]


def test_the_first_loss_of_weights_that_fit_the_text_is_told(tmp_path: Path) -> None:
    """Every token is 5, and the output layer gives 5 to the hidden state of 5."""
    write_model(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[:] = 0
    tensors["lm_head.weight"][5] = 10 * tensors["model.embed_tokens.weight"][5]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    write_dataset(tmp_path / "data", [np.full(4000, 5)])
    found = preflight(tmp_path, "model.check_start=true")["first loss"]
    assert found["verdict"] == "ok" and float(found["detail"].split()[0]) < 1


def test_the_start_of_training_is_not_tried_where_a_check_has_failed(inputs: Path) -> None:
    bin_path(inputs / "data").unlink()
    found = preflight(inputs)["start of training"]
    assert found["verdict"] == "not checked" and "errors above" in found["detail"]


def test_a_layout_of_other_ranks_than_were_started_is_an_error(inputs: Path) -> None:
    found = preflight(inputs, "parallel.gpus_per_node=2")["start of training"]
    assert found["verdict"] == "error" and "asks for 2 processes" in found["detail"]
