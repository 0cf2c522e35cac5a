"""`failure`: spikes, hangs and the end of the job."""

from __future__ import annotations

from pydantic import Field

from megatron_cpt.config.section import Positive, Section


class FailureConfig(Section):
    """What the run does when a step goes wrong, hangs, or the job must end. Exit codes: docs/recover.md."""

    spike_zscore: float | None = Field(
        10.0,
        gt=0,
        description="Skip a step whose loss lies more than this many robust standard deviations above the median of "
        "the last spike_window steps; null accepts any finite loss. NaN and infinity are always skipped.",
    )
    spike_window: Positive = Field(
        128, description="Steps that a loss is compared with; the first 20 are never judged."
    )
    skips_before_rollback: Positive = Field(
        5, description="Steps skipped in a row after which the last good checkpoint is loaded; the data goes on."
    )
    max_rollbacks: int = Field(
        2, ge=0, description="Rollbacks after which the run stops with the do-not-restart exit code."
    )
    wall_time_minutes: float | None = Field(
        None, gt=0, le=1e6, description="Save and stop at the end of the step that reaches this age of the job."
    )
    setup_timeout_minutes: float = Field(60.0, gt=0, le=1e6, description="Longest time from start to the first step.")
    step_timeout_minutes: float = Field(30.0, gt=0, le=1e6, description="Longest time of one step.")
    eval_timeout_minutes: float = Field(120.0, gt=0, le=1e6, description="Longest time of one validation of all sets.")
    save_timeout_minutes: float = Field(60.0, gt=0, le=1e6, description="Longest time that the loop waits for a save.")
