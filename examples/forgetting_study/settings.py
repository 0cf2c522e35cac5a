"""The settings that the study compares: what each changes in config.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

STEPS = 57  # of a run without replay; so chosen that replay of 5 and of 25 % ends with a whole step too
FISHER_SAMPLES = 64


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Attributes:
        budget: tokens in all, relative to the domain's, which are the same in every setting.
        overrides: KEY=VALUE of the config; {work} is the folder of the study.
    """

    name: str
    title: str
    budget: Fraction = Fraction(1)
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Average:
    """The weights of a trained setting and of the base, averaged: no training."""

    name: str
    title: str
    of: str
    ratio: float  # the share of what was trained


VANILLA = Setting("vanilla", "nothing against forgetting")
SETTINGS = (
    VANILLA,
    Setting("half_rate", "half the learning rate", overrides=("optimizer.lr=1.5e-4", "optimizer.min_lr=1.5e-5")),
    Setting("replay_5", "replay 5 %", Fraction(20, 19), ("data.replay_ratio=5%",)),
    Setting("replay_25", "replay 25 %", Fraction(4, 3), ("data.replay_ratio=25%",)),
    Setting(
        "curriculum",
        "curriculum, 50 to 90 % domain",
        Fraction(80, STEPS),
        # the line ends after 75 of 80 steps, so that the domain has its 57
        (
            "data.replay_ratio=null",
            "data.schedule={shape: linear, points: [{tokens: 0, domain: 50%}, {tokens: {line}, domain: 90%}]}",
        ),
    ),
    Setting("kl", "KL to the base on all tokens", overrides=("forgetting.kl.weight=0.5",)),
    Setting(
        "replay_25_kl",
        "replay 25 % with KL on it",
        Fraction(4, 3),
        ("data.replay_ratio=25%", "forgetting.kl.weight=1", "forgetting.kl.sources=[facts]"),
    ),
    Setting("ewc", "EWC", overrides=("forgetting.ewc.fisher={work}/fisher", "forgetting.ewc.strength=30")),
    Setting("l2sp", "L2-SP", overrides=("forgetting.ewc.strength=0.01",)),
)  # fmt: skip
AVERAGES = (
    Average("average_70", "70 % trained, 30 % base, weights averaged", "vanilla", 0.7),
    Average("average_50", "half trained, half base, weights averaged", "vanilla", 0.5),
)


def overrides_of(setting: Setting, seed: int, work: str, step_tokens: int) -> list[str]:
    """Return KEY=VALUE of one run.

    Args:
        step_tokens: tokens of a step.
    """
    domain_tokens = STEPS * step_tokens
    train_tokens = setting.budget * domain_tokens
    line_tokens = 75 * step_tokens
    texts = [text.replace("{work}", work).replace("{line}", str(line_tokens)) for text in setting.overrides]
    return [
        f"run_dir={run_folder(work, setting.name, seed)}",
        f"seed={seed}",
        f"budget.train_tokens={int(train_tokens)}",
        # the same course of the rate, however long the run
        f"budget.warmup_tokens={int(train_tokens / 10)}",
        f"schedule.decay_tokens={int(train_tokens / 2)}",
        *texts,
    ]


def run_folder(work: str, name: str, seed: int) -> str:
    return f"{work}/runs/{name}/seed{seed}"
