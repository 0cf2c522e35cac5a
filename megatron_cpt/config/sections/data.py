"""`data`: what is trained on, in which shares over the run, and what is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from pydantic import Field

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.mix import MixPiece, normalised, written
from megatron_cpt.config.problems import Problem, near_match
from megatron_cpt.config.section import Section, Sections, Share, Tokens

_SUM_TOLERANCE = 1e-6


class DataSource(Section):
    """One tokenised dataset in the training blend."""

    name: str = Field(description="Name in metrics and ledgers.")
    prefix: str = Field(description="Path of the .bin/.idx pair without the ending.")
    weight: float = Field(
        1.0,
        gt=0,
        description="Share of training tokens, relative to the other sources; with replay_ratio or the domain share "
        "of a schedule, relative to the other sources of its role.",
    )
    role: Literal["domain", "replay"] = Field(
        "domain", description="domain: what is to be learnt; replay: general text against forgetting."
    )
    max_epochs: float | None = Field(
        None, gt=0, description="More repeats than this of the source is an error; default data.max_epochs."
    )


class CurriculumPoint(Section):
    """The blend at one point of the run."""

    tokens: Tokens = Field(description="Consumed tokens at which the blend is this one.")
    domain: Share | None = Field(
        None, ge=0, le=1, description="Share of the sources of role domain; those of role replay have the rest."
    )
    shares: dict[str, Share] | None = Field(
        None, description="Instead: the share of each source by name, 100 % together; sources left out have none."
    )


class Curriculum(Section):
    """A blend that changes with the tokens consumed."""

    shape: Literal["linear", "step"] = Field(
        "linear", description="Between two points: along a line, or the earlier blend until the later point."
    )
    points: tuple[CurriculumPoint, ...] = Field(
        min_length=1, description="Before the first point its blend holds, after the last the last one's."
    )


class DataConfig(Section):
    """The datasets that are trained on, and those that are only measured."""

    train: tuple[DataSource, ...] = Field((), description="Sources of the training blend.")
    replay_ratio: Share | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of the tokens that comes from the sources of role replay; without it the weights decide.",
    )
    schedule: Curriculum | None = Field(None, description="The blend over the tokens consumed; default: constant.")
    validation: dict[str, str] = Field(
        default_factory=dict, description="Named held-out sets: name -> prefix; each is evaluated apart."
    )
    max_epochs: float = Field(4.0, gt=0, description="More repeats than this of any source is an error.")
    cache_dir: str | None = Field(None, description="Folder of index caches; default <run_dir>/index_cache.")

    def mix(self) -> tuple[MixPiece, ...]:
        """Return every source's share over the consumed tokens; the pieces follow on each other, the last for ever."""
        return self.mix_of(self.replay_ratio, self.schedule)

    def mix_of(self, replay_ratio: float | None, schedule: Curriculum | None) -> tuple[MixPiece, ...]:
        """Return the shares of these sources under another ratio or schedule, whose tokens count from its beginning."""
        if schedule is None:
            domain = None if replay_ratio is None else 1 - written(replay_ratio)
            shares = normalised(self._weights(domain))
            return (MixPiece(0, None, shares, shares),)
        points = [(point.tokens, normalised(self._point_weights(point))) for point in schedule.points]
        if points[0][0] > 0:
            points.insert(0, (0, points[0][1]))
        pieces = []
        for (start, first), (end, last) in pairwise(points):
            pieces.append(MixPiece(start, end, first, last if schedule.shape == "linear" else first))
        return (*pieces, MixPiece(points[-1][0], None, points[-1][1], points[-1][1]))

    def _point_weights(self, point: CurriculumPoint) -> dict[str, Fraction]:
        if point.shares is not None:
            return {source.name: written(point.shares.get(source.name, 0)) for source in self.train}
        return self._weights(None if point.domain is None else written(point.domain))

    def _weights(self, domain: Fraction | None) -> dict[str, Fraction]:
        """The sources' own weights; where the share of the domain is given, within their roles."""
        weights = {source.name: written(source.weight) for source in self.train}
        if domain is None:
            return weights
        share = {"domain": domain, "replay": 1 - domain}
        whole = {role: sum(weights[s.name] for s in self.train if s.role == role) for role in share}
        return {s.name: share[s.role] * weights[s.name] / whole[s.role] for s in self.train}

    def problems(self, run: Sections, arch: Architecture | None) -> Iterator[Problem]:
        names = [source.name for source in self.train]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield Problem("data.train", None, f"two sources are named {name!r}", "give each source its own name")
        yield from self.mix_problems("data", self.replay_ratio, self.schedule)

    def mix_problems(self, path: str, replay_ratio: float | None, schedule: Curriculum | None) -> Iterator[Problem]:
        """Yield what is wrong with a ratio or a schedule for these sources, under the keys of `path`."""
        if replay_ratio is not None and schedule is not None:
            hint = "leave out one of them; a schedule says the share of the domain at each of its points"
            yield Problem(f"{path}.replay_ratio", replay_ratio, f"and {path}.schedule both say the blend", hint)
        if replay_ratio is not None:
            yield from self._role_problems(f"{path}.replay_ratio", 1 - replay_ratio)
        points = schedule.points if schedule is not None else ()
        for number, point in enumerate(points):
            yield from self._point_problems(f"{path}.schedule.points.{number}", point)
        for earlier, later in pairwise(points):
            if later.tokens <= earlier.tokens:
                rule = f"a point at {later.tokens:,} tokens follows one at {earlier.tokens:,}"
                yield Problem(
                    f"{path}.schedule.points", None, rule, "list them in the order of their tokens, each once"
                )

    def _role_problems(self, path: str, domain: float) -> Iterator[Problem]:
        for role, share in (("domain", domain), ("replay", 1 - domain)):
            if share > 0 and not any(source.role == role for source in self.train):
                rule = f"gives {share:.4g} of the tokens to sources of role {role}, and there are none"
                yield Problem(path, None, rule, f"data.train: [{{name: ..., prefix: ..., role: {role}}}]")

    def _point_problems(self, path: str, point: CurriculumPoint) -> Iterator[Problem]:
        if (point.domain is None) == (point.shares is None):
            yield Problem(path, None, "needs either domain or shares", "domain: 50 %")
        elif point.domain is not None:
            yield from self._role_problems(f"{path}.domain", point.domain)
        else:
            yield from self.share_problems(f"{path}.shares", point.shares or {})

    def share_problems(self, path: str, shares: Mapping[str, float]) -> Iterator[Problem]:
        """Yield what is wrong with shares by name, written at `path`."""
        names = [source.name for source in self.train]
        for unknown in (name for name in shares if name not in names):
            near = near_match(unknown, names)
            hint = f"did you mean {near}?" if near else f"the sources are {', '.join(names) or 'none'}"
            yield Problem(path, unknown, "no source of data.train has this name", hint)
        for name, share in shares.items():
            if not 0 <= share <= 1:
                yield Problem(f"{path}.{name}", share, "is not a share", "0 to 100 %")
        if abs((whole := sum(shares.values())) - 1) > _SUM_TOLERANCE:
            yield Problem(path, None, f"sum to {whole:.6g}", "shares of a point must sum to 1, or 100 %")
