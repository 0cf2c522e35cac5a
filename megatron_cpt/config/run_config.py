"""One YAML is one run: its frozen config, put together from the sections.

Each field is checked alone here, with its unit in its description; `derive` asks every section for the rules that
go across. docs/config.md is generated from these classes.
"""

from __future__ import annotations

from itertools import accumulate

from pydantic import Field

from megatron_cpt.budget import Steps, cut_budget
from megatron_cpt.config.section import Section, Sections
from megatron_cpt.config.sections.batch import BatchConfig
from megatron_cpt.config.sections.budget import BudgetConfig
from megatron_cpt.config.sections.checkpoint import CheckpointConfig
from megatron_cpt.config.sections.data import DataConfig
from megatron_cpt.config.sections.evaluation import EvalConfig
from megatron_cpt.config.sections.failure import FailureConfig
from megatron_cpt.config.sections.forgetting import ForgettingConfig
from megatron_cpt.config.sections.log import LogConfig
from megatron_cpt.config.sections.lora import LoraConfig
from megatron_cpt.config.sections.model import ModelConfig
from megatron_cpt.config.sections.optimizer import OptimizerConfig
from megatron_cpt.config.sections.parallel import ParallelConfig
from megatron_cpt.config.sections.phase import PhaseConfig
from megatron_cpt.config.sections.precision import PrecisionConfig
from megatron_cpt.config.sections.recompute import RecomputeConfig
from megatron_cpt.config.sections.schedule import ScheduleConfig


class RunConfig(Section):
    """One run. Relative paths are relative to the directory the command is started in."""

    job_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run.")
    run_dir: str | None = Field(None, description="Folder of the run; default runs/<job_name>.")
    seed: int = Field(
        1234, ge=0, le=4_000_000_000, description="Seed of data order, dropout and random initialisation."
    )
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    budget: BudgetConfig = BudgetConfig()
    batch: BatchConfig = BatchConfig()
    phases: tuple[PhaseConfig, ...] = Field(
        (), description="Stretches with their own budget, blend, sequence length and rate, one after the other."
    )
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    data: DataConfig = DataConfig()
    forgetting: ForgettingConfig = ForgettingConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    failure: FailureConfig = FailureConfig()
    log: LogConfig = LogConfig()

    @property
    def folder(self) -> str:
        return self.run_dir or f"runs/{self.job_name}"

    @property
    def sections(self) -> Sections:
        """Every section, in the order of the schema."""
        values = (getattr(self, name) for name in type(self).model_fields)
        return Sections(value for value in values if isinstance(value, Section))

    @property
    def phase_ends(self) -> tuple[int, ...]:
        """Where each phase ends, in tokens of the run."""
        return tuple(accumulate(phase.train_tokens or 0 for phase in self.phases))

    def with_phase_sum(self) -> RunConfig:
        """Return this config with the sum of the phases as its budget, unless it states one or a phase is not known."""
        if "train_tokens" in self.budget.model_fields_set or not self.phases:
            return self
        if not all(phase.train_tokens for phase in self.phases):
            return self
        budget = self.budget.model_copy(update={"train_tokens": self.phase_ends[-1]})
        return self.model_copy(update={"budget": budget})

    def phase_batch(self, phase: PhaseConfig) -> BatchConfig:
        """Return the batch of a phase."""
        changes: dict[str, int | None] = {}
        if phase.seq_length is not None:
            changes["seq_length"] = phase.seq_length
        if phase.global_batch_size is not None:
            changes |= {"global_batch_size": phase.global_batch_size, "rampup_from": None, "rampup_tokens": 0}
        return self.batch.model_copy(update=changes)

    def steps(self, consumed_tokens: int = 0) -> Steps:
        """Cut the budget into whole steps from `consumed_tokens` on, where the run stands."""
        if not self.phases:
            return self.budget.steps(self.batch, consumed_tokens)
        iters, position, step_tokens = 0, consumed_tokens, 0
        for phase, end in zip(self.phases, self.phase_ends, strict=True):
            batch = self.phase_batch(phase)
            cut = cut_budget(end, batch.size, batch.seq_length, position)
            iters, position, step_tokens = iters + cut.train_iters, cut.train_tokens, cut.last_step_tokens
        return Steps(self.budget.train_tokens, consumed_tokens, iters, position, step_tokens)
