"""Perplexity against a loss computed token by token, and against transformers on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_cpt.errors import CptError, DataError
from megatron_cpt.eval.hf_model import hf_scorer
from megatron_cpt.eval.perplexity import TokenStream, perplexity

VOCAB = 264  # of the model in conftest.py
SEQ_LENGTH = 8


def _stream(length: int = 61, seed: int = 0) -> TokenStream:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.uint16)
    return TokenStream("test", tokens, np.array([9, 30, length]))


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
    score = hf_scorer(model_dir)
    result = perplexity(score, stream, SEQ_LENGTH)
    assert result.loss == pytest.approx(_brute_force_loss(model_dir, stream), abs=1e-6)
    assert result.tokens == len(stream.tokens) - 1
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    # negative control: another token order, and blocks of another length, are far outside that tolerance
    other = perplexity(score, TokenStream("r", stream.tokens[::-1], stream.document_ends), SEQ_LENGTH)
    longer = perplexity(score, stream, 2 * SEQ_LENGTH)
    assert abs(other.loss - result.loss) > 1e-3
    assert abs(longer.loss - result.loss) > 1e-3


@pytest.mark.parametrize("length", [2, 8, 9, 10, 17, 2500])
@pytest.mark.parametrize("seq_length", [1, 8, 1024])
def test_every_token_but_the_first_is_predicted_once(length: int, seq_length: int) -> None:
    stream = TokenStream("count", np.arange(length), np.array([length]))
    seen: list[int] = []

    def score(inputs: torch.Tensor, labels: torch.Tensor) -> float:
        assert torch.equal(inputs + 1, labels)
        assert inputs.shape[1] <= seq_length
        seen.extend(labels.flatten().tolist())
        return float(labels.sum())

    result = perplexity(score, stream, seq_length)
    assert seen == list(range(1, length))
    assert result.loss == pytest.approx(sum(seen) / len(seen))  # weighted by tokens, not by blocks


@pytest.mark.parametrize(("max_tokens", "documents"), [(5, 1), (8, 1), (9, 2), (29, 2), (30, 3), (10_000, 3)])
def test_max_tokens_limits_tokens_and_documents(max_tokens: int, documents: int) -> None:
    result = perplexity(lambda inputs, labels: 1.0, _stream(), SEQ_LENGTH, max_tokens)
    assert (result.tokens, result.documents) == (min(60, max_tokens), documents)


def test_loss_above_twenty_is_not_capped() -> None:
    result = perplexity(lambda inputs, labels: 25.0 * labels.numel(), _stream(), SEQ_LENGTH)
    assert result.perplexity == pytest.approx(math.exp(25.0))


def test_progress_ends_at_the_total() -> None:
    reports: list[tuple[int, int]] = []
    perplexity(lambda i, t: 0.0, _stream(2500), SEQ_LENGTH, on_tokens=lambda d, n: reports.append((d, n)))
    assert reports[-1] == (2499, 2499)
    assert len(reports) > 1


def test_nothing_to_predict_is_a_user_error() -> None:
    with pytest.raises(DataError, match="1 token"):
        perplexity(lambda i, t: 0.0, TokenStream("one", np.array([3]), np.array([1])), SEQ_LENGTH)


def test_nan_is_an_error() -> None:
    with pytest.raises(CptError, match="nan"):
        perplexity(lambda i, t: float("nan"), _stream(), SEQ_LENGTH)
