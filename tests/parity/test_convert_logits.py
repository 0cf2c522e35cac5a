"""Converted weights compute what `transformers` computes: every family, tied and untied, with negative controls."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

from tiny_models import MODELS, save_tiny_model

from checkpoint_convert.convert import Options, convert
from checkpoint_convert.forward import StreamedModel
from checkpoint_convert.open import open_checkpoint
from checkpoint_convert.rows import Files
from checkpoint_convert.verify import compare_logits
from megatron_cpt.architecture import tensors as mapping_module
from megatron_cpt.architecture.tensors import RowSpan

TOLERANCE = 1e-5
NAMES = [name for name in MODELS if not name.startswith(("deep", "reference"))]
TOKENS = torch.arange(48).reshape(2, 24) * 7 % 500


@torch.no_grad()
def reference(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()(TOKENS).logits


@torch.no_grad()
def streamed(folder: Path) -> torch.Tensor:
    with Files() as files:
        return StreamedModel(open_checkpoint(folder), files).logits(TOKENS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in NAMES:
        save_tiny_model(name, folder)
    return folder


def test_every_family_is_there() -> None:
    assert {MODELS[name][0] for name in NAMES} == {"qwen2", "qwen3", "llama", "mistral"}
    assert len(NAMES) >= 10


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_keeps_the_logits(models: Path, tmp_path: Path, name: str) -> None:
    """HF -> torch_dist -> legacy -> HF; the streamed forward pass agrees with transformers on each of them."""
    source = models / name
    convert(open_checkpoint(source), tmp_path / "td", Options(to="torch_dist"))
    convert(open_checkpoint(tmp_path / "td"), tmp_path / "legacy", Options(to="legacy", pp=2))
    convert(open_checkpoint(tmp_path / "legacy"), tmp_path / "hf", Options(to="hf", max_shard_bytes=100_000))
    want = reference(source)
    assert torch.equal(reference(tmp_path / "hf"), want)  # opens with from_pretrained, bit for bit the same
    for folder in (source, tmp_path / "td", tmp_path / "legacy", tmp_path / "hf"):
        assert (streamed(folder) - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["qwen3", "llama_tied"])
def test_gammas_stored_minus_one_give_the_same_logits(models: Path, tmp_path: Path, name: str) -> None:
    """There and back through Megatron-LM's --apply-layernorm-1p; not knowing of it gives another model."""
    source = models / name
    convert(open_checkpoint(source), tmp_path / "td", Options(to="torch_dist", gammas_less_one=True))
    convert(open_checkpoint(tmp_path / "td"), tmp_path / "hf", Options(to="hf"))
    want = reference(source)
    assert (reference(tmp_path / "hf") - want).abs().max() <= TOLERANCE
    assert (streamed(tmp_path / "td") - want).abs().max() <= TOLERANCE
    found = compare_logits(open_checkpoint(source), open_checkpoint(tmp_path / "td"))
    assert found["max_relative_difference"] <= TOLERANCE
    common = tmp_path / "td" / "common.pt"
    state = torch.load(common, weights_only=False)
    state["args"].apply_layernorm_1p = False
    torch.save(state, common)
    (tmp_path / "td" / "conversion.json").unlink()
    assert (streamed(tmp_path / "td") - want).abs().max() > 100 * TOLERANCE


def _plain_qkv(m, arch, tp=1, rank=0, padded_vocab=None):  # type: ignore[no-untyped-def]
    """q, k, v one below the other: the mistake that a converter without interleaving makes."""
    row, out = 0, []
    for name, shape in mapping_module.hf_shapes(m, arch).items():
        out.append(RowSpan(name, 0, row, shape[0], slice(None)))
        row += shape[0]
    return out


def _swapped_gate(m, arch, tp=1, rank=0, padded_vocab=None):  # type: ignore[no-untyped-def]
    half = m.shape[0] // 2
    return [RowSpan(name, 0, i * half, half, slice(None)) for i, name in enumerate(reversed(m.hf))]


@pytest.mark.parametrize(("kind", "mistake"), [("qkv", _plain_qkv), ("gated", _swapped_gate)])
def test_a_wrong_arrangement_is_noticed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mistake: object
) -> None:
    """The writer makes the mistake, the reader does not: the logits must tell."""
    from checkpoint_convert import legacy

    right = mapping_module.row_spans

    def wrong(m, *args, **kwargs):  # type: ignore[no-untyped-def]
        return mistake(m, *args, **kwargs) if m.kind == kind else right(m, *args, **kwargs)  # type: ignore[operator]

    source = models / "qwen2"
    with monkeypatch.context() as context:
        context.setattr(legacy, "row_spans", wrong)
        convert(open_checkpoint(source), tmp_path / "wrong", Options(to="legacy"))
    assert (streamed(tmp_path / "wrong") - reference(source)).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("fact", ["rope_theta", "rms_norm_eps"])
def test_a_wrong_fact_is_noticed(models: Path, tmp_path: Path, fact: str) -> None:
    source = models / "qwen2"
    convert(open_checkpoint(source), tmp_path / "hf", Options(to="hf"))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    if fact == "rope_theta":
        config["rope_parameters"]["rope_theta"] = 1e4
    else:
        config["rms_norm_eps"] = 1e-2
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert (streamed(tmp_path / "hf") - reference(source)).abs().max() > 10 * TOLERANCE


def test_blockwise_comparison_agrees_with_whole_logits(models: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """`verify` never holds all logits; its perplexity and difference are those of the whole."""
    from checkpoint_convert import forward, verify

    monkeypatch.setattr(forward, "BLOCK_BYTES", 64 * 4 * 50)  # 50 rows of the vocabulary
    a, b = models / "llama2", tmp_path / "b"
    convert(open_checkpoint(a), b, Options(to="hf"))
    tensors = load_file(b / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 1.5
    save_file(tensors, b / "model.safetensors", {"format": "pt"})
    found = compare_logits(open_checkpoint(a), open_checkpoint(b))
    tokens = verify.fixed_tokens(open_checkpoint(a))
    with torch.no_grad():
        whole = [AutoModelForCausalLM.from_pretrained(path)(tokens, labels=tokens) for path in (a, b)]
    assert found["max_difference"] == pytest.approx(float((whole[0].logits - whole[1].logits).abs().max()), abs=1e-5)
    assert found["perplexity_a"] == pytest.approx(float(whole[0].loss.exp()), rel=1e-5)
    assert found["perplexity_b"] == pytest.approx(float(whole[1].loss.exp()), rel=1e-5)
