"""`phases`: stretches of a run, each with its own budget, blend, sequence length and course of the learning rate."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_cpt.config.section import Positive, Section, Share, Tokens
from megatron_cpt.config.sections.data import Curriculum


class PhaseEpochs(Section):
    """A budget in passes over one source."""

    source: str = Field(description="Name of a source of data.train.")
    count: float = Field(gt=0, description="How often the phase reads it.")


class PhaseData(Section):
    """The blend of a phase; at most one of the keys."""

    replay_ratio: Share | None = Field(None, ge=0, le=1, description="As data.replay_ratio, for this phase.")
    shares: dict[str, Share] | None = Field(
        None, description="The share of each source by name, 100 % together; sources left out have none."
    )
    schedule: Curriculum | None = Field(
        None, description="As data.schedule; its tokens count from the beginning of the phase."
    )


class PhaseRate(Section):
    """The learning rate of a phase."""

    course: Literal["continue", "rewarm", "anneal"] = Field(
        "continue",
        description="continue: as `schedule` says for the whole run; rewarm: up again to lr and down to min_lr within "
        "the phase; anneal: from where the phase before ended down to min_lr.",
    )
    lr: float | None = Field(None, gt=0, description="`rewarm`: the peak; default optimizer.lr.")
    min_lr: float | None = Field(
        None, ge=0, description="`rewarm`, `anneal`: the rate at the end of the phase; default optimizer.min_lr."
    )
    warmup_tokens: Tokens = Field(0, description="`rewarm`: tokens from the rate before up to lr.")
    shape: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="`rewarm`, `anneal`: the way down; constant: `rewarm` stays at lr."
    )


class PhaseConfig(Section):
    """One stretch of the run. Phases follow on each other in the order of the list; their budgets are the run's."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name in metrics and messages.")
    train_tokens: Positive | None = Field(None, description="Tokens of the phase.")
    epochs: PhaseEpochs | None = Field(
        None, description="Instead of train_tokens: until a source has been read so often in the phase."
    )
    seq_length: Positive | None = Field(
        None, description="Tokens per sample; default and most is batch.seq_length, for which memory is planned."
    )
    global_batch_size: Positive | None = Field(None, description="Samples per step; default batch.global_batch_size.")
    data: PhaseData = PhaseData()
    rate: PhaseRate = PhaseRate()
    then: Literal["continue", "stop"] = Field(
        "continue", description="stop: the run ends after the phase, saved; starting it again begins the next one."
    )
