"""A folder that peft wrote: read as it is meant, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_convert.convert import Options, convert
from checkpoint_convert.open import open_checkpoint
from checkpoint_convert.peft import ADAPTER_WEIGHTS, adapter_config, adapter_shapes, read_peft
from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.commands.merge_lora import merge_lora
from megatron_cpt.config.sections.lora import LoraConfig
from megatron_cpt.config.sections.model import ModelConfig
from megatron_cpt.errors import CheckpointError, ConversionError
from megatron_cpt.launch.origin import resolve_origin, side_files_dir
from megatron_cpt.runs.adapters import PEFT_CONFIG
from tests.synthetic_model import write_model

LORA = LoraConfig(rank=4, alpha=8.0, rslora=True, targets=("q_proj", "down_proj"))
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def arch(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return read_architecture(folder)


@pytest.fixture
def folder(arch: Architecture, tmp_path: Path) -> Path:
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(adapter_config(LORA, "base")))
    save_file({n: torch.ones(shape) for n, shape in adapter_shapes(LORA, arch).items()}, tmp_path / ADAPTER_WEIGHTS)
    return tmp_path


def test_what_was_written_is_read(folder: Path, arch: Architecture) -> None:
    found = read_peft(folder)
    found.check(arch)
    assert (found.lora, found.base) == (LORA, "base")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora = true"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, 'bias = "all"'),
        ({"peft_type": "IA3"}, 'peft_type = "IA3"'),
        ({"r": 0}, "rank = 0"),
        ({"r": None}, "has no r"),
        ({"lora_alpha": "much"}, "alpha = 'much'"),
    ],
)
def test_adapters_of_another_kind_are_refused(folder: Path, change: dict[str, Any], said: str) -> None:
    config = json.loads((folder / PEFT_CONFIG).read_text())
    (folder / PEFT_CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ConversionError) as error:
        read_peft(folder)
    assert said in error.value.message


def _without_one(weights: Weights) -> None:
    del weights[next(name for name in weights if ".layers.1." in name)]


def _of_another_rank(weights: Weights) -> None:
    weights.update(
        {n: w.new_ones(8, w.shape[1]) if "lora_A" in n else w.new_ones(len(w), 8) for n, w in weights.items()}
    )


def _of_the_head(weights: Weights) -> None:
    weights["base_model.model.lm_head.lora_A.weight"] = torch.ones(4, 4)


def _of_an_unknown_linear(weights: Weights) -> None:
    weights["base_model.model.model.layers.0.mlp.router.lora_A.weight"] = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_without_one, "1 tensors missing"),
        (_of_another_rank, "has shape (8, "),
        (_of_the_head, "lm_head.lora_A.weight is no factor"),
        (_of_an_unknown_linear, "router"),
    ],
)
def test_other_factors_are_refused(
    folder: Path, arch: Architecture, spoil: Callable[[Weights], None], said: str
) -> None:
    weights = load_file(folder / ADAPTER_WEIGHTS)
    spoil(weights)
    save_file(weights, folder / ADAPTER_WEIGHTS)
    with pytest.raises(ConversionError) as error:
        read_peft(folder).check(arch)
    assert said in error.value.message


def test_damaged_folders_are_refused(folder: Path) -> None:
    (folder / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(ConversionError, match=ADAPTER_WEIGHTS):
        read_peft(folder)
    (folder / PEFT_CONFIG).write_text("[1")
    with pytest.raises(ConversionError, match="is damaged"):
        read_peft(folder)


def test_bf16_weights_get_the_sum_rounded_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    work = tmp_path_factory.mktemp("bf16")
    write_model(work / "base")
    convert(open_checkpoint(work / "base"), work / "bf16", Options(to="hf", dtype="bfloat16"))
    generator = torch.Generator().manual_seed(0)
    factors = load_file(folder / ADAPTER_WEIGHTS)
    factors = {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in factors.items()}
    save_file(factors, folder / ADAPTER_WEIGHTS)
    arguments = [str(folder), str(work / "out"), "--base-model", str(work / "bf16")]
    merge_lora.main(arguments, standalone_mode=False)
    before, after = (load_file(work / name / "model.safetensors") for name in ("bf16", "out"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if (a := factors.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")) is None:
            assert torch.equal(after[name], weight)
            continue
        b = factors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
        exact = weight.double() + 8.0 / 4**0.5 * b.double() @ a.double()  # rslora
        error = (after[name].double() - exact).abs()
        assert (error <= exact.abs() * 2**-8 * 1.001 + 1e-7).all()  # half a unit in bf16's last place
        assert not torch.equal(after[name], weight)


def test_it_is_no_model(folder: Path) -> None:
    for opened in (open_checkpoint, lambda path: resolve_origin(str(path))):
        with pytest.raises(CheckpointError, match="holds adapters of peft alone") as error:
            opened(folder)
        assert error.value.hint is not None and f"merge-lora {folder} OUT" in error.value.hint
    with pytest.raises(CheckpointError, match="holds adapters of peft alone"):
        side_files_dir(ModelConfig(init_from=str(folder)))


def test_a_broken_merge_goes_on_with_its_own_adapters_only(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path_factory.mktemp("broken")
    write_model(work / "base")

    def merge(to: str) -> dict[str, Any]:
        merge_lora.main([str(folder), str(work / to), "--base-model", str(work / "base")], standalone_mode=False)
        return dict(json.loads((work / to / "conversion.json").read_text()))

    def broken(to: str) -> None:
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
            patched.setattr("checkpoint_convert.convert._check_values", _killed)
            merge(to)

    broken("same")
    receipt = merge("same")
    assert receipt["resumed_tensors"] == len(receipt["tensors"])
    broken("other")
    save_file({n: t * 2 for n, t in load_file(folder / ADAPTER_WEIGHTS).items()}, folder / ADAPTER_WEIGHTS)
    assert merge("other")["resumed_tensors"] == 0
    merge("fresh")
    same, other, fresh = (load_file(work / name / "model.safetensors") for name in ("same", "other", "fresh"))
    assert all(torch.equal(other[name], fresh[name]) for name in fresh)
    assert not all(torch.equal(same[name], fresh[name]) for name in fresh)


def _killed(*_: object) -> None:
    raise RuntimeError("killed")
