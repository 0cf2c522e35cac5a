"""The penalty's gradient and value, whole or in parts, and that a copy of a parameter is not counted twice."""

from __future__ import annotations

import pytest
import torch

from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

adapt_megatron_core_to_cpu()

from megatron_cpt.forgetting import ewc  # noqa: E402
from megatron_cpt.forgetting.ewc import WeightPenalty  # noqa: E402
from megatron_cpt.model.owned_parameters import OwnedParameter  # noqa: E402


def owned(elements: int, counted: bool) -> OwnedParameter:
    main = torch.randn(elements)
    main.grad = torch.randn(elements)
    return OwnedParameter("weight", (elements,), 0, elements, counted, main)


@pytest.mark.parametrize("part", [2**17, 7])
@pytest.mark.parametrize("with_fisher", [True, False])
def test_gradient_and_value_are_those_of_the_formula(
    part: int, with_fisher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ewc, "_CPU_PART_ELEMENTS", part)
    torch.manual_seed(0)
    parameters = [owned(23, counted=True), owned(14, counted=False)]
    base = [torch.randn(len(parameter.values)) for parameter in parameters]
    fisher = [torch.rand(len(tensor)) for tensor in base] if with_fisher else None
    before = [parameter.gradient.clone() for parameter in parameters]
    value = WeightPenalty(3.0, base, fisher).add_gradients(parameters)
    weights = fisher or [torch.ones_like(tensor) for tensor in base]
    for parameter, start, its, f in zip(parameters, before, base, weights, strict=True):
        torch.testing.assert_close(parameter.gradient, start + 3.0 * f * (parameter.values - its))
    wanted = 1.5 * (weights[0] * (parameters[0].values - base[0]).square()).sum()  # the second is somebody's copy
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
