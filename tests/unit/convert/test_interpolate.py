"""Weights between two models: exact at both ends, rounded once in between, from any format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
import torch
from tiny_checkpoints import assert_same_weights, change_tensors, hf_tensors, write_hf

from checkpoint_convert.checkpoint import MismatchError
from checkpoint_convert.convert import Options, convert
from checkpoint_convert.interpolate import interpolated
from checkpoint_convert.open import open_checkpoint
from megatron_cpt.commands.interpolate import interpolate
from megatron_cpt.errors import ConversionError


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """`trained` and `base`, of which one weight is a negative zero."""
    write_hf(tmp_path / "trained")
    write_hf(tmp_path / "base", scale=0.3)
    change_tensors(tmp_path / "base", model__norm__weight=torch.full((32,), -0.0, dtype=torch.bfloat16))
    return tmp_path


def mix(folder: Path, ratio: float, out: str, *more: str, base: str = "base", source: str = "trained") -> Any:
    arguments = [str(folder / source), str(folder / out), "--ratio", str(ratio), "--base-model", str(folder / base)]
    interpolate.main([*arguments, *more], standalone_mode=False)
    return hf_tensors(folder / out)


def test_both_ends_are_the_models_themselves(models: Path) -> None:
    mix(models, 1.0, "one")
    mix(models, 0.0, "zero")
    assert_same_weights(models / "one", models / "trained")
    assert_same_weights(models / "zero", models / "base")


def test_in_between_every_weight_is_interpolated_in_fp32_and_rounded_once(models: Path) -> None:
    found, ends = mix(models, 0.25, "out"), [hf_tensors(models / name) for name in ("base", "trained")]
    assert found.keys() == ends[0].keys()
    for name, tensor in found.items():
        exact = 0.75 * ends[0][name].double() + 0.25 * ends[1][name].double()
        assert torch.equal(tensor, exact.float().bfloat16()), name


def test_the_base_may_be_of_another_format_and_dtype(models: Path) -> None:
    write_hf(models / "wide", scale=0.3, dtype=torch.float32)
    options = Options(to="torch_dist", tp=2, gammas_less_one=True)
    convert(open_checkpoint(models / "wide"), models / "megatron", options)
    ours, plain = mix(models, 0.5, "ours", base="megatron"), mix(models, 0.5, "plain", base="wide")
    for name, tensor in ours.items():
        close = {"rtol": 0.0, "atol": 0.02 if name.endswith("norm.weight") else 0.0}  # stored minus 1: rounded there
        torch.testing.assert_close(tensor, plain[name], **close)


def test_the_receipt_says_what_was_mixed(models: Path) -> None:
    source, base = open_checkpoint(models / "trained"), open_checkpoint(models / "base")
    receipt = convert(interpolated(source, base, 0.5), models / "out", Options(to="hf"))
    assert (receipt["share"], receipt["merged_from"]) == (0.5, str(models / "base"))
    plain = convert(base, models / "copy", Options(to="hf"))
    hashes = [{t["name"]: t[key] for t in r["tensors"]} for r, key in ((receipt, "other_sha256"), (plain, "sha256"))]
    assert hashes[0] == hashes[1]
    assert "0.5 times the trained one" in (models / "out/README.md").read_text()


def test_a_base_that_is_not_what_its_receipt_says_is_refused(models: Path) -> None:
    convert(open_checkpoint(models / "base"), models / "copy", Options(to="hf"))
    mix(models, 0.5, "sound", base="copy")
    change_tensors(models / "copy", model__norm__weight=torch.ones(32, dtype=torch.bfloat16))
    with pytest.raises(MismatchError, match="copy: 1 tensors are not what"):
        mix(models, 0.5, "damaged", base="copy")


def test_what_cannot_be_mixed_is_refused(models: Path) -> None:
    write_hf(models / "other", num_hidden_layers=2)
    with pytest.raises(ConversionError, match="different models: num_layers 4 and 2"):
        mix(models, 0.5, "out", base="other")
    with pytest.raises(ConversionError, match="both models are"):
        mix(models, 0.5, "out", base="trained")
    with pytest.raises(ConversionError, match="is not named there"):
        interpolate.main([str(models / "trained"), str(models / "out"), "--ratio", "0.5"], standalone_mode=False)
    with pytest.raises(click.BadParameter, match="not in the range"):
        mix(models, 1.5, "out")
    assert not (models / "out").exists()
