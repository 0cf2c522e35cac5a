"""Perplexity against a loss computed token by token, and against transformers on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_cpt.errors import CptError, DataError
from megatron_cpt.eval.hf_model import open_hf_model
from megatron_cpt.eval.perplexity import TokenStream, perplexity, predicted_ranges
from megatron_cpt.eval.token_stream import open_token_stream, text_bytes

VOCAB = 261  # of the model in conftest.py
SEQ_LENGTH = 8


def _stream(length: int = 61, seed: int = 0) -> TokenStream:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.uint16)
    return TokenStream("test", tokens, np.array([9, 30, length]), 0)


class Constant:
    """A scorer that finds every token equally unlikely."""

    def __init__(self, nats: float) -> None:
        self.nats = nats

    def nll(self, tokens: torch.Tensor, document_ids: torch.Tensor | None = None) -> torch.Tensor:
        return torch.full(tokens[:, 1:].shape, self.nats)


def _brute_force_loss(model_dir: Path, stream: TokenStream) -> float:
    """One forward pass per predicted token: the definition, written out."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    nats = []
    for target in range(1, len(stream.tokens)):
        begin = (target - 1) // SEQ_LENGTH * SEQ_LENGTH
        context = torch.from_numpy(stream.tokens[begin:target].astype(np.int64))[None]
        with torch.no_grad():
            log_probabilities = model(context).logits[0, -1].double().log_softmax(-1)
        nats.append(-log_probabilities[int(stream.tokens[target])].item())
    return sum(nats) / len(nats)


def test_equals_brute_force_with_a_short_last_block(model_dir: Path) -> None:
    stream = _stream()
    assert (len(stream.tokens) - 1) % SEQ_LENGTH != 0  # else the last block would not be tested
    scorer = open_hf_model(model_dir)
    result = perplexity(scorer, stream, SEQ_LENGTH)
    assert result.loss == pytest.approx(_brute_force_loss(model_dir, stream), abs=1e-6)
    assert result.tokens == len(stream.tokens) - 1
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    # negative control: another token order, and blocks of another length, are far outside that tolerance
    other = perplexity(scorer, TokenStream("r", stream.tokens[::-1], stream.document_ends, 0), SEQ_LENGTH)
    longer = perplexity(scorer, stream, 2 * SEQ_LENGTH)
    assert abs(other.loss - result.loss) > 1e-3
    assert abs(longer.loss - result.loss) > 1e-3


@pytest.mark.parametrize("length", [2, 8, 9, 10, 17, 2500])
@pytest.mark.parametrize("seq_length", [1, 8, 1024])
def test_every_token_but_the_first_is_predicted_once(length: int, seq_length: int) -> None:
    stream = TokenStream("count", np.arange(length), np.array([length]), 0)
    seen: list[int] = []

    class Labels:
        def nll(self, tokens: torch.Tensor, document_ids: torch.Tensor | None = None) -> torch.Tensor:
            assert torch.equal(tokens[:, :-1] + 1, tokens[:, 1:])
            assert tokens.shape[1] <= seq_length + 1 and document_ids is None
            seen.extend(tokens[:, 1:].flatten().tolist())
            return tokens[:, 1:].float()

    result = perplexity(Labels(), stream, seq_length)
    assert seen == list(range(1, length))
    assert result.loss == pytest.approx(sum(seen) / len(seen))  # weighted by tokens, not by blocks


def test_documents_change_after_each_end_of_document() -> None:
    stream = TokenStream("documents", np.array([5, 0, 5, 6, 0, 7, 8, 0]), np.array([2, 5, 8]), eod_id=0)
    seen: list[list[int]] = []

    class Documents(Constant):
        def nll(self, tokens: torch.Tensor, document_ids: torch.Tensor | None = None) -> torch.Tensor:
            assert document_ids is not None
            seen.extend(document_ids.tolist())
            return super().nll(tokens)

    perplexity(Documents(1.0), stream, 6, document_attention=True)
    assert seen == [[0, 0, 1, 1, 1, 2], [0]]


def test_documents_without_eod_cannot_be_kept_apart() -> None:
    stream = TokenStream("documents", np.array([5, 0, 5, 6, 7, 8]), np.array([2, 4, 6]), eod_id=0)
    assert perplexity(Constant(1.0), stream, 4).tokens == 5
    with pytest.raises(DataError, match="not all of documents have one"):
        perplexity(Constant(1.0), stream, 4, document_attention=True)


def test_a_token_is_scored_as_if_its_document_stood_alone(model_dir: Path) -> None:
    scorer = open_hf_model(model_dir)
    tokens = torch.tensor([[5, 9, 0, 7, 8, 11, 12]])
    apart = scorer.nll(tokens, torch.tensor([[0, 0, 0, 1, 1, 1]]))
    assert torch.allclose(apart[:, 3:], scorer.nll(tokens[:, 3:]), atol=1e-6)
    assert not torch.allclose(scorer.nll(tokens)[:, 3:], scorer.nll(tokens[:, 3:]), atol=1e-3)


@pytest.mark.parametrize(("max_tokens", "documents"), [(5, 1), (8, 1), (9, 2), (29, 2), (30, 3), (10_000, 3)])
def test_max_tokens_limits_tokens_and_documents(max_tokens: int, documents: int) -> None:
    result = perplexity(Constant(1.0), _stream(), SEQ_LENGTH, max_tokens)
    assert (result.tokens, result.documents) == (min(60, max_tokens), documents)


def test_loss_above_twenty_is_not_capped() -> None:
    result = perplexity(Constant(25.0), _stream(), SEQ_LENGTH)
    assert result.perplexity == pytest.approx(math.exp(25.0))


def test_progress_ends_at_the_total() -> None:
    reports: list[tuple[int, int]] = []
    perplexity(Constant(0.0), _stream(2500), SEQ_LENGTH, on_tokens=lambda d, n: reports.append((d, n)))
    assert reports[-1] == (2499, 2499)
    assert len(reports) > 1


def test_nothing_to_predict_is_a_user_error() -> None:
    with pytest.raises(DataError, match="1 token"):
        perplexity(Constant(0.0), TokenStream("one", np.array([3]), np.array([1]), 0), SEQ_LENGTH)


def test_nan_is_an_error() -> None:
    with pytest.raises(CptError, match="nan"):
        perplexity(Constant(float("nan")), _stream(), SEQ_LENGTH)


def _strided_reference(model_dir: Path, tokens: np.ndarray, window: int, stride: int) -> tuple[float, int]:
    """The usual loop over overlapping windows, with transformers: mean loss, and how many tokens it counted."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    ids = torch.from_numpy(tokens.astype(np.int64))
    nats, counted, before = 0.0, 0, 1
    for begin in range(0, len(ids) - 1, stride):
        end = min(begin + window + 1, len(ids))
        if end <= before:
            break
        with torch.no_grad():
            log_probabilities = model(ids[None, begin : end - 1]).logits[0].double().log_softmax(-1)
        for place in range(max(before, begin + 1), end):
            nats -= log_probabilities[place - begin - 1, ids[place]].item()
            counted += 1
        before = end
    return nats / counted, counted


@pytest.mark.parametrize(("window", "stride"), [(8, 1), (8, 3), (8, 7), (8, 8), (16, 4), (60, 10), (64, 5)])
def test_strided_windows_equal_the_usual_loop_and_count_each_token_once(
    model_dir: Path, window: int, stride: int
) -> None:
    stream = _stream()
    result = perplexity(open_hf_model(model_dir), stream, window, stride=stride)
    loss, counted = _strided_reference(model_dir, stream.tokens, window, stride)
    assert (result.tokens, counted) == (60, 60)
    assert result.loss == pytest.approx(loss, abs=1e-5)
    if stride < window < 60:  # negative control: the plain cut is another number
        assert abs(perplexity(open_hf_model(model_dir), stream, window).loss - loss) > 1e-4


@pytest.mark.parametrize("max_tokens", [1, 7, 8, 9, 30, 59, 60, 500])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_a_limit_counts_exactly_so_many(max_tokens: int, stride: int) -> None:
    result = perplexity(Constant(2.0), _stream(), SEQ_LENGTH, max_tokens, stride=stride)
    assert result.tokens == min(max_tokens, 60)
    assert result.nats == pytest.approx(2.0 * result.tokens)


def test_a_stride_as_long_as_the_window_is_today_s_number_to_the_bit(model_dir: Path) -> None:
    scorer = open_hf_model(model_dir)
    assert perplexity(scorer, _stream(), 8, stride=8) == perplexity(scorer, _stream(), 8)


def test_by_document_each_begins_anew(model_dir: Path) -> None:
    stream, scorer = _stream(), open_hf_model(model_dir)
    result = perplexity(scorer, stream, 64, per_document=True)
    parts = [stream.tokens[:9], stream.tokens[9:30], stream.tokens[30:]]
    losses = [_strided_reference(model_dir, part, 64, 64) for part in parts]
    assert result.tokens == 58 and result.documents == 3
    assert result.nats == pytest.approx(sum(loss * count for loss, count in losses), abs=1e-4)
    assert predicted_ranges(stream, None, per_document=True) == [(1, 9), (10, 30), (31, 61)]
    assert predicted_ranges(stream, 10, per_document=True) == [(1, 9), (10, 12)]


@pytest.mark.parametrize("stride", [0, 9, -1])
def test_a_stride_that_leaves_out_tokens_is_refused(stride: int) -> None:
    with pytest.raises(DataError, match="each token once"):
        perplexity(Constant(1.0), _stream(), SEQ_LENGTH, stride=stride)


def test_bits_per_byte_are_the_nats_over_the_bytes(model_dir: Path, tmp_path: Path) -> None:
    text = "naïve café 日本 " * 20
    (tmp_path / "a.txt").write_text(text)
    stream = open_token_stream(str(tmp_path / "a.txt"), model_dir, VOCAB)
    size = text_bytes(stream, [(0, len(stream.tokens))], model_dir)
    assert size == len(text.strip().encode()) or size == len(text.encode())
    result = perplexity(Constant(math.log(2)), stream, 8)
    assert result.bits_per_byte(size) == pytest.approx(result.tokens / size)
    assert result.bits_per_byte(0) is None
