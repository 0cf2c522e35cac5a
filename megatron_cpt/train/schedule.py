"""The learning rate and the batch size as pure functions of consumed tokens; no state, standard library only.

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

from megatron_cpt.budget import ramped_batch_size
from megatron_cpt.config.derive import decay_tokens
from megatron_cpt.config.schema import RunConfig

# share of the way that is left after the share x of a decay, from 1 at x = 0 to 0 at x = 1
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}


def batch_size(config: RunConfig, consumed_tokens: int) -> int:
    """Samples of the step after `consumed_tokens`."""
    batch = config.batch
    return ramped_batch_size(consumed_tokens, batch.global_batch_size, batch.rampup_from, batch.rampup_tokens)


def learning_rate(config: RunConfig, train_tokens: int, consumed_tokens: float) -> float:
    """The rate at `consumed_tokens` of a run that ends at `train_tokens`."""
    schedule, optimizer = config.schedule, config.optimizer
    peak, floor, warmup = optimizer.lr, optimizer.min_lr, config.budget.warmup_tokens
    t = consumed_tokens - schedule.start_tokens
    if t < warmup:
        return schedule.warmup_from_lr + (peak - schedule.warmup_from_lr) * max(0.0, t) / warmup
    end = train_tokens - schedule.start_tokens
    left = end - t  # tokens until the end; below 0 only past it
    decay = decay_tokens(config, train_tokens)
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


def sample_schedule(config: RunConfig, train_tokens: int, points: int) -> list[tuple[int, float]]:
    """(consumed tokens, rate) at equal distances over the budget, both ends included."""
    positions = [train_tokens * i // (points - 1) for i in range(points)]
    return [(tokens, learning_rate(config, train_tokens, tokens)) for tokens in positions]


def draw_schedule(config: RunConfig, train_tokens: int, columns: int = 60) -> str:
    """The schedule as one line of bars, as high as the rate is of the peak."""
    bars = " ▁▂▃▄▅▆▇█"
    rates = [rate / config.optimizer.lr for _, rate in sample_schedule(config, train_tokens, columns)]
    return "".join(bars[round(min(1.0, rate) * (len(bars) - 1))] for rate in rates)


def _share(done: float, whole: int) -> float:
    """done / whole within 0 and 1; nothing to do counts as done."""
    return min(1.0, max(0.0, done / whole)) if whole else float(done >= 0)


def _between(start: float, end: float, x: float, shape: Callable[[float], float]) -> float:
    return end + (start - end) * shape(min(1.0, max(0.0, x)))
