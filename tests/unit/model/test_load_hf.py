"""Weights from Hugging Face: set once, complete, and one clear error when something is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_convert.open import open_checkpoint
from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.architecture.tensors import RowSpan
from megatron_cpt.errors import CheckpointError
from megatron_cpt.model import load_hf
from megatron_cpt.model.build import build_model
from megatron_cpt.model.load_hf import load_hf_weights, random_weights
from tests.parity.tiny_models import save_tiny_model
from tests.unit.model.conftest import make_config


def load(folder: Path) -> torch.nn.Module:
    arch = read_architecture(folder)
    chunks = build_model(make_config(folder), arch)
    load_hf_weights(chunks, folder, arch)
    return chunks[0]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return save_tiny_model("base", tmp_path)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace (or, with None, remove) tensors of a model directory; `__` stands for a dot."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, tensor in tensors.items():
        key = name.replace("__", ".")
        weights.pop(key, None)
        if tensor is not None:
            weights[key] = tensor
    save_file(weights, path, metadata={"format": "pt"})


def test_every_parameter_is_set(model_dir: Path) -> None:
    model = load(model_dir)
    assert sum(p.numel() for p in model.parameters()) == read_architecture(model_dir).num_parameters
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_missing_tensor(model_dir: Path) -> None:
    change(model_dir, model__norm__weight=None)
    with pytest.raises(CheckpointError, match=r"missing: model\.norm\.weight"):
        load(model_dir)


def test_surplus_tensor(model_dir: Path) -> None:
    change(model_dir, model__layers__9__extra=torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"not mapped: model\.layers\.9\.extra"):
        load(model_dir)


def test_wrong_shape(model_dir: Path) -> None:
    change(model_dir, model__norm__weight=torch.zeros(7))
    with pytest.raises(CheckpointError, match=r"has shape \(7,\)"):
        load(model_dir)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(model_dir: Path, value: float) -> None:
    bad = torch.ones(32)
    bad[5] = value
    change(model_dir, model__norm__weight=bad)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds NaN or infinite"):
        load(model_dir)


def test_quantised_weight(model_dir: Path) -> None:
    change(model_dir, model__layers__3__mlp__up_proj__weight=torch.ones(64, 32, dtype=torch.int8))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is stored as I8"):
        load(model_dir)


def test_a_tied_output_layer_that_differs(tmp_path: Path) -> None:
    """Some tools store the tied copy; a copy that differs means that the flag or the weights are wrong."""
    folder = save_tiny_model("base_tied", tmp_path)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, lm_head__weight=embedding.clone())
    load(folder)
    embedding[-1, -1] += 0.5
    change(folder, lm_head__weight=embedding)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings, but lm_head\.weight differs"):
        load(folder)
    change(folder, lm_head__weight=embedding[:-1].contiguous())
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \(511, 32\)"):
        load(folder)


@pytest.mark.parametrize("kept_bytes", [4, 200, 20_000])
def test_truncated_file(model_dir: Path, kept_bytes: int) -> None:
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(CheckpointError, match="truncated"):
        load(model_dir)


def test_missing_shard(model_dir: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    (model_dir / "model.safetensors").rename(model_dir / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"not there: model-00002-of-00002\.safetensors"):
        load(model_dir)


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"weight_map": {"a": null}}'])
def test_broken_index(model_dir: Path, content: str) -> None:
    (model_dir / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="index"):
        load(model_dir)


def test_no_weights_at_all(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        load(model_dir)


def forget(monkeypatch: pytest.MonkeyPatch, change_last: Callable[[RowSpan], RowSpan]) -> None:
    """Let the loader use other rows than the model's rules say, for the last source of each tensor."""
    original = load_hf.row_spans

    def wrong(*args: Any) -> list[RowSpan]:
        *head, last = original(*args)
        return [*head, change_last(last)]

    monkeypatch.setattr(load_hf, "row_spans", wrong)


def test_rows_left_unset_are_found_and_all_named(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that forgets the last rows of a tensor does not get away with it, padded vocabulary or not."""
    forget(monkeypatch, lambda span: dataclasses.replace(span, rows=span.rows - 1))
    with pytest.raises(CheckpointError) as caught:
        load(model_dir)
    assert "embedding.word_embeddings.weight: 511 of 512 rows were set" in caught.value.message
    assert "decoder.layers.0.mlp.linear_fc1.weight: 127 of 128 rows were set" in caught.value.message
    assert "more)" in caught.value.message and caught.value.hint


def test_rows_set_twice_are_found(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch, lambda span: dataclasses.replace(span, row=max(span.row - 1, 0)))
    with pytest.raises(CheckpointError, match=r"linear_fc1\.weight: rows from 63 are set twice"):
        load(model_dir)


UNDER_O = """
import dataclasses, sys
from pathlib import Path
assert False, "python -O leaves asserts out"
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu
adapt_megatron_core_to_cpu()
from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.errors import CheckpointError
from megatron_cpt.model import load_hf
from megatron_cpt.model.build import build_model
from megatron_cpt.runtime.distributed import init_runtime
from tests.unit.model.conftest import make_config

folder = Path(sys.argv[1])
config, arch = make_config(folder), read_architecture(folder)
init_runtime(config)
chunks = build_model(config, arch)
load_hf.load_hf_weights(chunks, folder, arch)
right = load_hf.row_spans
load_hf.row_spans = lambda *args: [*right(*args)[:-1], dataclasses.replace(right(*args)[-1], rows=1)]
try:
    load_hf.load_hf_weights(chunks, folder, arch)
except CheckpointError as error:
    print(error.message)
"""


def test_the_proof_holds_under_python_o(model_dir: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-O", "-W", "ignore", "-c", UNDER_O, str(model_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 of 512 rows were set" in done.stdout


@pytest.mark.parametrize("layout", ["weights.safetensors", "shards", "model+consolidated", "pytorch_model.bin"])
def test_a_folder_that_converts_also_trains(model_dir: Path, layout: str) -> None:
    """The trainer and the converter list a folder by one rule, and read the same values."""
    path = model_dir / "model.safetensors"
    weights = load_file(path)
    expected = [p.detach().clone() for p in load(model_dir).parameters()]
    if layout == "weights.safetensors":
        path.rename(model_dir / layout)
    elif layout == "model+consolidated":
        save_file({"layers.0.attention.wq.weight": torch.zeros(3)}, model_dir / "consolidated.safetensors")
    elif layout == "pytorch_model.bin":
        path.unlink()
        torch.save(weights, model_dir / layout)
    else:
        path.unlink()
        names = list(weights)
        parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
        for file, held in parts.items():
            save_file({name: weights[name] for name in held}, model_dir / file)
        index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
        (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    open_checkpoint(model_dir)
    assert all(torch.equal(a, b) for a, b in zip(load(model_dir).parameters(), expected, strict=True))


def test_random_weights_depend_on_seed_and_name_only(model_dir: Path) -> None:
    arch = read_architecture(model_dir)
    models = []
    for seed in (1, 1, 2):
        chunks = build_model(make_config(), arch)
        random_weights(chunks, arch, seed)
        models.append(chunks[0])
    first, again, other = ([p.detach() for p in model.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert 0.015 < first[0].std() < 0.025


MEASURE = """
import re, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from megatron_cpt.runtime.distributed import init_runtime
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu
adapt_megatron_core_to_cpu()
from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.model.build import build_model
from megatron_cpt.model.load_hf import load_hf_weights
from tests.unit.model.conftest import make_config

def anonymous_kib():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder = Path(sys.argv[1])
config, arch = make_config(folder), read_architecture(folder)
init_runtime(config)
warm = build_model(config, arch)
del warm
chunks = build_model(config, arch)
before, peak, done = anonymous_kib(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous_kib())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
load_hf_weights(chunks, folder, arch)
done = True
thread.join()
print(peak - before, sum(p.numel() * 4 for p in chunks[0].parameters()) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_peak_memory_is_the_parameters_and_a_few_blocks(tmp_path: Path) -> None:
    """The whole state dict is never in memory: at most the parameters and a few blocks of rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=8, vocab_size=8192, tie_word_embeddings=True,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed blocks leave at once: what malloc keeps is not the load's
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    added_kib, parameters_kib = map(int, done.stdout.split()[-2:])
    assert parameters_kib > 140_000
    assert added_kib <= parameters_kib + 10_000
