"""Shards make whole tensors or the fault is named: against counting every element."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.dry_run.shards import Shard
from megatron_cpt.dry_run.tiling import Box, Tiling, overlap
from megatron_cpt.train.optimizer_shards import boxes

WHOLE = (6, 5, 4)


def shard(offset: tuple[int, ...], shape: tuple[int, ...], *, writes: bool = True, **changes: object) -> Shard:
    return Shard("weight", "bfloat16", WHOLE, offset, shape, writes)._replace(**changes)


def tiling(*shards: Shard) -> Tiling:
    made = Tiling()
    for rank, one in enumerate(shards):
        made.add(rank, [one])
    return made


def halves() -> tuple[Shard, Shard]:
    return shard((0, 0, 0), (6, 5, 2)), shard((0, 0, 2), (6, 5, 2))


def test_two_halves_make_a_whole() -> None:
    made = tiling(*halves())
    assert made.faults() == [] and made.elements("weight") == 120 and made.shards == 2


def test_a_replica_writes_nothing_and_fills_no_hole() -> None:
    left, right = halves()
    assert tiling(left, right, left._replace(writes=False)).faults() == []
    (fault,) = tiling(left, right._replace(writes=False)).faults()
    assert "60 of 120 elements are written by no rank" in fault


def test_a_hole_is_named_with_the_layer_in_which_it_begins() -> None:
    layers = [shard((i, 0, 0), (1, 5, 4)) for i in range(6)]
    (fault,) = tiling(*layers[:4], layers[5]).faults()
    assert "20 of 120 elements" in fault and "index 4 of the first axis" in fault


def test_a_duplicate_is_found_though_the_number_of_elements_is_right() -> None:
    left, _ = halves()
    (fault,) = tiling(left, left).faults()
    assert "ranks 0 and 1 both write" in fault


def test_shards_of_different_wholes_do_not_fit_together() -> None:
    left, right = halves()
    (fault, *_) = tiling(left, right._replace(whole=(6, 5, 5))).faults()
    assert "rank 1 saves a part of bfloat16 (6, 5, 5), rank 0 of bfloat16 (6, 5, 4)" in fault
    assert "float32" in tiling(left, right._replace(dtype="float32")).faults()[0]


def test_a_shard_outside_of_the_whole_is_a_fault() -> None:
    left, right = halves()
    (fault,) = tiling(left, right._replace(offset=(0, 0, 3))).faults()
    assert "outside of the whole" in fault


def test_rows_beyond_the_true_vocabulary_do_not_count() -> None:
    made = tiling(shard((0, 0, 0), (3, 5, 4)), shard((3, 0, 0), (3, 5, 4)))
    assert made.elements("weight", rows=4) == 80


def test_ranges_of_a_flat_parameter_as_boxes_tile_it() -> None:
    """The distributed optimizer's ranges: part of a row, whole rows, part of a row."""
    cuts = [0, 17, 18, 61, 119, 120]
    made = Tiling()
    for rank, (start, stop) in enumerate(pairwise(cuts)):
        made.add(rank, [shard(offset, size) for offset, size in boxes(WHOLE, start, stop)])
    assert made.faults() == [] and made.shards > 5


_SIZES = (3, 4, 2)
_BOX = st.tuples(*(st.integers(0, n - 1) for n in _SIZES)).flatmap(
    lambda offset: st.tuples(
        st.just(offset), st.tuples(*(st.integers(0, n - o) for n, o in zip(_SIZES, offset, strict=True)))
    )
)


@given(st.lists(_BOX, max_size=7))
def test_faults_are_those_of_counting_every_element(drawn: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    counts = np.zeros(_SIZES, dtype=int)
    made = Tiling()
    for rank, (offset, shape) in enumerate(drawn):
        counts[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))] += 1
        made.add(rank, [Shard("weight", "bfloat16", _SIZES, offset, shape, True)])
    found = overlap([Box(offset, shape, rank) for rank, (offset, shape) in enumerate(drawn)])
    assert (found is not None) == bool((counts > 1).any())
    if drawn:
        assert (made.faults() == []) == bool((counts == 1).all())
