"""`data`: what is trained on and what is measured."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.problems import Problem
from megatron_cpt.config.section import Section, Sections


class DataSource(Section):
    """One tokenised dataset in the training blend."""

    name: str = Field(description="Name in metrics and ledgers.")
    prefix: str = Field(description="Path of the .bin/.idx pair without the ending.")
    weight: float = Field(1.0, gt=0, description="Share of training tokens, relative to the other sources.")


class DataConfig(Section):
    """The datasets that are trained on, and those that are only measured."""

    train: tuple[DataSource, ...] = Field((), description="Sources of the training blend.")
    validation: dict[str, str] = Field(
        default_factory=dict, description="Named held-out sets: name -> prefix; each is evaluated apart."
    )
    max_epochs: float = Field(4.0, gt=0, description="More repeats than this of any source is an error.")
    cache_dir: str | None = Field(None, description="Folder of index caches; default <run_dir>/index_cache.")

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        names = [source.name for source in self.train]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield Problem("data.train", None, f"two sources are named {name!r}", "give each source its own name")
