"""`forgetting`: what keeps the model near the base model while it learns the new text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.problems import Problem, near_match
from megatron_cpt.config.section import Section, Sections
from megatron_cpt.config.sections.data import DataConfig


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


class ForgettingConfig(Section):
    """Terms against forgetting; none of them is on by default."""

    kl: KlConfig | None = Field(None, description="Divergence from the frozen model of model.init_from.")

    @property
    def active_kl(self) -> KlConfig | None:
        """The KL term where it has any effect, and so needs its reference."""
        return self.kl if self.kl is not None and self.kl.weight > 0 else None

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        if self.kl is None or self.kl.sources is None:
            return
        names = [source.name for source in run[DataConfig].train]
        for wanted in self.kl.sources:
            if wanted not in names:
                like = near_match(wanted, names)
                listed = f"the sources are {', '.join(names)}" if names else "data.train is empty"
                hint = f"did you mean {like!r}?" if like else listed
                yield Problem("forgetting.kl.sources", wanted, "no source of data.train has this name", hint)
