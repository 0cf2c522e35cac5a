"""The learning rate as a pure function of consumed tokens: no state, no torch.

A step is given the rate at its middle token, so the first step is not wasted on 0 and the last not on the end.

    t tokens since schedule.start_tokens, W warm-up, T end of the budget, D decay
    warm-up        warmup_from_lr -> lr over W; then
    cosine         half a cosine to min_lr at T            linear        a line to min_lr at T
    constant       lr                                      inverse_sqrt  lr * sqrt(W / t), at least min_lr
    wsd            lr until T - D, then decay_shape to min_lr (Hu et al. 2024, arXiv:2404.06395)
    infinite       cosine to constant_lr over cooldown_tokens, constant_lr until T - D, then exponential to min_lr
                   (Ibrahim et al. 2024, arXiv:2403.08763)
"""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_cpt.config.phase import Phase

# fraction of the decay still ahead once a fraction x is done: 1 at x = 0, 0 at x = 1
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


def learning_rate(phase: Phase, consumed_tokens: float) -> float:
    """Return the rate at `consumed_tokens`, counted from the start of the run."""
    schedule, warmup = phase.schedule, phase.warmup_tokens
    peak, floor = phase.optimizer.lr, phase.optimizer.min_lr
    t = consumed_tokens - schedule.start_tokens
    if t < warmup:
        return schedule.warmup_from_lr + (peak - schedule.warmup_from_lr) * max(0.0, t) / warmup
    end = phase.rate_end_tokens - schedule.start_tokens
    left = end - t  # tokens until the end; below 0 only past it
    decay = phase.decay_tokens
    match schedule.kind:
        case "constant":
            return peak
        case "inverse_sqrt":
            return max(floor, peak * math.sqrt(warmup / t))
        case "cosine" | "linear":
            return _between(peak, floor, (t - warmup) / max(1, end - warmup), SHAPES[schedule.kind])
        case "wsd":
            return _between(peak, floor, _share(decay - left, decay), SHAPES[schedule.decay_shape])
        case "infinite":
            assert schedule.constant_lr is not None
            if left < decay:
                return float(schedule.constant_lr * (floor / schedule.constant_lr) ** _share(decay - left, decay))
            cooled = _share(t - warmup, schedule.cooldown_tokens)
            return _between(peak, schedule.constant_lr, cooled, SHAPES["cosine"])


def _share(done: float, whole: int) -> float:
    """done / whole within 0 and 1; nothing to do counts as done."""
    return min(1.0, max(0.0, done / whole)) if whole else float(done >= 0)


def _between(start: float, end: float, x: float, shape: Callable[[float], float]) -> float:
    return end + (start - end) * shape(min(1.0, max(0.0, x)))
