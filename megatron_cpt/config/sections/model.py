"""`model`: which model, from which weights, with which attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.rope import RopeChange
from megatron_cpt.config.problems import Problem
from megatron_cpt.config.section import Positive, Section, Sections
from megatron_cpt.config.sections.batch import BatchConfig
from megatron_cpt.config.sections.parallel import ParallelConfig


class RopeConfig(Section):
    """Positions beyond those that the model was trained with; written to the config.json of every export."""

    theta: float | None = Field(
        None,
        gt=0,
        description="New base of the rotary positions, above the model's own (ABF, arXiv:2309.16039). Needs "
        "max_position_embeddings where yarn_factor is not set.",
    )
    yarn_factor: float | None = Field(
        None,
        gt=1,
        description="Stretch the long wavelengths by this factor (YaRN, arXiv:2309.00071); the model then has this "
        "many times its original positions.",
    )
    original_max_position_embeddings: Positive | None = Field(
        None, description="Tokens that YaRN stretches; default: the positions in the model's config.json."
    )
    max_position_embeddings: Positive | None = Field(
        None, description="Positions of the model with the new base, in tokens; with yarn_factor they follow from it."
    )

    @property
    def change(self) -> RopeChange:
        return RopeChange(**self.model_dump())

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        if self.theta is None and self.yarn_factor is None:
            yield Problem("model.rope", None, "changes nothing", "theta, or yarn_factor, or leave model.rope out")
        elif self.yarn_factor is None and self.max_position_embeddings is None:
            yield Problem(
                "model.rope.max_position_embeddings",
                None,
                "a new base does not say how many positions it is for",
                f"{run[BatchConfig].seq_length} or more",
            )
        if self.yarn_factor is not None and self.max_position_embeddings is not None:
            yield Problem(
                "model.rope.max_position_embeddings",
                self.max_position_embeddings,
                "follows from yarn_factor",
                "leave it out; original_max_position_embeddings are the tokens that are stretched",
            )
        if self.yarn_factor is None and self.original_max_position_embeddings is not None:
            yield Problem(
                "model.rope.original_max_position_embeddings",
                self.original_max_position_embeddings,
                "means nothing without yarn_factor",
                "max_position_embeddings are the positions with a new base",
            )


class ModelConfig(Section):
    """Which model is trained and where its weights come from."""

    init_from: str = Field(
        description="Hugging Face directory, Megatron torch_dist checkpoint, or a run folder to take the first "
        "weights from; the word `random` trains from scratch."
    )
    architecture: str | None = Field(
        None,
        description="Directory or config.json in Hugging Face form that describes the model. Needed when init_from "
        "is `random` or not yet on this machine; default: beside the weights of init_from.",
    )
    allow_instruct: bool = Field(
        False,
        description="Allow an Instruct/Chat checkpoint. Off by default: CPT undoes instruction tuning.",
    )
    check_start: bool = Field(
        True,
        description="Before the first step, refuse a loss near ln(vocabulary), that of a uniform guess, and compare it "
        "with transformers' where that is installed and memory allows. Off for weights that are meant to be untrained.",
    )
    rope: RopeConfig | None = Field(
        None,
        description="Train on longer sequences than the model has positions for. The base model that forgetting.kl "
        "compares with gets the same positions.",
    )
    attention: Literal["auto", "te", "sdpa", "block_causal", "unfused"] = Field(
        "auto",
        description="Core attention: TransformerEngine, torch SDPA, blocks of matrix products for CPUs, or Megatron's "
        "unfused; auto picks TE on CUDA where installed, SDPA on CUDA else, and block_causal on a CPU.",
    )
    document_attention: bool = Field(False, description="Keep packed documents from attending to each other.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout of attention and residuals; large models are trained without."
    )

    @property
    def rope_change(self) -> RopeChange | None:
        return None if self.rope is None else self.rope.change

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        if self.rope is not None:
            yield from self.rope.problems(run, arch)
        if run[ParallelConfig].cp > 1 and self.attention == "unfused":
            yield Problem(
                "model.attention",
                "unfused",
                "computes whole sequences only, and parallel.cp shares one among ranks",
                "auto, sdpa or block_causal; or parallel.cp: 1",
            )
