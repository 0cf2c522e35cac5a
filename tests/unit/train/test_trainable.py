"""A run that trains a part of the weights: the rest keeps its values, is not saved, and comes from the base again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.config.trainable import AllWeights, trainable_of
from megatron_cpt.errors import CheckpointError
from megatron_cpt.model.build import build_model
from megatron_cpt.model.load_hf import load_hf_weights
from megatron_cpt.model.load_megatron import check_keys, load_megatron_weights
from megatron_cpt.train.checkpoint_state import optimizer_sharding, put_state, saved_state, wanted_state
from megatron_cpt.train.state import TrainState, build_train_state, unwrap
from megatron_cpt.train.step import train_step
from tests.parity.tiny_models import save_tiny_model
from tests.unit.model.conftest import make_config, single_rank  # noqa: F401 - a fixture
from tests.unit.train.test_step import batch


class OnlyNorms(AllWeights):
    """Norms are trained and saved; everything else is the base model's."""

    saves_every_weight = False

    def trains(self, name: str) -> bool:
        return "norm" in name

    def saves(self, name: str) -> bool:
        return "norm" in name


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("base", tmp_path_factory.mktemp("models"))


def build(model_dir: Path, *, read_base: bool = True, distributed_optimizer: bool = True) -> TrainState:
    config = make_config(model_dir, parallel={"distributed_optimizer": distributed_optimizer})
    arch = read_architecture(model_dir)
    return build_train_state(config, arch, trainable=OnlyNorms(arch, 4), read_base=read_base)


def values(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in unwrap(state.chunks[0]).named_parameters()}


def load(state: TrainState, folder: Path) -> None:
    wanted = wanted_state(state, optimizer_sharding(state.config), with_random=True)
    check_keys(wanted, folder, surplus_allowed=lambda key: False)
    put_state(state, dist_checkpointing.load(wanted, str(folder)), folder)


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_a_part_of_the_weights_is_trained_saved_and_resumed(
    model_dir: Path, tmp_path: Path, distributed_optimizer: bool
) -> None:
    state = build(model_dir, distributed_optimizer=distributed_optimizer)
    before = values(state)
    train_step(state, [batch()])
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    dist_checkpointing.save(saved_state(state), str(folder))
    train_step(state, [batch()])
    after = values(state)
    for name, old in before.items():
        assert torch.equal(old, after[name]) == ("norm" not in name), name

    keys = dist_checkpointing.load_tensors_metadata(str(folder)).keys()
    assert keys and all("norm" in key for key in keys)
    resumed = build(model_dir, distributed_optimizer=distributed_optimizer)
    load(resumed, folder)
    train_step(resumed, [batch()])
    assert all(torch.equal(after[name], value) for name, value in values(resumed).items())

    # negative controls: without the base the rest is found to be unset; a run that trains all weights refuses it
    with pytest.raises(CheckpointError, match="incomplete or not finite"):
        load(build(model_dir, read_base=False, distributed_optimizer=distributed_optimizer), folder)
    whole = build_train_state(resumed.config, resumed.arch)
    with pytest.raises(CheckpointError, match=r"linear_fc1\.weight is missing"):
        load(whole, folder)


def test_a_checkpoint_is_read_into_the_memory_of_the_model_and_the_optimizer(model_dir: Path, tmp_path: Path) -> None:
    state = build_train_state(make_config(model_dir), read_architecture(model_dir))
    train_step(state, [batch()])
    dist_checkpointing.save(saved_state(state), str(tmp_path))
    wanted = wanted_state(state, optimizer_sharding(state.config), with_random=True)
    loaded = dist_checkpointing.load(wanted, str(tmp_path))
    model = unwrap(state.chunks[0])
    assert all(loaded["model"][name].data_ptr() == p.data_ptr() for name, p in model.named_parameters())
    (optimizer,) = state.optimizer.chained_optimizers
    states = [optimizer._get_main_param_and_optimizer_states(p) for p in model.parameters()]
    own = {tensor.data_ptr() for held in states for tensor in held.values() if isinstance(tensor, torch.Tensor)}
    read = [box for boxes in loaded["optimizer"]["param_state"].values() for box in boxes.values()]
    assert {box.data_ptr() for box in read} >= own
    assert sum(box.numel() for box in read) == 3 * sum(p.numel() for p in model.parameters())

    # negative control, and a loader that copies: what it gives is taken over all the same
    copies = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, loaded)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = [held["exp_avg"].clone() for held in states]
    for held in states:
        held["exp_avg"].zero_()
    for parameter in model.parameters():
        parameter.data.zero_()
    put_state(state, copies, tmp_path)
    assert all(torch.equal(expected[name], p) for name, p in model.named_parameters())
    assert all(
        torch.equal(held["exp_avg"], moment) and moment.any() for held, moment in zip(states, moments, strict=True)
    )


def test_weights_that_are_not_in_the_base_are_left_alone(model_dir: Path, tmp_path: Path) -> None:
    arch = read_architecture(model_dir)

    def in_base(name: str) -> bool:
        return "final_layernorm" not in name

    (model,) = build_model(make_config(), arch)
    torch.nn.init.constant_(model.decoder.final_layernorm.weight, 7.0)
    load_hf_weights([model], model_dir, arch, in_base)
    assert bool((model.decoder.final_layernorm.weight == 7.0).all())
    kept = {key: shard for key, shard in model.sharded_state_dict().items() if in_base(key)}
    (tmp_path / "base").mkdir()
    dist_checkpointing.save({"model": kept}, str(tmp_path / "base"))
    (other,) = build_model(make_config(), arch)
    torch.nn.init.constant_(other.decoder.final_layernorm.weight, 5.0)
    load_megatron_weights([other], tmp_path / "base", in_base)
    assert bool((other.decoder.final_layernorm.weight == 5.0).all())
    assert torch.equal(model.output_layer.weight, other.output_layer.weight)
    with pytest.raises(CheckpointError, match=r"final_layernorm\.weight is missing"):
        load_megatron_weights([other], tmp_path / "base")


def test_size_and_work_of_a_run_that_trains_all_weights(model_dir: Path) -> None:
    arch = read_architecture(model_dir)
    all_weights = trainable_of(make_config(), arch)
    assert all_weights.checkpoint_bytes() == 16 * arch.num_parameters
    assert trainable_of(make_config(precision={"dtype": "bf16"}), arch).checkpoint_bytes() == 14 * arch.num_parameters
    products = arch.num_parameters - arch.vocab_size * arch.hidden_size  # untied: the embedding is a look-up
    assert all_weights.flops_per_token(0) == 6 * products
    tied = AllWeights(dataclasses.replace(arch, tie_word_embeddings=True), 4)
    assert tied.flops_per_token(0) == 6 * tied.arch.num_parameters
    width = arch.num_attention_heads * arch.head_dim
    assert all_weights.flops_per_token(100) - all_weights.flops_per_token(0) == 6 * 100 * width * arch.num_layers
