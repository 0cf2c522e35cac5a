"""The order of the sources: within one sample of what is due, whatever the shares do, and a function of the ledger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.config.mix import MixPiece, normalised
from megatron_cpt.data.blend import Blend
from megatron_cpt.data.ledger import Ledger

SEQ = 128
NAMES = "abcdefg"


def constant(**weights: float) -> tuple[MixPiece, ...]:
    shares = normalised({name: Fraction(str(weight)) for name, weight in weights.items()})
    return (MixPiece(0, None, shares, shares),)


def begun(names: Sequence[str]) -> Ledger:
    return Ledger().with_sources(dict.fromkeys(names, "manifest"), SEQ)


def drawn(blend: Blend, ledger: Ledger, samples: int, seq_length: int = SEQ) -> tuple[list[str], Ledger]:
    ledger = ledger.in_blend(blend.key)
    names = list(blend.draw(ledger, samples, seq_length))
    return names, ledger.advanced(Counter(names), seq_length)


@st.composite
def mixes(draw: st.DrawFn) -> tuple[MixPiece, ...]:
    """Up to seven sources, up to four pieces of lines and steps, some of them without a share for a while."""
    names = NAMES[: draw(st.integers(1, 7))]
    weights = st.tuples(*[st.integers(0, 50) for _ in names]).filter(any)

    def shares() -> dict[str, Fraction]:
        return normalised({name: Fraction(weight) for name, weight in zip(names, draw(weights), strict=True)})

    bounds = [0, *sorted(draw(st.sets(st.integers(1, 400 * SEQ), max_size=3))), None]
    pieces = []
    for start, end in pairwise(bounds):
        first = shares()
        last = shares() if end is not None and draw(st.booleans()) else first
        pieces.append(MixPiece(start or 0, end, first, last))
    return tuple(pieces)


@given(mixes(), st.sampled_from([SEQ, 96, 131]))
@settings(max_examples=150, deadline=None)
def test_every_source_is_within_one_sample_of_its_due_after_every_sample(
    mix: tuple[MixPiece, ...], seq_length: int
) -> None:
    blend = Blend(mix)
    names, _ = drawn(blend, begun(NAMES), 500, seq_length)
    bound = Fraction(2 * len(blend.names) - 3, 2 * len(blend.names) - 2) if len(blend.names) > 1 else 0
    given_tokens: Counter[str] = Counter()
    for number, name in enumerate(names, 1):
        given_tokens[name] += seq_length
        due = {n: blend._due(n, number * seq_length) for n in blend.names}
        assert sum(due.values()) == number * seq_length
        assert all(abs(due[n] - given_tokens[n]) <= bound * seq_length for n in blend.names)


@given(mixes(), st.lists(st.integers(1, 40), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_steps_of_any_size_and_any_resume_give_the_same_order(mix: tuple[MixPiece, ...], steps: list[int]) -> None:
    whole, end = drawn(Blend(mix), begun(NAMES), sum(steps))
    parts: list[str] = []
    ledger = begun(NAMES)
    for samples in steps:
        names, ledger = drawn(Blend(mix), Ledger.from_json(ledger.to_json()), samples)
        parts += names
    assert parts == whole and ledger == end


def test_a_changed_blend_is_due_from_where_it_changed() -> None:
    _, ledger = drawn(Blend(constant(a=9, b=1)), begun("ab"), 100)
    names, later = drawn(Blend(constant(a=1, b=1)), ledger, 10)
    assert Counter(names) == {"a": 5, "b": 5}, "b must not make up for what the earlier blend did not give it"
    names, _ = drawn(Blend(constant(a=1, b=1)), later, 10)  # the same blend goes on
    assert Counter(names) == {"a": 5, "b": 5} and later.blend is not None and later.blend.tokens == 100 * SEQ


def test_a_source_without_a_share_is_as_if_it_were_not_there() -> None:
    assert (
        drawn(Blend(constant(a=2, b=1, c=0)), begun("abc"), 90)[0]
        == drawn(Blend(constant(a=2, b=1)), begun("ab"), 90)[0]
    )
    assert Blend(constant(a=2, b=1, c=0)).key == Blend(constant(a=2, b=1)).key != Blend(constant(a=1, b=1)).key


def test_a_line_from_half_to_nine_tenths() -> None:
    half, most = ({"d": Fraction(d, 10), "r": Fraction(10 - d, 10)} for d in (5, 9))
    blend = Blend((MixPiece(0, 1000 * SEQ, half, most), MixPiece(1000 * SEQ, None, most, most)))
    names, ledger = drawn(blend, begun("dr"), 2000)
    assert abs(names[:1000].count("d") - 700) <= 1 and abs(names[1000:].count("d") - 900) <= 1
    assert abs(names[:100].count("d") - 52) <= 1 and abs(names[900:1000].count("d") - 88) <= 1
    assert blend.shares_at(500 * SEQ) == {"d": 0.7, "r": pytest.approx(0.3)}
    assert abs(float(blend.due_tokens(ledger, 3000 * SEQ)["d"]) - 900 * SEQ) <= SEQ


def test_far_into_a_run_a_draw_needs_no_walk_from_its_beginning() -> None:
    shares = normalised({"a": Fraction(60), "b": Fraction(25), "c": Fraction(15)})
    rest = normalised({"a": Fraction(1), "b": Fraction(1), "c": Fraction(98)})
    blend = Blend((MixPiece(0, 10**13, shares, rest), MixPiece(10**13, None, rest, rest)))
    ledger = begun("abc").in_blend(blend.key)
    half = 5 * 10**12 // SEQ
    given_samples = {name: round(blend._due(name, half * SEQ) / SEQ) for name in "ab"}
    given_samples["c"] = half - sum(given_samples.values())
    far = ledger.advanced(given_samples, SEQ)
    names, _ = drawn(blend, far, 1000)
    expected = {name: blend._due(name, far.tokens + 1000 * SEQ) - given_samples[name] * SEQ for name in "abc"}
    assert all(abs(names.count(name) - expected[name] / SEQ) <= 1 for name in "abc")
