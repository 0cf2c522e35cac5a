"""`model`: which model, from which weights, with which attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.problems import Problem
from megatron_cpt.config.section import Section, Sections
from megatron_cpt.config.sections.parallel import ParallelConfig


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
    attention: Literal["auto", "te", "sdpa", "block_causal", "unfused"] = Field(
        "auto",
        description="Core attention: TransformerEngine, torch SDPA, blocks of matrix products for CPUs, or Megatron's "
        "unfused; auto picks TE on CUDA where installed, SDPA on CUDA else, and block_causal on a CPU.",
    )
    document_attention: bool = Field(False, description="Keep packed documents from attending to each other.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout of attention and residuals; large models are trained without."
    )

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        if run[ParallelConfig].cp > 1 and self.attention == "unfused":
            yield Problem(
                "model.attention",
                "unfused",
                "computes whole sequences only, and parallel.cp shares one among ranks",
                "auto, sdpa or block_causal; or parallel.cp: 1",
            )
