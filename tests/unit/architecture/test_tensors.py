"""Row arithmetic: every element of every tensor lands once, under any tensor parallel size and vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families import FAMILIES, architecture_from_config
from megatron_cpt.architecture.tensors import hf_shapes, megatron_tensors, row_spans, slice_shape
from megatron_cpt.errors import ConversionError
from tests.unit.convert.tiny_checkpoints import config


def arch_of(family: str = "qwen2", **changes: object) -> Architecture:
    return architecture_from_config(config(family, **changes))


def numbered(arch: Architecture) -> dict[str, np.ndarray]:
    """Hugging Face tensors whose elements are all different and not zero."""
    tensors, start = {}, 1
    for tensor in megatron_tensors(arch):
        for name, shape in hf_shapes(tensor, arch).items():
            count = int(np.prod(shape))
            tensors[name] = np.arange(start, start + count).reshape(shape)
            start += count
    return tensors


def slices(arch: Architecture, hf: dict[str, np.ndarray], tp: int) -> dict[str, list[np.ndarray]]:
    padded = arch.padded_vocab_size(tp)
    out: dict[str, list[np.ndarray]] = {}
    for tensor in megatron_tensors(arch):
        out[tensor.megatron] = []
        for rank in range(tp):
            part = np.zeros(slice_shape(tensor, arch, tp, padded), dtype=np.int64)
            for s in row_spans(tensor, arch, tp, rank, padded):
                part[s.row : s.row + s.rows] = hf[s.hf_name][s.hf_row : s.hf_row + s.rows][..., s.columns]
            out[tensor.megatron].append(part)
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_slices_hold_each_element_once(family: str, tp: int, tied: bool) -> None:
    arch = arch_of(family, tie_word_embeddings=tied)
    hf = numbered(arch)
    found = slices(arch, hf, tp)
    elements: list[np.ndarray] = []
    for tensor in megatron_tensors(arch):
        parts = found[tensor.megatron] if tensor.split_dim is not None else found[tensor.megatron][:1]
        assert tensor.split_dim is not None or all(np.array_equal(parts[0], p) for p in found[tensor.megatron])
        elements += [part[part != 0] for part in parts]
    got, want = np.sort(np.concatenate(elements)), np.sort(np.concatenate([t.ravel() for t in hf.values()]))
    assert np.array_equal(got, want)
    assert len(want) == arch.num_parameters


def test_qkv_is_interleaved_by_group_and_differs_from_plain_concatenation() -> None:
    arch = arch_of("qwen2", num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    hf = numbered(arch)
    tensor = next(tensor for tensor in megatron_tensors(arch) if tensor.kind == "qkv")
    fused = slices(arch, hf, 1)[tensor.megatron][0]
    q, k, v = (hf[name] for name in tensor.hf)
    want = np.concatenate([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]])
    assert np.array_equal(fused, want)
    assert not np.array_equal(fused, np.concatenate([q, k, v]))


def test_gated_slice_is_gate_above_up_on_each_rank() -> None:
    arch = arch_of()
    hf = numbered(arch)
    tensor = next(tensor for tensor in megatron_tensors(arch) if tensor.kind == "gated")
    gate, up = (hf[name] for name in tensor.hf)
    second = slices(arch, hf, 2)[tensor.megatron][1]
    assert np.array_equal(second, np.concatenate([gate[24:], up[24:]]))
    assert not np.array_equal(second, np.concatenate([gate, up])[48:])


@settings(max_examples=60, deadline=None)
@given(vocab=st.integers(1, 3000), tp=st.sampled_from([1, 2, 4, 8]))
def test_vocabulary_padding_is_added_and_stripped(vocab: int, tp: int) -> None:
    arch = arch_of("llama", vocab_size=vocab, num_hidden_layers=1, hidden_size=8, head_dim=1)
    padded = arch.padded_vocab_size(tp)
    assert padded % tp == 0 and 0 <= padded - vocab < 128 * tp
    tensor = megatron_tensors(arch)[0]
    rows = [s for rank in range(tp) for s in row_spans(tensor, arch, tp, rank, padded)]
    covered = [row for s in rows for row in range(s.hf_row, s.hf_row + s.rows)]
    assert covered == list(range(vocab))
    assert slice_shape(tensor, arch, tp, padded)[0] * tp == padded


def test_more_ranks_than_key_value_heads_cut_the_same_rows_evenly() -> None:
    arch = arch_of(num_attention_heads=8, num_key_value_heads=2)
    hf = numbered(arch)
    tensor = next(tensor for tensor in megatron_tensors(arch) if tensor.kind == "qkv")
    whole, parts = slices(arch, hf, 1)[tensor.megatron][0], slices(arch, hf, 4)[tensor.megatron]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    ("changes", "tp", "words"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2, "3 key/value heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 30}, 4, "6 attention heads"),
        ({"intermediate_size": 50}, 4, "ffn rows"),
    ],
)
def test_tp_that_does_not_divide_is_refused(changes: dict[str, int], tp: int, words: str) -> None:
    arch = arch_of(**changes)
    with pytest.raises(ConversionError, match=words):
        [slice_shape(tensor, arch, tp) for tensor in megatron_tensors(arch)]
