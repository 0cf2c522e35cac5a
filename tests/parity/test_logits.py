"""Logits equal transformers' for each family, tied and untied, under TP and PP; wrong weights are noticed."""

from __future__ import annotations

import pytest

from tests.parity.conftest import RESULTS
from tests.parity.rows import FAMILY_MODELS, LOGITS_ROWS, LogitsRow


@pytest.mark.parametrize("row", [r for r in LOGITS_ROWS if r.sabotage is None], ids=lambda row: row.name)
def test_logits_equal_transformers(row: LogitsRow, parity_results: RESULTS) -> None:
    assert parity_results(row.ranks)[row.name]["difference"] <= row.bound


@pytest.mark.parametrize("row", [r for r in LOGITS_ROWS if r.sabotage is not None], ids=lambda row: row.name)
def test_sabotage_is_noticed(row: LogitsRow, parity_results: RESULTS) -> None:
    assert parity_results(row.ranks)[row.name]["difference"] > 100 * row.bound


def test_every_family_is_covered() -> None:
    from megatron_cpt.architecture.families import FAMILIES

    assert len(LOGITS_ROWS) == 3 * len(FAMILY_MODELS) + 14
    for family in FAMILIES:
        assert any(name.startswith(family) for name in FAMILY_MODELS)


def test_a_weight_damaged_for_one_rank_is_one_error_on_all(parity_results: RESULTS) -> None:
    first, second = parity_results(2)["damaged_load"]["messages"]
    assert "model.layers.0.mlp.down_proj.weight" in second and "NaN" in second
    assert first == f"rank 1: {second}"
