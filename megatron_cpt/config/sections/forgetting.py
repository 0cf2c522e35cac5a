"""`forgetting`: what keeps the model near the base model while it learns the new text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.problems import Problem, near_match
from megatron_cpt.config.section import Section, Sections, Share
from megatron_cpt.config.sections.checkpoint import CheckpointConfig
from megatron_cpt.config.sections.data import DataConfig
from megatron_cpt.config.sections.evaluation import EvalConfig
from megatron_cpt.config.sections.lora import LoraConfig
from megatron_cpt.config.sections.optimizer import OptimizerConfig


class KlConfig(Section):
    """A second loss term: the Kullback-Leibler divergence between the base model and the model, token by token."""

    weight: float = Field(
        0.1, ge=0, le=1e4, description="Of a token's divergence beside its cross entropy; 0 is the run without it."
    )
    temperature: float = Field(
        1.0, gt=0, le=100, description="Both models' logits are divided by it, and the divergence times its square."
    )
    direction: Literal["forward", "reverse"] = Field(
        "forward",
        description="forward: sum of p_base log(p_base / p_model), which covers all that the base says; reverse: the "
        "models exchanged.",
    )
    sources: tuple[str, ...] | None = Field(
        None, min_length=1, description="Names of data.train whose tokens count, such as the replay; default: all."
    )
    offline_top_k: int | None = Field(
        None,
        ge=1,
        description="Compare with so many of the base's likeliest tokens, and with the rest as one, from what "
        "`megatron-cpt kl-targets` stored beside the datasets; unset runs the base beside the model.",
    )


class GateConfig(Section):
    """How much worse the run may become on general text. Judged at each validation, against the first of each set."""

    general: tuple[str, ...] = Field(min_length=1, description="Names of data.validation that are general text.")
    max_general_perplexity_increase: Share = Field(
        0.03, ge=0, description="Largest rise of the perplexity of any general set, such as `3 %` or 0.03."
    )
    action: Literal["warn", "stop", "roll_back"] = Field(
        "warn",
        description="Beyond it: say so; save and stop with the do-not-restart exit code; or go back to the best "
        "checkpoint (checkpoint.best_by) and go on with the next data at a lower rate.",
    )
    rate_factor: float = Field(0.5, gt=0, lt=1, description="roll_back: what the learning rate is multiplied by.")
    max_rollbacks: int = Field(3, ge=0, description="roll_back: after so many the run stops as `stop` does.")

    @property
    def limit(self) -> float:
        """The largest rise, as a share."""
        return self.max_general_perplexity_increase


class EwcConfig(Section):
    """A penalty on the distance of every weight from the base model's: strength / 2 * sum of F (weight - base)^2."""

    strength: float = Field(
        ge=0,
        le=1e18,
        allow_inf_nan=False,
        description="Lambda: how much the distance counts beside the loss per token; 0 is the run without it.",
    )
    fisher: str = Field(
        "ones",
        min_length=1,
        description="F, the importance of each weight: a folder that `megatron-cpt fisher` wrote for this base model. "
        "ones: every weight counts alike, which is L2-SP.",
    )

    @property
    def folder(self) -> Path | None:
        """Where the Fisher values lie, None where every weight counts alike."""
        return None if self.fisher == "ones" else Path(self.fisher)


class ForgettingConfig(Section):
    """Terms against forgetting; none of them is on by default."""

    kl: KlConfig | None = Field(None, description="Divergence from the frozen model of model.init_from.")
    ewc: EwcConfig | None = Field(None, description="Penalty on the distance from the weights of model.init_from.")
    gate: GateConfig | None = Field(None, description="A limit to what general text may lose.")

    @property
    def active_kl(self) -> KlConfig | None:
        """The KL term where it has any effect, and so needs its reference."""
        return self.kl if self.kl is not None and self.kl.weight > 0 else None

    @property
    def runs_reference(self) -> bool:
        """Whether the base model runs beside the trained one."""
        return self.active_kl is not None and self.active_kl.offline_top_k is None

    @property
    def active_ewc(self) -> EwcConfig | None:
        """The penalty on the weights where it has any effect."""
        return self.ewc if self.ewc is not None and self.ewc.strength > 0 else None

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        yield from self._unknown_sources([source.name for source in run[DataConfig].train])
        asked = self.active_kl
        if asked is not None and arch is not None and (asked.offline_top_k or 0) > arch.vocab_size:
            rule = f"is more than the vocabulary of {arch.vocab_size:,}"
            yield Problem("forgetting.kl.offline_top_k", asked.offline_top_k, rule, "such as 32")
        if self.active_ewc is not None:
            yield from self._out_of_reach(run)
        if self.gate is not None:
            yield from self._gate_problems(self.gate, run)

    def _out_of_reach(self, run: Sections) -> Iterator[Problem]:
        """Settings under which no optimizer here holds fp32 weights that a penalty could pull at."""
        optimizer, lora = run[OptimizerConfig], run[LoraConfig]
        rule = "leaves forgetting.ewc nothing to hold: the weights are frozen, and the adapters have no base"
        if lora.on:
            yield Problem("lora.rank", lora.rank, rule, "forgetting.kl works with adapters")
        if optimizer.moments_dtype != "fp32":
            rule = "hides the fp32 weights that forgetting.ewc works on"
            yield Problem("optimizer.moments_dtype", optimizer.moments_dtype, rule, "fp32")
        if optimizer.cpu_offload_ratio > 0:
            rule = "moves the fp32 weights that forgetting.ewc works on out of reach"
            yield Problem("optimizer.cpu_offload_ratio", optimizer.cpu_offload_ratio, rule, "0")

    def _gate_problems(self, gate: GateConfig, run: Sections) -> Iterator[Problem]:
        known = list(run[DataConfig].validation)
        for wanted in gate.general:
            if wanted not in known:
                hint = f"one of {known}" if known else "name held-out sets under data.validation"
                yield Problem("forgetting.gate.general", wanted, "is not a validation set", hint)
        if run[EvalConfig].every is None:
            rule = "judges at each validation, and without eval.every there is none between the first and the last step"
            yield Problem("forgetting.gate", None, rule, "set eval.every, such as eval.every: 100 iters")
        if gate.action == "roll_back" and run[CheckpointConfig].best_by is None:
            named = ", ".join(f"{name}: 1" for name in known)
            rule = "goes back to the best checkpoint, and checkpoint.best_by does not say which that is"
            hint = f"say which losses to add up, such as checkpoint.best_by: {{{named}}}"
            yield Problem("forgetting.gate.action", gate.action, rule, hint)

    def _unknown_sources(self, names: list[str]) -> Iterator[Problem]:
        for wanted in (self.kl.sources if self.kl is not None else None) or ():
            if wanted not in names:
                like = near_match(wanted, names)
                listed = f"the sources are {', '.join(names)}" if names else "data.train is empty"
                hint = f"did you mean {like!r}?" if like else listed
                yield Problem("forgetting.kl.sources", wanted, "no source of data.train has this name", hint)
