"""The fp32 values and gradients that this rank's optimizer updates, whichever of Megatron-Core's optimizers it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from megatron_cpt.errors import ConfigError
from megatron_cpt.model.load_hf import global_name


@dataclass(frozen=True)
class OwnedParameter:
    """The elements of one parameter that this rank's optimizer updates, in fp32."""

    name: str  # in a checkpoint: layers are counted over the whole model
    shape: tuple[int, ...]  # of the parameter on this rank, cut by tensor parallelism
    start: int  # the elements [start, stop) of the flattened parameter are owned here
    stop: int
    counted: bool  # in sums over all ranks: of copies that several ranks hold only one is
    main: Tensor  # what the optimizer updates, float32

    @property
    def values(self) -> Tensor:
        """stop - start elements."""
        return self.main.data.view(-1)

    @property
    def gradient(self) -> Tensor:
        """As many elements, to be changed in place; there after `optimizer.prepare_grads()`."""
        assert self.main.grad is not None
        return self.main.grad.view(-1)


def owned_parameters(models: Sequence[GPTModel], optimizer: MegatronOptimizer) -> list[OwnedParameter]:
    """Return the parameters of the bare `models` that this rank's optimizer updates.

    Raises:
        ConfigError: the optimizer keeps its moments in fewer bits, and its fp32 values out of reach.
    """
    names = {
        parameter: checkpoint_name(model, name) for model in models for name, parameter in model.named_parameters()
    }
    owned: list[OwnedParameter] = []
    for part in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        if getattr(part, "is_stub_optimizer", False):
            continue
        owned += _of_distributed(part, names) if isinstance(part, DistributedOptimizer) else _of_plain(part, names)
    return owned


def checkpoint_name(model: GPTModel, name: str) -> str:
    """Return the name in a checkpoint; the last stage's copy of tied embeddings has that of the embedding."""
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return global_name(model, name)


def _of_distributed(optimizer: DistributedOptimizer, names: dict[Tensor, str]) -> Iterator[OwnedParameter]:
    if optimizer.config.use_precision_aware_optimizer:
        raise ConfigError(
            "a penalty reads the optimizer's fp32 weights, which optimizer.moments_dtype below fp32 hides",
            hint="set optimizer.moments_dtype: fp32",
        )
    for parameter, (group, place) in optimizer.model_param_group_index_map.items():
        held = optimizer._get_model_param_range_map(parameter)["param"]
        main = optimizer.optimizer.param_groups[group]["params"][place]
        counted = _is_no_copy(parameter)
        yield OwnedParameter(names[parameter], tuple(parameter.shape), held.start, held.end, counted, main)


def _of_plain(optimizer: MegatronOptimizer, names: dict[Tensor, str]) -> Iterator[OwnedParameter]:
    first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    parameter_of = {id(getattr(parameter, "main_param", parameter)): parameter for parameter in names}
    for main in (main for group in optimizer.param_groups for main in group["params"]):
        parameter = parameter_of[id(main)]
        counted = first and _is_no_copy(parameter)
        yield OwnedParameter(names[parameter], tuple(parameter.shape), 0, main.numel(), counted, main)


def _is_no_copy(parameter: Tensor) -> bool:
    """Whether no other rank of the model counts the parameter, by the rule of Megatron-Core's gradient norm."""
    return param_is_not_shared(parameter) and bool(param_is_not_tensor_parallel_duplicate(parameter))
