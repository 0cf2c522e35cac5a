"""Every parallel layout computes what one process computes; every mistake made on purpose is noticed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.conftest import RESULTS
from tests.parity.digest import describe, parting
from tests.parity.rows import STEPS, TRAIN_ROWS, TrainRow

BASELINES = {row.name: row for row in TRAIN_ROWS}
REFERENCES = {row.baseline or row.model for row in TRAIN_ROWS}  # compared with transformers, not with themselves
HONEST = [row for row in TRAIN_ROWS if row.sabotage is None and row.name not in REFERENCES]
SABOTAGED = [row for row in TRAIN_ROWS if row.sabotage is not None]


def differences(row: TrainRow, results: RESULTS) -> tuple[float, float]:
    """(largest absolute difference of the loss, largest relative difference of the gradient norm)."""
    measured, expected = results(row.ranks)[row.name], baseline(row, results)
    assert len(measured["loss"]) == len(expected["loss"]) == STEPS
    loss = max(abs(a - b) for a, b in zip(measured["loss"], expected["loss"], strict=True))
    norm = max(abs(a - b) / b for a, b in zip(measured["grad_norm"], expected["grad_norm"], strict=True))
    return loss, norm


def baseline(row: TrainRow, results: RESULTS) -> dict[str, Any]:
    of = BASELINES[row.baseline or row.model]
    return results(of.ranks)[of.name]


@pytest.mark.parametrize("row", HONEST, ids=lambda row: row.name)
def test_layout_equals_baseline(row: TrainRow, parity_results: RESULTS) -> None:
    loss, norm = differences(row, parity_results)
    measured, expected = parity_results(row.ranks)[row.name], baseline(row, parity_results)
    agrees = loss <= row.loss_bound and norm <= row.grad_norm_bound
    assert agrees, f"loss {loss:.1e}, norm {norm:.1e}; {describe(measured['digest'], expected['digest'], 1e-5)}"
    for ours, theirs in zip(measured["terms"], expected["terms"], strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-5)
    assert measured["tokens"] == expected["tokens"]
    assert measured["source_tokens"] == expected["source_tokens"]
    for ours, theirs in zip(measured["source_loss_sums"], expected["source_loss_sums"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2 if "bf16" in row.name else 1e-5)


@pytest.mark.parametrize("row", SABOTAGED, ids=lambda row: row.name)
def test_sabotage_is_noticed(row: TrainRow, parity_results: RESULTS) -> None:
    loss, norm = differences(row, parity_results)
    assert loss > 10 * row.loss_bound
    assert norm > 10 * row.grad_norm_bound


def test_training_learns(parity_results: RESULTS) -> None:
    losses = parity_results(1)["base"]["loss"]
    assert losses[-1] < losses[0]


def test_table_has_the_layouts_that_matter() -> None:
    assert len({row.name for row in TRAIN_ROWS}) == len(TRAIN_ROWS) >= 45
    assert {row.ranks for row in TRAIN_ROWS} == {1, 2, 3, 4, 8}
    assert len(SABOTAGED) == 18


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ("sabotage_cp_order", "first: output of layer 00"),
        ("sabotage_norm_gradients", "gradient of decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"),
        ("sabotage_tied", "gradient of embedding.word_embeddings.weight"),
        ("sabotage_uneven", "first: output of layer 03"),
    ],
)
def test_a_failure_says_which_tensor(row: str, where: str, parity_results: RESULTS) -> None:
    of = BASELINES[row]
    measured, expected = parity_results(of.ranks)[row]["digest"], baseline(of, parity_results)["digest"]
    assert where in describe(measured, expected, 1e-5)


@pytest.mark.parametrize("row", [row for row in HONEST if "bf16" not in row.name], ids=lambda row: row.name)
def test_digests_do_not_depend_on_the_layout(row: TrainRow, parity_results: RESULTS) -> None:
    measured, expected = parity_results(row.ranks)[row.name]["digest"], baseline(row, parity_results)["digest"]
    assert len(expected) > 20
    assert max(parting(measured, expected))[0] < 1e-4
