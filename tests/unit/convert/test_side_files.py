"""What travels with the weights: all that a client may read, the ends of documents, the umask, the model card."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_convert.convert import Options, convert
from checkpoint_convert.open import open_checkpoint
from checkpoint_convert.side_files import has_tokenizer, target_config
from checkpoint_convert.verify import verify
from megatron_cpt.architecture.model_folder import side_files
from megatron_cpt.runs.task_results import Estimate, TaskResults, TaskRow, task_results_path, write_task_results
from tests.tiny_runs import step
from tests.unit.convert.tiny_checkpoints import mark_complete, write_hf


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_everything_beside_the_weights_travels_to_megatron_and_back(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "llama")
    travels = ["additional_chat_templates/tool_use.jinja", "chat_template.jinja", "tekken.json", "USE_POLICY.md"]
    travels += ["preprocessor_config.json", "tokenization_custom.py", "a/b/c.json"]
    stays = [
        "pytorch_model.bin",
        "model.gguf",
        "onnx/model.onnx",
        "onnx/config.json",
        ".cache/x.json",
        ".gitattributes",
    ]
    stays += [
        "__pycache__/x.pyc",
        "pytorch_model.bin.index.json",
        "original/params.json",
        "original/consolidated.00.pth",
    ]
    write(source, *travels, *stays)
    save_file({"x": torch.ones(2)}, source / "consolidated.safetensors")
    convert(open_checkpoint(source), tmp_path / "td", Options(to="torch_dist"))
    receipt = convert(open_checkpoint(tmp_path / "td"), tmp_path / "back", Options(to="hf"))
    out = tmp_path / "back"
    assert [name for name in travels if not (out / name).is_file()] == []
    assert [name for name in stays if (out / name).exists()] == []
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert sorted(receipt["side_files"]) == sorted(set(written) - {"model.safetensors", "conversion.json"})


def test_a_model_whose_only_tokenizer_is_tekken_has_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_hf(tmp_path / "hf", "llama")
    write(source, "tekken.json")
    convert(open_checkpoint(source), tmp_path / "out", Options(to="hf"))
    assert (tmp_path / "out" / "tekken.json").is_file() and "no tokenizer" not in caplog.text
    assert not has_tokenizer(["config.json"])


def run_of(tmp_path: Path, **model: Any) -> Path:
    """A run's folder with one checkpoint, trained on two datasets that end documents with tokens 5 and 2."""
    run, prefixes = tmp_path / "run", []
    for name, end in (("a", 5), ("b", 2)):
        prefixes.append({"name": name, "prefix": str(tmp_path / name), "weight": 1.0})
        manifest = {"append_eod": True, "tokenizer": {"eod_id": end}}
        (tmp_path / f"{name}.manifest.json").write_text(json.dumps(manifest))
    final = run / "checkpoints" / "iter_0000003"
    final.parent.mkdir(parents=True)
    convert(open_checkpoint(write_hf(tmp_path / "hf", "llama")), final, Options(to="torch_dist"))
    mark_complete(final.parent, 3)
    (run / "resolved.yaml").write_text(json.dumps({"job_name": "x", "model": model, "data": {"train": prefixes}}))
    return run


def generation(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "generation_config.json").read_text())
    return content


def test_an_export_stops_where_the_corpus_ends_its_documents(tmp_path: Path) -> None:
    run = run_of(tmp_path, init_from="base/model")
    convert(open_checkpoint(run), tmp_path / "out", Options(to="hf"))
    assert generation(tmp_path / "out") == {"eos_token_id": [2, 5]}
    side = run / "checkpoints" / "iter_0000003" / "hf"
    (side / "generation_config.json").unlink()
    config = json.loads((side / "config.json").read_text()) | {"eos_token_id": [3], "bos_token_id": 1}
    (side / "config.json").write_text(json.dumps(config))
    convert(open_checkpoint(run), tmp_path / "again", Options(to="hf"))
    assert generation(tmp_path / "again") == {"bos_token_id": 1, "eos_token_id": [3, 5, 2]}


def test_a_manifest_that_is_gone_is_said_and_nothing_is_invented(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(tmp_path, init_from="base/model")
    for name in "ab":
        (tmp_path / f"{name}.manifest.json").unlink()
    convert(open_checkpoint(run), tmp_path / "out", Options(to="hf"))
    assert generation(tmp_path / "out") == {"eos_token_id": 2}
    assert caplog.text.count("generation may not stop") == 2


def test_the_card_of_a_run_from_random_weights_names_no_base_model(tmp_path: Path) -> None:
    convert(open_checkpoint(run_of(tmp_path, init_from="random")), tmp_path / "out", Options(to="hf"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in card and "pre-training from random weights" in card and "continued" not in card


def test_the_card_carries_what_was_measured_of_these_weights_and_of_no_later_ones(tmp_path: Path) -> None:
    run = run_of(tmp_path, init_from="base/model")
    losses = ((0, 3.0), (3, 2.0), (9, 1.0))
    rows = [step(at, event="validation", name="domain", loss=loss) for at, loss in losses]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    low, high, change = Estimate(0.6, 0.46, 0.72), Estimate(0.76, 0.63, 0.86), Estimate(0.16, 0.01, 0.3)
    tested = TaskRow("terms", "acc", 50, True, True, high, low, change, 0.0386, "McNemar exact", "better", 3)
    later = replace(tested, task="other", iteration=9)
    write_task_results(task_results_path(run), TaskResults("m", "b", {}, (tested, later)))
    saved = run / "checkpoints" / "iter_0000003"
    shutil.copyfile(run / "resolved.yaml", saved / "resolved.yaml")  # as the trainer saves it with each checkpoint
    convert(open_checkpoint(run), tmp_path / "out", Options(to="hf"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| domain | 20.09 | 7.39 |" in card
    assert "| terms: acc | 50 | 0.600 [0.460, 0.720] | 0.760 [0.630, 0.860] | +0.160 [+0.010, +0.300] | better" in card
    assert "other" not in card


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
@pytest.mark.parametrize("to", ["hf", "torch_dist", "legacy"])
def test_permissions_of_everything_written_follow_the_umask(tmp_path: Path, umask: int, to: Any) -> None:
    source = write_hf(tmp_path / "hf", "llama")
    before = os.umask(umask)
    try:
        convert(open_checkpoint(source), tmp_path / "out", Options(to=to))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 4
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~umask)}


@pytest.mark.parametrize("window", [2, 16])
def test_models_with_a_short_window_can_be_compared(tmp_path: Path, window: int) -> None:
    source = write_hf(tmp_path / "hf", "mistral", sliding_window=window)
    convert(open_checkpoint(source), tmp_path / "td", Options(to="torch_dist"))
    result = verify(open_checkpoint(source), open_checkpoint(tmp_path / "td"))
    assert result["ok"] and result["logits"]["tokens"] == window


def test_the_written_dtype_stands_under_every_key_that_names_one() -> None:
    assert target_config({"dtype": "auto", "torch_dtype": "float32"}, "bfloat16", 9) == {
        "dtype": "bfloat16", "torch_dtype": "bfloat16", "vocab_size": 9,
    }  # fmt: skip
    assert target_config({}, "float16", 9) == {"torch_dtype": "float16", "vocab_size": 9}


def test_side_files_are_listed_in_order_and_relative(tmp_path: Path) -> None:
    write(tmp_path, "b.json", "a/x.txt", "model.safetensors")
    assert list(side_files(tmp_path)) == [Path("a/x.txt"), Path("b.json")]
