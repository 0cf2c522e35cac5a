"""Where two layouts part: a few numbers per layer output and per gradient, alike under every layout.

They are means over the elements that are not zero, so it does not matter how ranks cut a tensor, in which order its
rows lie, how many ranks hold a copy, or how many rows of the vocabulary are padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_cpt.model.owned_parameters import OwnedParameter
from megatron_cpt.train.state import TrainState, unwrap

Digest = dict[str, list[float]]  # name -> [mean absolute value, root mean square]


class Recorder:
    """Digests of a state's first step. It is a penalty that adds nothing, and so sees the gradients."""

    name = "recorder"

    def __init__(self, state: TrainState) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._hooks = []
        state.penalties = (*state.penalties, self)
        for chunk in map(unwrap, state.chunks):
            if chunk.pre_process:
                self._watch(chunk.embedding, "output of the embedding")
            for layer in chunk.decoder.layers:
                self._watch(layer, f"output of layer {layer.layer_number - 1:02}")

    def _watch(self, module: torch.nn.Module, name: str) -> None:
        def record(_: Any, __: Any, output: Any) -> None:
            self._add(name, output[0] if isinstance(output, tuple) else output)

        self._hooks.append(module.register_forward_hook(record))

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        values = tensor.detach().double()
        sums = torch.stack([values.abs().sum(), values.pow(2).sum(), torch.count_nonzero(values).double()])
        self._sums[name] = self._sums.get(name, torch.zeros_like(sums)) + sums

    def add_gradients(self, parameters: Sequence[OwnedParameter]) -> None:
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for parameter in parameters:
            self._add(f"gradient of {parameter.name}", parameter.gradient)

    def digest(self) -> Digest:
        """Return the digest over all ranks; every rank calls it."""
        of_ranks: list[dict[str, list[float]]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(of_ranks, {name: sums.tolist() for name, sums in self._sums.items()})
        whole: dict[str, torch.Tensor] = {}
        for sums in of_ranks:
            for name, values in sums.items():
                whole[name] = whole.get(name, torch.zeros(3, dtype=torch.float64)) + torch.tensor(values).double()
        return {
            name: [float(total / count), float((squares / count).sqrt())]
            for name, (total, squares, count) in sorted(whole.items(), key=lambda item: _order(item[0]))
        }


def _order(name: str) -> tuple[bool, str]:
    """Outputs in the order of the computation, then gradients."""
    return name.startswith("gradient"), name.replace("the embedding", "a")


def parting(measured: Digest, expected: Digest) -> list[tuple[float, str]]:
    """Return (relative difference, name) of every tensor, outputs first; what is missing differs by infinity."""
    found = []
    for name in [*expected, *(set(measured) - set(expected))]:
        ours, theirs = measured.get(name), expected.get(name)
        if ours is None or theirs is None:
            found.append((float("inf"), name))
            continue
        found.append((max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(ours, theirs, strict=True)), name))
    return found


def describe(measured: Digest, expected: Digest, bound: float) -> str:
    """Say which layer output differs first in the first step, and which gradients differ most."""
    parted = parting(measured, expected)
    outputs = [(gap, name) for gap, name in parted if name.startswith("output") and gap > bound]
    gradients = sorted((gap, name) for gap, name in parted if name.startswith("gradient") and gap > bound)
    lines = [f"first: {outputs[0][1]} ({outputs[0][0]:.1e})" if outputs else "every layer output of step 1 agrees"]
    lines += [f"{name} ({gap:.1e})" for gap, name in gradients[:-6:-1]] or ["every gradient of step 1 agrees"]
    return "in the first step, by relative difference:\n  " + "\n  ".join(lines)
