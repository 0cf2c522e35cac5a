"""Layouts under which real Megatron-Core and the converter exchange checkpoints, and one mistake on purpose."""

from __future__ import annotations

OTHER_PADDING = "other-padding"  # written for TP1, so without padding rows, and loaded under TP2
SWAPPED = "gate-swapped"  # the converter writes up above gate: it must be noticed

# name, model, tp, pp, vpp: four ranks each, data parallelism is what remains
ROWS: list[tuple[str, str, int, int, int | None]] = [
    ("tp1", "qwen2", 1, 1, None),
    ("tp2-pp2", "qwen2", 2, 2, None),
    ("pp2-vpp2", "qwen2", 1, 2, 2),
    ("pp4-tied", "qwen3_tied", 1, 4, None),
    ("tp2-tied", "llama_tied", 2, 1, None),
    ("tp4", "llama2", 4, 1, None),
    ("tp2-padded", "odd_vocab", 2, 2, None),
    ("head-dim", "mistral", 2, 2, None),
    (OTHER_PADDING, "odd_vocab", 2, 2, None),
    (SWAPPED, "qwen2", 2, 2, None),
]
RANKS = 4
