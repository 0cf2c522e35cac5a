"""Rows of LoRA against transformers and peft, as data: ten AdamW steps from the same adapters on the same samples.

B is random instead of zero: with zero A has no gradient in the first step, and ten steps prove little.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from tests.parity.rows import BF16, OVERLAP, PLAIN_OPTIMIZER, SELECTIVE, SINGLES, parallel

LORA_STEPS = 10
LORA_LR = 5e-3
LOSS_BOUND, GRAD_NORM_BOUND = 5e-6, 5e-5  # absolute, and relative
FULL = {"recompute.granularity": "full"}
ALL = {"lora.rank": 8, "lora.alpha": 16.0}
RANK_3 = {"lora.rank": 3, "lora.alpha": 7.0}
RSLORA = ALL | {"lora.rslora": True}
SOME = ALL | {"lora.targets": ["q_proj", "v_proj", "up_proj", "down_proj"]}


@dataclass(frozen=True)
class LoraRow:
    name: str
    ranks: int
    overrides: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=lambda: ALL)
    model: str = "base"
    sabotage: str | None = None
    bucket_elements: int | None = None
    zero_b: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        return {"optimizer.lr": LORA_LR, **self.lora, **self.overrides}


# fmt: off
LORA_ROWS = (
    LoraRow("one", 1),
    LoraRow("one_zero_b", 1, zero_b=True),
    # The tiny models with qk norms amplify rounding where B is random: transformers in fp32 and in fp64 part by a fifth
    # of the bound within ten steps. They begin with B = 0.
    LoraRow("one_tied", 1, model="llama_tied"),
    LoraRow("one_qk_norm", 1, model="base_tied", zero_b=True),
    LoraRow("one_llama3_rope", 1, model="llama3_rope"),
    LoraRow("one_rank_3", 1, lora=RANK_3),
    LoraRow("one_rslora", 1, lora=RSLORA),
    LoraRow("one_some_targets", 1, lora=SOME),
    LoraRow("one_plain_optimizer", 1, PLAIN_OPTIMIZER),
    LoraRow("one_recompute_full", 1, FULL),
    LoraRow("one_recompute_selective", 1, SELECTIVE),
    LoraRow("tp2", 2, parallel(tp=2, sequence_parallel=False)),
    LoraRow("tp2_sp", 2, parallel(tp=2)),
    LoraRow("tp2_sp_rank_3", 2, parallel(tp=2), lora=RANK_3),
    LoraRow("tp2_sp_some_targets", 2, parallel(tp=2), lora=SOME),
    LoraRow("tp2_sp_recompute_full", 2, parallel(tp=2) | FULL),
    LoraRow("tp2_odd_vocab", 2, parallel(tp=2), model="odd_vocab"),
    LoraRow("tp2_tied", 2, parallel(tp=2), model="llama_tied"),
    LoraRow("tp2_qk_norm", 2, parallel(tp=2), model="base_tied", zero_b=True),
    LoraRow("pp2", 2, parallel(pp=2)),
    LoraRow("pp2_zero_b", 2, parallel(pp=2), zero_b=True),
    LoraRow("pp2_vpp2", 2, parallel(pp=2, vpp=2) | SINGLES),
    LoraRow("pp2_recompute_full", 2, parallel(pp=2) | FULL),
    LoraRow("pp2_tied", 2, parallel(pp=2), model="llama_tied"),
    LoraRow("cp2", 2, parallel(cp=2)),
    LoraRow("dp2", 2),
    LoraRow("dp2_plain_optimizer", 2, PLAIN_OPTIMIZER),
    LoraRow("dp2_overlap", 2, OVERLAP, bucket_elements=500),
    LoraRow("tp2_pp2", 4, parallel(tp=2, pp=2)),
    LoraRow("dp2_tp2_overlap", 4, parallel(tp=2) | OVERLAP, bucket_elements=500),
    LoraRow("dp2_pp2_vpp2_overlap", 4, parallel(pp=2, vpp=2) | OVERLAP | SINGLES, bucket_elements=500),
    LoraRow("cp2_tp2", 4, parallel(cp=2, tp=2)),
    # mistakes that others shipped
    LoraRow("sabotage_no_mark", 2, parallel(tp=2), sabotage="not_marked"),
    LoraRow("sabotage_no_copy", 2, parallel(tp=2, sequence_parallel=False), sabotage="not_copied"),
    LoraRow("sabotage_no_reduce", 2, parallel(tp=2, sequence_parallel=False), sabotage="not_reduced"),
    LoraRow("sabotage_no_module_call", 2, OVERLAP, bucket_elements=500, sabotage="not_called"),
    LoraRow("sabotage_no_hook", 1, FULL, sabotage="no_hook"),
    LoraRow("sabotage_per_shard", 2, parallel(tp=2), sabotage="drawn_per_shard"),
    LoraRow("sabotage_gate_up", 1, sabotage="gate_and_up_swapped"),
)
BF16_ROWS = (LoraRow("bf16", 1, BF16), LoraRow("tp2_bf16", 2, parallel(tp=2) | BF16), LoraRow("dp2_bf16", 2, BF16))
# fmt: on


def values(name: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
    """As `adapters.draw`, with a B that is not zero."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
    std = 0.05 if ".lora_B." in name else shape[1] ** -0.5
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@contextmanager
def sabotaged(kind: str | None) -> Iterator[None]:
    from megatron_cpt.peft import adapters, linear, pair
    from megatron_cpt.train import state

    def unmarked(self: Any, *args: Any) -> None:
        original(self, *args)
        for factor in (self.A, self.B):
            factor.sequence_parallel = False

    def from_the_shard(name: str, shape: tuple[int, int], seed: int) -> torch.Tensor:
        cut = (shape[0] // 2, shape[1]) if ".lora_B." in name else (shape[0], shape[1] // 2)
        return values(name, cut, seed).repeat(shape[0] // cut[0], shape[1] // cut[1])

    def swapped(self: Any, x: Any, output: Any) -> Any:
        whole = delta(self, x, output)
        return torch.cat(whole.chunk(2, -1)[::-1], -1) if len(self._rows) == 2 else whole

    original, delta = pair.Pair.__init__, linear.LoraColumnLinear._delta
    patches: dict[str | None, Any] = {
        "not_marked": lambda: mock.patch.object(pair.Pair, "__init__", unmarked),
        "not_copied": lambda: mock.patch.object(pair, "copy_to_tensor_model_parallel_region", lambda x, group: x),
        "not_reduced": lambda: mock.patch.object(pair, "reduce_from_tensor_model_parallel_region", lambda x, group: x),
        "not_called": lambda: mock.patch.object(pair.Pair, "__call__", pair.Pair.forward),
        "no_hook": lambda: mock.patch.object(state, "let_gradients_begin", lambda chunks: None),
        "drawn_per_shard": lambda: mock.patch.object(adapters, "draw", from_the_shard),
        "gate_and_up_swapped": lambda: mock.patch.object(linear.LoraColumnLinear, "_delta", swapped),
    }
    if kind is None:
        yield
    else:
        with patches[kind]():
            yield
