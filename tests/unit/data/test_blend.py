from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data.blend import build_blend, floor_sum


@given(st.integers(0, 80), st.integers(1, 50), st.integers(0, 120), st.integers(-200, 200))
def test_floor_sum_equals_the_sum(count: int, modulus: int, stride: int, offset: int) -> None:
    assert floor_sum(count, modulus, stride, offset) == sum((stride * i + offset) // modulus for i in range(count))


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    st.integers(0, 2**32),
    st.integers(0, 10**12),
    st.integers(0, 400),
)
@settings(max_examples=60)
def test_counts_are_those_of_the_samples(weights: list[float], seed: int, first: int, samples: int) -> None:
    blend = build_blend({f"s{i}": w for i, w in enumerate(weights)}, seed)
    drawn = Counter(blend.sources(first, first + samples))
    assert blend.counts(first, first + samples) == {name: drawn[name] for name in blend.names}


@pytest.mark.parametrize("seed", [0, 1, 1234])
def test_every_source_keeps_its_share_at_every_sample(seed: int) -> None:
    weights = {"domain": 0.74, "general": 0.25, "rare": 0.01}
    drawn: Counter[str] = Counter()
    blend = build_blend(weights, seed)
    for number, source in enumerate(blend.sources(0, 20_000), start=1):
        drawn[source] += 1
        assert all(abs(drawn[name] - number * share) < 4 for name, share in weights.items())


def test_seeds_differ_and_a_seed_repeats() -> None:
    weights = {"a": 1.0, "b": 1.0}
    draw = [list(build_blend(weights, seed).sources(0, 64)) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]


def test_a_hundred_million_samples_need_no_array() -> None:
    counts = build_blend({"a": 0.9, "b": 0.1}, 3).counts(0, 100_000_000)
    assert sum(counts.values()) == 100_000_000
    assert abs(counts["b"] - 10_000_000) < 10
