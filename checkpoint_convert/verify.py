"""Prove that two checkpoints, of any format, are one model: same facts, same bits, same logits."""

from __future__ import annotations

import functools
import hashlib
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from checkpoint_convert.checkpoint import ITEM_BYTES, IndexedCheckpoint, StoredTensor, check_names
from checkpoint_convert.forward import StreamedModel
from checkpoint_convert.rows import Files
from checkpoint_convert.stream import Copier, cast, compare_copies, run_parallel
from megatron_cpt.console import ProgressBar

log = logging.getLogger(__name__)

TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1687 Isaac Newton wrote that the force between two bodies "
    "falls with the square of their distance. def add(a, b): return a + b. La vie est belle. 机器学习很有用。"
)
EXACT_TOLERANCE = 1e-5
CAST_TOLERANCE = 0.02  # rounding weights to bfloat16 moves logits by about 1 %
RANDOM_TOKENS = 64  # length of the text where there is no tokenizer.json
TEXT_TOKENS = 4096  # more than the fixed text has in any vocabulary


def verify(
    a: IndexedCheckpoint, b: IndexedCheckpoint, *, logits: bool = True, tolerance: float | None = None, workers: int = 2
) -> dict[str, Any]:
    """Compare two checkpoints; `ok` in the result says whether they are the same model.

    Weights must agree bit by bit; where dtypes differ, the wider one is cast to the narrower. Logits are computed in
    fp32 on a fixed text. `tolerance` bounds their largest difference relative to the largest logit, and the
    relative difference of the perplexities; by default EXACT_TOLERANCE, or CAST_TOLERANCE where dtypes differ.
    """
    check_names(a.weights.tensors, b.weights.tensors, f"{b.path}, compared with {a.path}")
    facts = [
        {"fact": key, "a": value, "b": asdict(b.arch)[key]}
        for key, value in asdict(a.arch).items()
        if key not in ("dtype", "family") and asdict(b.arch)[key] != value
    ]
    different, cast = _compare_weights(a, b, workers)
    same = not facts and not different
    result: dict[str, Any] = {
        "a": str(a.path),
        "b": str(b.path),
        "tensors": len(a.weights.tensors),
        "facts_that_differ": facts,
        "tensors_that_differ": different,
        "tensors_equal_after_cast": cast,
        "weights_equal": not different,
    }
    if logits:
        bound = tolerance if tolerance is not None else CAST_TOLERANCE if cast else EXACT_TOLERANCE
        found = compare_logits(a, b)
        perplexity_change = abs(found["perplexity_b"] / found["perplexity_a"] - 1)
        near = found["max_relative_difference"] <= bound and perplexity_change <= bound
        result["logits"] = found | {"tolerance": bound, "ok": near}
        same = same and near
    result["ok"] = same
    return result


def _compare_weights(a: IndexedCheckpoint, b: IndexedCheckpoint, workers: int) -> tuple[list[str], int]:
    """Names of tensors that differ, and how many agree only after a cast."""
    total = a.weights.nbytes + b.weights.nbytes
    total += 2 * sum(t.nbytes for t in (*a.weights.copies, *b.weights.copies))
    with Files() as files, ProgressBar("compare", total, "bytes") as progress:
        copier = Copier(files, None, progress.advance)
        for checkpoint in (a, b):
            compare_copies(copier, checkpoint.weights.tensors, checkpoint.weights.copies)

        def one(name: str) -> str:
            left, right = a.weights.tensors[name], b.weights.tensors[name]
            if left.shape != right.shape:
                return "different"
            if (left.dtype, left.less_one) == (right.dtype, right.less_one):
                return "equal" if copier.sha256(left) == copier.sha256(right) else "different"
            wide, narrow = sorted((left, right), key=lambda t: -ITEM_BYTES[t.dtype])
            ways = [(wide, narrow)] if left.less_one == right.less_one else [(wide, narrow), (narrow, wide)]
            return "cast" if any(_becomes(copier, *way) for way in ways) else "different"

        names = list(a.weights.tensors)
        outcomes = run_parallel([functools.partial(one, name) for name in names], workers)
    different = [name for name, outcome in zip(names, outcomes, strict=True) if outcome == "different"]
    return different, outcomes.count("cast")


def _becomes(copier: Copier, tensor: StoredTensor, other: StoredTensor) -> bool:
    """Whether a conversion of `tensor` to how `other` is stored gives the other's bytes."""
    digest, shift = hashlib.sha256(), int(tensor.less_one) - int(other.less_one)
    for _, block in copier.blocks(tensor):
        digest.update(cast(block, tensor.dtype, other.dtype, shift).data)
    return digest.hexdigest() == copier.sha256(other)


def fixed_tokens(checkpoint: IndexedCheckpoint) -> torch.Tensor:
    """(1, s) token ids: the fixed text where there is a tokenizer.json, else a fixed random sequence."""
    path: Path = checkpoint.side_dir / "tokenizer.json"
    vocab_size = checkpoint.arch.vocab_size
    if path.is_file():
        from tokenizers import Tokenizer

        ids = [i for i in Tokenizer.from_file(str(path)).encode(TEXT).ids if i < vocab_size]
        if len(ids) > 1:
            return torch.tensor([ids])
    log.info("no tokenizer.json in %s: logits are compared on a fixed random sequence", checkpoint.side_dir)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (1, RANDOM_TOKENS), generator=generator)


@torch.no_grad()
def compare_logits(a: IndexedCheckpoint, b: IndexedCheckpoint) -> dict[str, Any]:
    """Largest difference of the logits and both perplexities, a block of the vocabulary at a time."""
    limit = min(min(x.arch.positions, x.arch.sliding_window or TEXT_TOKENS) for x in (a, b))
    tokens = fixed_tokens(a)[:, : min(limit, TEXT_TOKENS)]  # within the window full attention is what both compute
    with Files() as files:
        models = [StreamedModel(checkpoint, files) for checkpoint in (a, b)]
        hidden = [model.hidden(tokens) for model in models]
        total = [torch.full(tokens.shape, float("-inf")) for _ in models]  # running log-sum-exp over the vocabulary
        label = [torch.zeros(tokens.shape[0], tokens.shape[1] - 1) for _ in models]
        difference = largest = 0.0
        blocks = [model.logit_blocks(h) for model, h in zip(models, hidden, strict=True)]
        for pair in zip(*blocks, strict=True):
            for i, (start, stop, logits) in enumerate(pair):
                total[i] = torch.logaddexp(total[i], logits.logsumexp(-1))
                targets = tokens[:, 1:]
                inside = (targets >= start) & (targets < stop)
                index = (targets - start).clamp(0, stop - start - 1)
                picked = logits[:, :-1].gather(-1, index[..., None]).squeeze(-1)
                label[i] = torch.where(inside, picked, label[i])
            difference = max(difference, float((pair[0][2] - pair[1][2]).abs().max()))
            largest = max(largest, float(pair[0][2].abs().max()))
    losses = [float((t[:, :-1] - picked).mean()) for t, picked in zip(total, label, strict=True)]
    perplexities = [float(torch.tensor(loss).exp()) for loss in losses]
    return {
        "tokens": tokens.numel(),
        "max_difference": difference,
        "max_relative_difference": difference / max(largest, 1e-30),
        "perplexity_a": perplexities[0],
        "perplexity_b": perplexities[1],
    }
