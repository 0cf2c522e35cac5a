"""Any format to any other and back, bit-exact: families, layouts, tied and untied, padded vocabulary."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_convert import stream
from checkpoint_convert.checkpoint import FORMATS, Format, MismatchError
from checkpoint_convert.convert import Options, convert
from checkpoint_convert.open import open_checkpoint
from checkpoint_convert.verify import verify
from megatron_cpt.architecture.families import FAMILIES
from megatron_cpt.errors import CheckpointError, ConversionError
from megatron_cpt.eval.model import load_scorer
from tests.unit.convert.tiny_checkpoints import assert_same_weights, hf_tensors, write_hf


def to(source: Path, target: Path, fmt: Format, **options: object) -> dict[str, object]:
    return convert(open_checkpoint(source), target, Options(to=fmt, workers=2, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_layout_round_trips(tmp_path: Path, family: str, tied: bool) -> None:
    source = write_hf(tmp_path / "hf", family, tie_word_embeddings=tied)
    layouts: list[tuple[Format, int, int]] = [("torch_dist", tp, 1) for tp in (1, 4)]  # it has no stages
    layouts += [("legacy", tp, pp) for tp, pp in [(1, 1), (2, 4), (8, 2)]]  # benchmarks/convert.py runs them all
    for fmt, tp, pp in layouts:
        there, back = tmp_path / f"{fmt}-{tp}-{pp}", tmp_path / f"back-{fmt}-{tp}-{pp}"
        receipt = to(source, there, fmt, tp=tp, pp=pp)
        assert receipt["padding_rows_added"] == (0 if (fmt, tp) == ("torch_dist", 1) else 128 * tp - 77)
        assert receipt["source"]["fingerprint"] == receipt["target"]["fingerprint"]
        back_receipt = to(there, back, "hf")
        assert back_receipt["padding_rows_removed"] == receipt["padding_rows_added"]
        assert_same_weights(source, back)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(FORMATS, FORMATS)))
def test_every_pair_of_formats(tmp_path: Path, first: Format, second: Format) -> None:
    source = write_hf(tmp_path / "hf")
    layout = {"hf": {}, "torch_dist": {"tp": 4}, "legacy": {"tp": 2, "pp": 2, "vpp": 2}}
    to(source, tmp_path / "a", first, **layout[first])
    to(tmp_path / "a", tmp_path / "b", second, **layout[second])
    to(tmp_path / "b", tmp_path / "c", "hf", read_back=True)
    assert_same_weights(source, tmp_path / "c")


def test_virtual_pipeline_and_local_names(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", "qwen3", num_hidden_layers=8, tie_word_embeddings=True)
    to(source, tmp_path / "legacy", "legacy", tp=2, pp=2, vpp=4, local_names=True)
    path = tmp_path / "legacy" / "iter_0000001" / "mp_rank_00_001" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    assert [key for key in state if key.startswith("model")] == ["model0", "model1", "model2", "model3"]
    assert "decoder.layers.0.input_layernorm.weight" in state["model0"]
    assert "output_layer.weight" in state["model3"]  # the last stage's copy of the tied embedding
    # chunk 1 of stage 1 of 2 holds layer 3 of 8
    expected = hf_tensors(source)["model.layers.3.input_layernorm.weight"]
    assert torch.equal(state["model1"]["decoder.layers.0.input_layernorm.weight"], expected)
    to(tmp_path / "legacy", tmp_path / "back", "hf")
    assert_same_weights(source, tmp_path / "back")


def test_hf_output_is_complete(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", dtype=torch.float32)
    receipt = to(source, tmp_path / "out", "hf", dtype="bfloat16", max_shard_bytes=10_000)
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    wanted = {"config.json", "generation_config.json", "tokenizer_config.json", "README.md", "conversion.json"}
    assert wanted | {"model.safetensors.index.json"} <= names
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 3
    assert not any(name.startswith(".") for name in names)
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["vocab_size"] == 77
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = hf_tensors(out)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name, tensor in hf_tensors(source).items():
        assert torch.equal(tensors[name], tensor.to(torch.bfloat16))
    assert receipt["casts"] == len(tensors)
    assert receipt == json.loads((out / "conversion.json").read_text())


def test_pytorch_bin_is_read(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    tensors = hf_tensors(source)
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    names = sorted(tensors)
    halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in halves.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    to(folder, tmp_path / "out", "hf")
    assert_same_weights(source, tmp_path / "out")


def test_tied_model_that_also_stores_its_head(tmp_path: Path) -> None:
    from tests.unit.convert.tiny_checkpoints import change_tensors

    source = write_hf(tmp_path / "hf", tie_word_embeddings=True)
    embedding = hf_tensors(source)["model.embed_tokens.weight"]
    change_tensors(source, lm_head__weight=embedding.clone())
    receipt = to(source, tmp_path / "out", "hf")
    assert receipt["tied_or_replicated_copies_compared"] == 1
    assert "lm_head.weight" not in hf_tensors(tmp_path / "out")
    change_tensors(source, lm_head__weight=embedding + 1)
    with pytest.raises(MismatchError, match="different values"):
        to(source, tmp_path / "out2", "hf")
    assert not (tmp_path / "out2").exists()


@pytest.mark.parametrize(
    ("fmt", "options", "words"),
    [
        ("hf", {"tp": 2}, "no --tp"),
        ("torch_dist", {"vpp": 2}, "no --vpp"),
        ("torch_dist", {"tp": 3}, "do not divide"),
        ("legacy", {"pp": 3}, "do not divide"),
        ("legacy", {"pp": 2, "vpp": 4}, "do not divide"),
    ],
)
def test_layouts_that_cannot_be(tmp_path: Path, fmt: Format, options: dict[str, int], words: str) -> None:
    source = write_hf(tmp_path / "hf")
    with pytest.raises(ConversionError, match=words):
        to(source, tmp_path / "out", fmt, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_chunk_grid_that_no_job_could_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Qwen2-7B has 28 heads: TP8 cuts its rows evenly, but no rank could compute with 3.5 heads."""
    source = write_hf(tmp_path / "hf", num_attention_heads=14, num_key_value_heads=2, head_dim=8)
    to(source, tmp_path / "even", "torch_dist", tp=2)
    assert "tensor parallel" not in caplog.text
    receipt = to(source, tmp_path / "td", "torch_dist", tp=8, pp=4)
    assert caplog.text.count("divides the heads") == 1 and receipt["padding_rows_added"] == 1024 - 77
    to(tmp_path / "td", tmp_path / "back", "hf")
    assert_same_weights(source, tmp_path / "back")
    to(tmp_path / "td", tmp_path / "legacy", "legacy", tp=2)
    with pytest.raises(ConversionError, match="do not divide by tensor parallel size 8"):
        to(source, tmp_path / "no", "legacy", tp=8)


@pytest.mark.parametrize("fmt", FORMATS)
def test_memory_does_not_grow_with_the_model(tmp_path: Path, fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most three blocks per worker, and the plan, whatever the tensors' size."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 2**20)
    source = write_hf(tmp_path / "hf", "llama", vocab_size=150_001, hidden_size=64, head_dim=8)
    opened = open_checkpoint(source)
    assert max(tensor.nbytes for tensor in opened.weights.tensors.values()) > 18 * 2**20
    layout = {} if fmt == "hf" else {"tp": 2}
    tracemalloc.start()
    convert(opened, tmp_path / "out", Options(to=fmt, workers=2, **layout))  # type: ignore[arg-type]
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 2 * 2**20 <= peak_bytes < (2 * 3 + 2) * 2**20


@pytest.mark.parametrize(
    ("vocab_size", "tp", "multiple", "rows"),
    [(1003, 1, 128, 1024), (1003, 2, 64, 1024), (77, 2, 1, 78), (256, 2, 128, 256)],
)
def test_legacy_files_are_padded_as_megatron_lm_pads(
    tmp_path: Path, vocab_size: int, tp: int, multiple: int, rows: int
) -> None:
    """Megatron-LM rounds up to a multiple of --make-vocab-size-divisible-by times its tensor parallel size."""
    source = write_hf(tmp_path / "hf", "llama", vocab_size=vocab_size)
    receipt = to(source, tmp_path / "ckpt", "legacy", tp=tp, vocab_multiple=multiple)
    assert receipt["padding_rows_added"] == rows - vocab_size
    path = tmp_path / "ckpt" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    assert state["model"]["embedding.word_embeddings.weight"].shape[0] * tp == rows == state["args"].padded_vocab_size
    to(tmp_path / "ckpt", tmp_path / "back", "hf")
    assert_same_weights(source, tmp_path / "back")


def gammas(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in hf_tensors(folder).items() if name.endswith("norm.weight")}


@pytest.mark.parametrize("fmt", ["torch_dist", "legacy"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gammas_that_are_stored_minus_one_get_their_one_back(tmp_path: Path, fmt: Format, family: str) -> None:
    source = write_hf(tmp_path / "hf", family, dtype=torch.float32, scale=0.25)
    receipt: dict[str, Any] = to(source, tmp_path / "a", fmt, gammas_less_one=True, tp=2)
    assert receipt["gammas"]["target_less_one"] and "stored - 1 in fp32" in receipt["gammas"]["arithmetic"]
    assert receipt["gammas"]["elements"] == sum(tensor.numel() for tensor in gammas(source).values())
    other: Format = "legacy" if fmt == "torch_dist" else "torch_dist"
    kept: dict[str, Any] = to(
        tmp_path / "a", tmp_path / "b", other, gammas_less_one=True
    )  # from one to the other: no arithmetic
    assert kept["source"]["fingerprint"] == kept["target"]["fingerprint"] and "arithmetic" not in kept["gammas"]
    back: dict[str, Any] = to(tmp_path / "b", tmp_path / "back", "hf")
    assert back["gammas"]["source_less_one"] and "1 + stored in fp32" in back["gammas"]["arithmetic"]
    before, after = gammas(source), gammas(tmp_path / "back")
    assert len(before) == (17 if family == "qwen3" else 9) == receipt["gammas"]["tensors"]
    for name, gamma in before.items():
        assert torch.equal(after[name], 1 + (gamma - 1)), name  # in fp32, as Megatron-Core adds it
    others = [name for name in hf_tensors(source) if name not in before]
    assert all(torch.equal(hf_tensors(source)[name], hf_tensors(tmp_path / "back")[name]) for name in others)


def test_what_rounding_the_sum_costs_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_hf(tmp_path / "hf", "llama", dtype=torch.bfloat16, scale=0.01)
    to(source, tmp_path / "plain", "torch_dist")
    common = tmp_path / "plain" / "common.pt"
    state = torch.load(common, weights_only=False)
    state["args"].apply_layernorm_1p = True  # near 0 bf16 holds what it does not hold near 1
    torch.save(state, common)
    (tmp_path / "plain" / "conversion.json").unlink()
    rounded: dict[str, Any] = to(tmp_path / "plain", tmp_path / "bf16", "hf")
    exact: dict[str, Any] = to(tmp_path / "plain", tmp_path / "fp32", "hf", dtype="float32")
    for name, gamma in gammas(source).items():
        assert torch.equal(gammas(tmp_path / "fp32")[name], 1 + gamma.float())
        assert torch.equal(gammas(tmp_path / "bf16")[name], (1 + gamma.float()).bfloat16())
    wrong = sum(int((gammas(tmp_path / "bf16")[n].double() != 1 + g.double()).sum()) for n, g in gammas(source).items())
    assert rounded["gammas"]["rounded_elements"] == wrong > 0 and f"rounded_elements {wrong}" in caplog.text
    assert exact["gammas"]["rounded_elements"] == 0
    assert verify(open_checkpoint(tmp_path / "plain"), open_checkpoint(tmp_path / "bf16"))["ok"]
    assert not verify(open_checkpoint(tmp_path / "plain"), open_checkpoint(source), logits=False)["ok"]


def test_two_descriptions_that_disagree_on_gammas_are_refused(tmp_path: Path) -> None:
    to(write_hf(tmp_path / "hf", "llama"), tmp_path / "ckpt", "torch_dist")
    (tmp_path / "ckpt" / "run_config.yaml").write_text("model: {layernorm_zero_centered_gamma: true}")
    with pytest.raises(ConversionError, match="is said in two ways") as caught:
        open_checkpoint(tmp_path / "ckpt")
    assert "layernorm_zero_centered_gamma = True" in str(caught.value) and "apply_layernorm_1p = False" in str(
        caught.value
    )


def test_a_scorer_is_not_handed_gammas_less_one(tmp_path: Path) -> None:
    """Megatron-Core's norms of a CPU cannot add the 1."""
    to(write_hf(tmp_path / "hf", "llama"), tmp_path / "ckpt", "torch_dist", gammas_less_one=True)
    with pytest.raises(CheckpointError, match="norms stored minus 1") as caught:
        load_scorer(open_checkpoint(tmp_path / "ckpt"), 16)
    assert "--to hf" in str(caught.value.hint)
