"""Which source gives the next sample, so that each has had its share to within one sample after every sample.

The mix of a run says which share of the tokens each source has, constant or changing with the tokens consumed; its
integral is what a source is due. A source may give its next sample once a part of 1 / (2 k - 2) of it is due, k being
the number of sources, and must before all but such a part is; of those that may, the one that must first is taken.
Then no source is ever further from its due than 1 - 1 / (2 k - 2) of a sample, however the shares change: Tijdeman
1980, "The chairman assignment problem", Discrete Mathematics 32.

All of it follows from what each source has given since the mix began, which the ledger holds. The sums are exact.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_cpt.config.mix import MixPiece, shares_at
from megatron_cpt.data.ledger import Ledger


@dataclass(frozen=True)
class _Stretch:
    """What one source is due over one piece of the mix: `before`, and from there the integral of its share.

    With t tokens of the piece done, `length` L, and shares as whole parts of 1 / `unit`, it is
    before + (2 L first t + (last - first) t^2) / (2 L unit): a whole number of parts, which is what is compared.
    """

    start_tokens: int
    length: int  # tokens; of an endless stretch any number
    endless: bool
    unit: int
    before: Fraction
    first: int
    last: int

    def due(self, tokens: int) -> Fraction:
        """Return the tokens due once `tokens` are consumed in all."""
        return self.before + Fraction(self._parts(tokens - self.start_tokens), 2 * self.length * self.unit)

    def reaching(self, due: Fraction) -> int | None:
        """Return the first token of the stretch at which so much is due, None where that is not within it."""
        wanted = math.ceil((due - self.before) * 2 * self.length * self.unit)
        linear, square = 2 * self.length * self.first, self.last - self.first
        if wanted <= 0:
            return self.start_tokens
        if square == 0:
            done = -(-wanted // linear) if linear else None
        elif (root := linear * linear + 4 * square * wanted) >= 0:
            done = (math.isqrt(root) - linear) // (2 * square)  # to within one, which the next lines mend
            while done > 0 and self._parts(done - 1) >= wanted:
                done -= 1
            while done <= self.length and self._parts(done) < wanted:
                done += 1
        else:
            done = None
        return None if done is None or (done > self.length and not self.endless) else self.start_tokens + done

    def _parts(self, done: int) -> int:
        return done * (2 * self.length * self.first + (self.last - self.first) * done)


class Blend:
    """Draws the sources of a mix. `key` is another one for another mix."""

    def __init__(self, mix: Sequence[MixPiece]) -> None:
        self.mix = tuple(mix)
        # Sources that never have a share are not there: they change nothing for the others.
        self.names = tuple(name for name in mix[0].first if any(p.first[name] or p.last[name] for p in mix))
        self._stretches = {name: tuple(_stretches(self.mix, name)) for name in self.names}
        self.key = hashlib.sha256(repr([(name, self._stretches[name]) for name in self.names]).encode()).hexdigest()[
            :16
        ]

    def shares_at(self, tokens: int) -> dict[str, float]:
        """Return each source's share at `tokens` of the run."""
        return shares_at(self.mix, tokens)

    def due_tokens(self, ledger: Ledger, tokens: int) -> dict[str, Fraction]:
        """Return what each source has yet to give from `ledger` until `tokens` are consumed in all."""
        start = ledger.in_blend(self.key).blend
        assert start is not None
        return {
            name: self._due(name, tokens) - self._due(name, start.tokens) - ledger.tokens_since(start, name)
            for name in self.names
        }

    def draw(self, ledger: Ledger, samples: int, seq_length: int) -> Iterator[str]:
        """Yield the source of each of the next `samples` samples after `ledger`, which stands in this blend."""
        start = ledger.blend
        assert start is not None and start.key == self.key, "ask the ledger to stand in this blend first"
        slack = Fraction(seq_length, max(2, 2 * len(self.names) - 2))
        given = {name: self._due(name, start.tokens) + ledger.tokens_since(start, name) for name in self.names}
        may = {name: self._reaching(name, given[name] + slack) for name in self.names}
        must = {name: self._reaching(name, given[name] + seq_length - slack) for name in self.names}
        for consumed in range(ledger.tokens, ledger.tokens + samples * seq_length, seq_length):
            ready = [name for name in self.names if may[name] <= consumed + seq_length]
            # One is always ready; the order of the names decides between equals.
            name = min(ready, key=lambda name: must[name])
            yield name
            given[name] += seq_length
            may[name] = self._reaching(name, given[name] + slack)
            must[name] = self._reaching(name, given[name] + seq_length - slack)

    def _due(self, name: str, tokens: int) -> Fraction:
        stretch = next(s for s in reversed(self._stretches[name]) if s.start_tokens <= tokens)
        return stretch.due(tokens)

    def _reaching(self, name: str, due: Fraction) -> float:
        """Tokens of the run at which so much of the source is due; infinity where it never is."""
        found = (stretch.reaching(due) for stretch in self._stretches[name])
        return next((tokens for tokens in found if tokens is not None), math.inf)


def _stretches(mix: Sequence[MixPiece], name: str) -> Iterator[_Stretch]:
    before = Fraction(0)
    for piece in mix:
        first, last = piece.first[name], piece.last[name]
        unit = math.lcm(first.denominator, last.denominator)
        endless = piece.end_tokens is None
        length = 1 if piece.end_tokens is None else piece.end_tokens - piece.start_tokens
        stretch = _Stretch(piece.start_tokens, length, endless, unit, before, int(first * unit), int(last * unit))
        yield stretch
        before = stretch.due(piece.start_tokens + length)
