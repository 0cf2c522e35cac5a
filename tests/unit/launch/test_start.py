"""Preparing a run: nothing is written before everything is checked, and a run is known by its content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.config.load import build_config, load_config
from megatron_cpt.errors import CheckpointError, ConfigError, LaunchError
from megatron_cpt.launch.start import KillSwitchSet, PreparedRun, load_prepared, prepare
from megatron_cpt.runs.checkpoints import checkpoint_path, seal
from megatron_cpt.runs.folder import count_attempts
from megatron_cpt.runs.lease import Lease
from megatron_cpt.runs.marker import Marker
from megatron_cpt.train.api import run_training
from tests.configs import tiny_run, write_tiny_run
from tests.synthetic_data import random_documents, write_dataset
from tests.synthetic_model import write_model


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    write_dataset(tmp_path / "data", random_documents(60, 128, 1))
    return tmp_path


def start(folder: Path, accept_changes: bool = False, **sections: Any) -> PreparedRun:
    return prepare(build_config(tiny_run(folder, **sections)), "config.yaml", accept_changes=accept_changes)


def save(run: PreparedRun, tokens: int = 512) -> None:
    """A complete checkpoint, as far as preparing looks at it."""
    partial = run.folder.checkpoints / "iter_0000001.partial-1"
    partial.mkdir()
    ledger = {"samples": tokens // 64, "tokens": tokens, "sources": {}}
    seal(partial, checkpoint_path(partial.parent, 1), "", Marker(1, tokens, ledger, {}, "replicated", 1, "", {}))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_ranks_work_from_what_was_prepared_not_from_the_users_file(inputs: Path) -> None:
    path = write_tiny_run(inputs)
    run = prepare(load_config(path), str(path))
    path.write_text("job_name: edited meanwhile")
    assert load_prepared(run.folder).checked.config == run.checked.config
    assert count_attempts(run.folder) == 1
    assert {p.name for p in run.folder.hf.iterdir()} == {"config.json"}


def test_a_refused_start_leaves_nothing_behind(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_cpt.launch.preflight.free_bytes", lambda root: 1000)
    with pytest.raises(CheckpointError, match="1,000 are free"):
        start(inputs)
    with pytest.raises(ConfigError, match="does not exist"):
        start(inputs, model={"init_from": str(inputs / "gone"), "architecture": str(inputs / "model")})
    assert not (inputs / "run").exists()


def test_a_moved_base_continues_and_another_content_at_the_same_path_does_not(inputs: Path) -> None:
    save(start(inputs))
    (inputs / "model").rename(inputs / "moved")
    moved = start(inputs, model={"init_from": str(inputs / "moved")})
    assert moved.ledger.tokens == 512
    edit_config(inputs / "moved", rope_theta=5e5)
    with pytest.raises(CheckpointError, match="holds another run") as caught:
        start(inputs, model={"init_from": str(inputs / "moved")})
    assert "rope" in caught.value.message and "500000" in caught.value.message
    accepted = start(inputs, accept_changes=True, model={"init_from": str(inputs / "moved")})
    assert json.loads((accepted.folder.hf / "config.json").read_text())["rope_theta"] == 10000.0  # the run's own


def test_the_runs_own_copy_of_the_model_has_its_positions(inputs: Path) -> None:
    before = json.loads((inputs / "model" / "config.json").read_text())
    longer = {"model": {"rope": {"yarn_factor": 4}}, "batch": {"seq_length": 1024, "global_batch_size": 2}}
    run = start(inputs, **longer)
    save(run)
    own = json.loads((run.folder.hf / "config.json").read_text())
    assert own["max_position_embeddings"] == 4 * before["max_position_embeddings"] == run.checked.arch.positions
    assert own["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert json.loads((inputs / "model" / "config.json").read_text()) == before
    assert start(inputs, **longer).checked.arch == run.checked.arch  # from its own copy
    with pytest.raises(CheckpointError, match="holds another run") as caught:
        start(inputs, **longer | {"model": {"rope": {"theta": 1e6, "max_position_embeddings": 2048}}})
    assert "model: rope_scaling" in caught.value.message


def test_a_sequence_beyond_the_models_positions_needs_a_rope_that_says_so(inputs: Path) -> None:
    with pytest.raises(ConfigError, match="exceeds the model's 512 positions") as caught:
        start(inputs, batch={"seq_length": 1024, "global_batch_size": 2})
    assert "model.rope" in str(caught.value)
    with pytest.raises(ConfigError, match="exceeds the model's 768 positions"):
        start(inputs, batch={"seq_length": 1024, "global_batch_size": 2}, model={"rope": {"yarn_factor": 1.5}})


@pytest.mark.parametrize("with_identity", [True, False])
def test_another_architecture_of_the_same_sizes_is_named(with_identity: bool, inputs: Path) -> None:
    run = start(inputs)
    save(run)
    if not with_identity:  # a run of before there were identities
        (run.folder.root / "identity.json").unlink()
    edit_config(inputs / "model", model_type="llama", architectures=["LlamaForCausalLM"], tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="holds another run") as caught:
        start(inputs)
    assert "qkv_bias" in caught.value.message or "bias" in caught.value.message
    assert "tie" in caught.value.message


def test_other_weights_of_the_same_shape_are_another_model(inputs: Path) -> None:
    save(start(inputs))
    write_model(inputs / "model", seed=1)
    with pytest.raises(CheckpointError, match=r"weights \(sha256\)"):
        start(inputs)


def test_another_tokenizer_is_another_run(inputs: Path) -> None:
    (inputs / "model" / "vocab.json").write_text('{"a": 0}')
    save(start(inputs))
    (inputs / "model" / "vocab.json").write_text('{"b": 0}')
    with pytest.raises(CheckpointError, match=r"tokenizer \(sha256\)"):
        start(inputs)


def test_a_base_that_is_gone_does_not_stop_a_resume(inputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(start(inputs))
    shutil.rmtree(inputs / "model")
    assert start(inputs).ledger.tokens == 512
    assert "is gone; the run continues from its own files" in caplog.text
    shutil.rmtree(inputs / "run" / "checkpoints")  # now it is needed
    with pytest.raises(ConfigError, match="does not exist"):
        start(inputs)


def test_deleted_checkpoints_are_noticed(inputs: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = start(inputs)
    assert "begins again" not in caplog.text
    run.folder.metrics.write_text('{"iteration": 4, "consumed_tokens": 2048}\n')
    assert start(inputs).ledger.tokens == 0
    assert "has trained 2,048 tokens before and holds no complete checkpoint" in caplog.text


def test_a_finished_run_is_left_alone(inputs: Path) -> None:
    run = start(inputs)
    save(run, tokens=4096)
    assert start(inputs).finished
    assert count_attempts(run.folder) == 1


def test_kill_switch_and_lease_keep_a_run_from_starting(inputs: Path) -> None:
    run = start(inputs)
    lease = Lease(run.folder.lease)
    lease.acquire()
    with pytest.raises(CheckpointError, match="is being written by process"):
        start(inputs)
    lease.release()
    run.folder.kill_switch.touch()
    with pytest.raises(KillSwitchSet) as caught:
        start(inputs)
    assert caught.value.exit_code == 76
    assert count_attempts(run.folder) == 1


def test_errors_of_the_python_api_name_what_the_user_gave(inputs: Path) -> None:
    config = build_config(tiny_run(inputs))
    with pytest.raises(ConfigError) as caught:
        run_training(config, ["optimiser.lr=1", "seed=x"])
    assert "2 problems in the config given to run_training" in caught.value.message
    with pytest.raises(LaunchError, match="one machine cannot start the others"):
        run_training(config, ["parallel.nodes=2"])
