"""Which weights a run trains, and what follows from that: what a checkpoint holds, its size, the work of a token.

The rest of the program asks here and assumes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.linears import linears
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.sections.lora import LoraConfig

_OPTIMIZER_BYTES = 12  # per trained parameter: fp32 master weight and two moments


class Trainable(Protocol):
    """Asked by name; names are those of a checkpoint, with layers counted over the whole model.

    Layers share one key in a checkpoint: a kind of weight is saved for all layers or for none.
    """

    @property
    def saves_every_weight(self) -> bool:
        """Whether a checkpoint holds the whole model; if not, resuming reads the base model too."""
        ...

    def in_base(self, name: str) -> bool:
        """Whether the weight comes from `model.init_from`."""
        ...

    def trains(self, name: str) -> bool:
        """Whether the weight has a gradient."""
        ...

    def saves(self, name: str) -> bool:
        """Whether a checkpoint holds the weight; true for each that is trained."""
        ...

    def checkpoint_bytes(self) -> int:
        """Return the predicted size of a checkpoint."""
        ...

    def flops_per_token(self, seq_length: int) -> float:
        """Return the floating point operations, forward and backward, of one trained token."""
        ...


@dataclass(frozen=True)
class AllWeights:
    """Every weight is trained and saved."""

    arch: Architecture
    weight_bytes: int  # of one weight in the model's dtype

    @property
    def saves_every_weight(self) -> bool:
        return True

    def in_base(self, name: str) -> bool:
        return True

    def trains(self, name: str) -> bool:
        return True

    def saves(self, name: str) -> bool:
        return True

    def checkpoint_bytes(self) -> int:
        return self.arch.num_parameters * (self.weight_bytes + _OPTIMIZER_BYTES)

    def flops_per_token(self, seq_length: int) -> float:
        """6 per weight in a matrix product, 6 * seq_length * width in causal attention.

        The embedding is a look-up and costs nothing; the output layer does, tied or not. Recomputation is not counted.
        """
        arch = self.arch
        embedding = arch.vocab_size * arch.hidden_size
        weights = arch.num_parameters - (0 if arch.tie_word_embeddings else embedding)
        attention = arch.num_layers * arch.num_attention_heads * arch.head_dim * seq_length
        return 6.0 * weights + 6.0 * attention


@dataclass(frozen=True)
class Adapters:
    """Adapters are trained and saved; every weight of the model is the base's and stays as it is."""

    arch: Architecture
    weight_bytes: int  # of one weight in the model's dtype
    lora: LoraConfig

    @property
    def saves_every_weight(self) -> bool:
        return False

    def in_base(self, name: str) -> bool:
        return ".lora." not in name

    def trains(self, name: str) -> bool:
        return ".lora." in name

    def saves(self, name: str) -> bool:
        return ".lora." in name

    def checkpoint_bytes(self) -> int:
        return adapter_parameters(self.lora, self.arch) * (self.weight_bytes + _OPTIMIZER_BYTES)

    def flops_per_token(self, seq_length: int) -> float:
        """As of all weights, but 4 instead of 6 for a frozen one, which needs no gradient of its own."""
        arch = self.arch
        weights = arch.num_parameters - (0 if arch.tie_word_embeddings else arch.vocab_size * arch.hidden_size)
        all_weights = AllWeights(arch, self.weight_bytes).flops_per_token(seq_length)
        return all_weights - 2.0 * weights + 6.0 * adapter_parameters(self.lora, arch)


def adapter_parameters(lora: LoraConfig, arch: Architecture) -> int:
    """Return the parameters of all adapters of the model; 0 when none are trained."""
    of_model = linears(arch)
    sizes = [of_model[name].in_features + of_model[name].out_features for name in lora.targets]
    return (lora.rank or 0) * sum(sizes) * arch.num_layers


def trainable_of(config: RunConfig, arch: Architecture) -> Trainable:
    """Return what a run of `config` on a model of `arch` trains."""
    weight_bytes = 2 if config.precision.dtype == "bf16" else 4
    return Adapters(arch, weight_bytes, config.lora) if config.lora.on else AllWeights(arch, weight_bytes)
