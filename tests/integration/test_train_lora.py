"""A run of adapters: kill -9 and another layout, checkpoints without the base, and what is no continuation of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoint_convert.checkpoint import Format
from checkpoint_convert.convert import Options, convert
from checkpoint_convert.open import open_checkpoint
from megatron_cpt.commands.merge_lora import merge_lora
from megatron_cpt.errors import CheckpointError, CptError
from megatron_cpt.launch.origin import resolve_origin
from megatron_cpt.runs.checkpoints import complete_checkpoints
from megatron_cpt.runs.metrics import read_metrics
from tests.integration.conftest import linked
from tests.integration.test_eval_of_a_run import evaluate
from tests.integration.test_train_resume import STEPS, rows, write_config
from tests.rank_pool import RankPool

LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}


@pytest.fixture(scope="module")
def work(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linked(inputs, tmp_path_factory.mktemp("lora"))


def lora_config(work: Path, run: str, layout: dict[str, int], **lora: Any) -> Path:
    checkpoint = {"save_every": "3 iters", "keep_last": 9}
    return write_config(work, run, layout, lora=LORA | lora, checkpoint=checkpoint)


@pytest.fixture(scope="module")
def whole(pool: RankPool, work: Path) -> Path:
    config = lora_config(work, "whole", {"tp": 2})
    assert pool.run(config, ranks=2, log=work / "whole.log") == [0, 0], (work / "whole.log").read_text()[-3000:]
    return work / "whole"


def test_a_killed_run_continues_bit_by_bit(pool: RankPool, work: Path, whole: Path) -> None:
    config = lora_config(work, "killed", {"tp": 2})
    pids = pool.start(config, ranks=2, log=work / "killed.log")
    while not complete_checkpoints(work / "killed" / "checkpoints"):
        assert not pool.have_ended(), (work / "killed.log").read_text()[-3000:]
        time.sleep(0.02)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert pool.wait() == [-9, -9]
    assert pool.run(config, ranks=2, log=work / "again.log") == [0, 0], (work / "again.log").read_text()[-3000:]
    assert rows(work / "killed") == rows(whole)


def test_a_checkpoint_holds_adapters_alone(whole: Path) -> None:
    checkpoint = complete_checkpoints(whole / "checkpoints")[0][0]
    keys = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    weights = {key for key in keys if key.startswith("decoder.") and "_extra_state" not in key}
    states = {key for key in keys if key.startswith("optimizer.state.")}
    assert len(weights) == 7 * 2 and all(".lora." in key for key in weights)
    assert states == {f"optimizer.state.{s}.{key}" for key in weights for s in ("exp_avg", "exp_avg_sq", "param")}
    assert not any("embedding" in key or "output_layer" in key for key in keys)


def test_it_continues_under_another_layout(pool: RankPool, work: Path, whole: Path) -> None:
    config = lora_config(work, "without_dropout", {"tp": 2}, dropout=0.0)
    assert pool.run(config, ranks=2, log=work / "a.log") == [0, 0]
    run, moved = work / "without_dropout", work / "moved"
    shutil.copytree(run, moved)
    for path, _ in complete_checkpoints(moved / "checkpoints"):
        if int(path.name.removeprefix("iter_")) > STEPS - 4:
            shutil.rmtree(path)
    assert complete_checkpoints(moved / "checkpoints")
    assert pool.run(lora_config(work, "moved", {"pp": 2}, dropout=0.0), ranks=2, log=work / "b.log") == [0, 0]
    ours, theirs = rows(moved), rows(run)
    assert ours.keys() == theirs.keys()
    for key, row in theirs.items():
        assert ours[key] == pytest.approx(row, rel=2e-5), key
    ours_out, theirs_out = (load_file(exported(path) / "adapter_model.safetensors") for path in (moved, run))
    assert ours_out.keys() == theirs_out.keys()
    for name, tensor in theirs_out.items():
        torch.testing.assert_close(ours_out[name], tensor, rtol=0, atol=2e-4)


def exported(run: Path) -> Path:
    out = run.parent / f"{run.name}_peft"
    if not out.exists():
        convert(open_checkpoint(run, adapters=True), out, Options(to="peft"))
    return out


def validation_loss(run: Path) -> float:
    return float([row for row in read_metrics(run / "metrics.jsonl") if row.get("event") == "validation"][-1]["loss"])


def test_peft_opens_what_was_trained(work: Path, whole: Path, tmp_path: Path) -> None:
    """Merged by peft, the model has the loss that the run measured under TP2; the base and a wrong alpha have not."""
    base = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, exported(whole))
    lora = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert {name.replace(".default", "") for name in lora} == load_file(
        exported(whole) / "adapter_model.safetensors"
    ).keys()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    found = evaluate(tmp_path / "merged", work / "held_out", "--seq-length", "64")
    assert found["loss"] == pytest.approx(validation_loss(whole), abs=1e-6)
    assert abs(evaluate(work / "model", work / "held_out", "--seq-length", "64")["loss"] - found["loss"]) > 1e-3


@pytest.mark.parametrize("of", ["run", "peft"])
def test_merged_it_is_the_model_that_peft_merges(work: Path, whole: Path, tmp_path: Path, of: str) -> None:
    source = whole if of == "run" else exported(whole)
    done = merge_lora.main([str(source), str(tmp_path / "ours"), "--json"], standalone_mode=False)
    assert not done
    base = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, exported(whole)).merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    tokens = torch.randint(0, ours.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-6)
        plain = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
        assert (ours(tokens).logits - plain(tokens).logits).abs().max() > 1e-3  # negative control
    receipt = json.loads((tmp_path / "ours" / "conversion.json").read_text())
    assert sum(bool(tensor["adapter_rank"]) for tensor in receipt["tensors"]) == 7 * ours.config.num_hidden_layers


def test_adapters_are_not_merged_into_another_base(work: Path, whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(work / "model", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CptError, match=r"is not the model that .* was trained on: weights \(sha256\)"):
        merge_lora.main([str(whole), str(tmp_path / "out"), "--base-model", str(other)], standalone_mode=False)
    with pytest.raises(CptError, match="holds a whole model"):
        merge_lora.main([str(work / "model"), str(tmp_path / "out")], standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_the_receipt_names_the_adapters(whole: Path) -> None:
    receipt = json.loads((exported(whole) / "conversion.json").read_text())
    assert (receipt["target"]["format"], receipt["adapters"]["rank"]) == ("peft", 4)
    card = (exported(whole) / "README.md").read_text()
    assert "library_name: peft" in card and "| LoRA rank | 4 |" in card


@pytest.mark.parametrize("target", ["torch_dist", "legacy"])
def test_adapters_become_no_megatron_checkpoint(whole: Path, target: Format, tmp_path: Path) -> None:
    with pytest.raises(CptError, match="holds adapters of rank 4 alone"):
        convert(open_checkpoint(whole, adapters=True), tmp_path / "out", Options(to=target))
    assert not list(tmp_path.iterdir())


def test_a_whole_model_is_no_adapter(work: Path, tmp_path: Path) -> None:
    with pytest.raises(CptError, match="holds a whole model"):
        convert(open_checkpoint(work / "model"), tmp_path / "out", Options(to="peft"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 8}, "lora.rank: 4 -> 8"),
        ({"alpha": 16.0}, "lora.alpha: 8.0 -> 16.0"),
        ({"targets": ["q_proj"]}, "lora.targets"),
        ({"rslora": True}, "lora.rslora: false -> true"),
    ],
)
@pytest.mark.parametrize("accepted", [[], ["--accept-changes"]])
def test_other_adapters_are_no_continuation(
    pool: RankPool, work: Path, whole: Path, change: dict[str, Any], said: str, accepted: list[str]
) -> None:
    config = lora_config(work, "whole", {"tp": 2}, **change)
    log = work / "refused.log"
    assert pool.run(config, *accepted, ranks=2, log=log) != [0, 0]
    assert said in log.read_text() and "Traceback" not in log.read_text()


def test_another_base_is_no_continuation(pool: RankPool, work: Path, whole: Path) -> None:
    other = work / "other_model"
    shutil.copytree(work / "model", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    config = lora_config(work, "whole", {"tp": 2})
    tree = yaml.safe_load(config.read_text())
    tree["model"]["init_from"] = str(other)
    config.write_text(yaml.safe_dump(tree))
    log = work / "other.log"
    assert pool.run(config, "--accept-changes", ranks=2, log=log) != [0, 0]
    assert "weights (sha256)" in log.read_text()


def test_adapters_are_no_model(whole: Path) -> None:
    with pytest.raises(CheckpointError, match="holds adapters of rank 4 alone"):
        resolve_origin(str(whole))
    with pytest.raises(CptError, match="holds adapters of rank 4 alone"):
        open_checkpoint(whole)
