"""What share of the tokens each source has, as a function of the tokens consumed: constant, in steps or along lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction


@dataclass(frozen=True)
class MixPiece:
    """The shares from `start_tokens` on, moving along a line from `first` to `last`; each sums to 1."""

    start_tokens: int
    end_tokens: int | None  # None: for ever; then `last` is `first`
    first: Mapping[str, Fraction]  # by source
    last: Mapping[str, Fraction]

    def shares_at(self, tokens: int) -> dict[str, float]:
        """Return the shares at a token within the piece."""
        if self.end_tokens is None:
            return {name: float(share) for name, share in self.first.items()}
        way = Fraction(tokens - self.start_tokens, self.end_tokens - self.start_tokens)
        return {name: float(share + (self.last[name] - share) * way) for name, share in self.first.items()}


def shares_at(mix: tuple[MixPiece, ...], tokens: int) -> dict[str, float]:
    """Return each source's share at `tokens`, counted as the pieces count."""
    piece = next((piece for piece in reversed(mix) if piece.start_tokens <= tokens), mix[0])
    return piece.shares_at(tokens)


def beginning_at(mix: Iterable[MixPiece], tokens: int) -> tuple[MixPiece, ...]:
    """Return the pieces as they are when their count begins at `tokens` of the run."""
    return tuple(
        replace(
            piece,
            start_tokens=piece.start_tokens + tokens,
            end_tokens=None if piece.end_tokens is None else piece.end_tokens + tokens,
        )
        for piece in mix
    )


def written(number: float) -> Fraction:
    """Return the decimal number as it is written, so that 0.05 is 1/20."""
    return Fraction(str(number))


def normalised(weights: Mapping[str, Fraction]) -> dict[str, Fraction]:
    """Return the weights as shares that sum to 1 exactly."""
    whole = sum(weights.values(), Fraction(0))
    return {name: weight / whole for name, weight in weights.items()}
