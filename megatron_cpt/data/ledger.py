"""What a run has consumed: the position of every source, in tokens. It is stored in each checkpoint.

The ledger is the truth on resume. The next sample follows from it and the current config alone, so a resume, a
new layout, a new batch size or sequence length, a longer budget or a changed blend continues each source where
it stood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron_cpt.errors import DataError


@dataclass(frozen=True)
class SourcePosition:
    """Where one source stands.

    `block_tokens` is the sequence length with which the source was first read: its documents are cut into
    blocks of that many tokens, and the blocks are shuffled; it stays, so that the order stays.
    """

    manifest: str  # manifest_hash of the dataset: the position means nothing in another one
    block_tokens: int
    tokens: int = 0  # read so far, over all epochs


@dataclass(frozen=True)
class BlendStart:
    """Where the run stood when its present blend began: what is due to a source counts from here."""

    key: str  # of the blend
    tokens: int  # consumed in all
    source_tokens: Mapping[str, int]  # of them, by source


@dataclass(frozen=True)
class Ledger:
    """Samples and tokens consumed, in all and by source. Sources that left the blend keep their position."""

    samples: int = 0
    tokens: int = 0
    sources: Mapping[str, SourcePosition] = field(default_factory=dict)
    blend: BlendStart | None = None  # None before the first sample

    def advanced(self, samples: Mapping[str, int], seq_length: int) -> Ledger:
        """The ledger after `samples[name]` more samples of `seq_length` tokens from each source."""
        moved = {
            name: replace(self.sources[name], tokens=self.sources[name].tokens + count * seq_length)
            for name, count in samples.items()
        }
        drawn = sum(samples.values())
        return replace(
            self,
            samples=self.samples + drawn,
            tokens=self.tokens + drawn * seq_length,
            sources={**self.sources, **moved},
        )

    def in_blend(self, key: str) -> Ledger:
        """This ledger in the blend of that key, which begins here unless it had begun before."""
        if self.blend is not None and self.blend.key == key:
            return self
        tokens = {name: position.tokens for name, position in self.sources.items()}
        return replace(self, blend=BlendStart(key, self.tokens, tokens))

    def tokens_since(self, start: BlendStart, name: str) -> int:
        """Tokens that a source has given since `start`."""
        known = self.sources.get(name)
        return 0 if known is None else known.tokens - start.source_tokens.get(name, 0)

    def with_sources(self, manifests: Mapping[str, str], seq_length: int) -> Ledger:
        """This ledger for a blend of the sources in `manifests` (name -> manifest hash): new ones start at 0.

        Raises:
            DataError: a source keeps its name but is another dataset now.
        """
        sources = dict(self.sources)
        for name, manifest in manifests.items():
            known = sources.setdefault(name, SourcePosition(manifest, seq_length))
            if known.manifest != manifest:
                raise DataError(
                    f"source {name!r} stands at token {known.tokens:,} of another dataset: its content changed "
                    f"(manifest {known.manifest}, now {manifest})",
                    hint="give the new dataset a new source name; it then starts from its beginning",
                )
        return replace(self, sources=sources)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Ledger:
        sources = {name: SourcePosition(**position) for name, position in raw["sources"].items()}
        blend = raw.get("blend")
        return cls(raw["samples"], raw["tokens"], sources, None if blend is None else BlendStart(**blend))
