"""Weights between two checkpoints of one model: share * source + (1 - share) * other, in fp32, rounded once.

Wortsman et al. 2022 (WiSE-FT, arXiv:2109.01903) average a fine-tuned model with the one it came from: much of what was
learned stays, and much of what was forgotten comes back.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace

from checkpoint_convert.checkpoint import IndexedCheckpoint, Merge, Toward
from megatron_cpt.errors import ConversionError

# What two checkpoints of one model may say differently: it changes no weight's shape or place.
_FREE = ("dtype", "max_position_embeddings", "sliding_window")


def interpolated(source: IndexedCheckpoint, other: IndexedCheckpoint, share: float) -> IndexedCheckpoint:
    """Return `source` with every weight moved towards `other`'s; `share`, from 0 to 1, is how much of it stays.

    Raises:
        ConversionError: they are of different models, or the same folder.
    """
    if source.path.resolve() == other.path.resolve():
        raise ConversionError(f"both models are {source.path}", hint="name the base model with --base-model DIR")
    facts = [dataclasses.asdict(checkpoint.arch) for checkpoint in (source, other)]
    wrong = [
        f"{key} {facts[0][key]!r} and {facts[1][key]!r}"
        for key in facts[0]
        if key not in _FREE and facts[0][key] != facts[1][key]
    ]
    if wrong:
        raise ConversionError(
            f"{source.path} and {other.path} are different models: {'; '.join(wrong)}",
            hint="interpolate a model with the one that its training began with",
        )
    updates = {name: Toward(tensor, 1.0 - share) for name, tensor in other.weights.tensors.items()}
    return replace(source, merge=Merge(other.path, None, updates, other, share))
