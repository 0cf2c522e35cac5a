"""What a checkpoint remembers of a run comes back; what this version does not know is an error, never dropped."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_cpt.data.ledger import Ledger
from megatron_cpt.errors import CheckpointError
from megatron_cpt.runs.marker import Marker
from megatron_cpt.train.guard import Guard
from megatron_cpt.train.position import Position


def marker(memory: dict[str, Any]) -> Marker:
    return Marker(
        iteration=7,
        consumed_tokens=700,
        ledger=Ledger(7, 700).to_json(),
        layout={},
        optimizer_sharding="replicated",
        file_bytes={},
        sha256={},
        attempt=1,
        created="",
        versions={"megatron_cpt": "9.9"},
        validation={"domain": 2.5},
        memory=memory,
    )


def test_a_position_comes_back_from_its_marker() -> None:
    guard = Guard(losses=(3.0, 2.5), skips_in_row=1, rollbacks=2)
    position = Position(7, Ledger(7, 700), {"domain": 2.5}).remembering(guard=guard)
    assert Position.from_marker(marker(position.memory_json())) == position
    assert position != Position(7, Ledger(7, 700), {"domain": 2.5})


def test_a_component_that_the_checkpoint_does_not_know_starts_afresh() -> None:
    assert Position.from_marker(marker({})).guard == Guard()


@pytest.mark.parametrize("memory", [{"gate": {"best": 1.0}}, {"guard": {"losses": [1.0]}}, {"guard": None}])
def test_memory_that_this_version_cannot_read_is_an_error(memory: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"iteration 7 .*(gate|guard)") as failure:
        Position.from_marker(marker(memory))
    assert "megatron-cpt 9.9" in str(failure.value.hint)
