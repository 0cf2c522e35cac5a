"""FusedAdamW: torch's numbers with apex's state layout."""

from __future__ import annotations

import copy

import torch

from megatron_cpt.runtime.adamw import FusedAdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def steps(optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], count: int, first: int = 0) -> None:
    for step in range(first, first + count):
        for index, parameter in enumerate(parameters):
            generator = torch.Generator().manual_seed(100 * step + index)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def parameters() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.randn(33))]


def test_same_numbers_as_torch() -> None:
    ours, theirs = parameters(), parameters()
    steps(FusedAdamW(ours, **SETTINGS), ours, 20)
    steps(torch.optim.AdamW(theirs, **SETTINGS, fused=True), theirs, 20)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_step_is_kept_per_group() -> None:
    ours = parameters()
    optimizer = FusedAdamW(ours, **SETTINGS)
    steps(optimizer, ours, 3)
    assert [group["step"] for group in optimizer.param_groups] == [3]
    assert set(optimizer.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}


def test_reloaded_state_continues_bit_for_bit() -> None:
    straight, stopped = parameters(), parameters()
    steps(FusedAdamW(straight, **SETTINGS), straight, 10)
    first = FusedAdamW(stopped, **SETTINGS)
    steps(first, stopped, 4)
    second = FusedAdamW(stopped, **SETTINGS)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(second, stopped, 6, first=4)
    for a, b in zip(straight, stopped, strict=True):
        assert torch.equal(a, b)


def test_parameters_without_gradient_stay() -> None:
    ours = parameters()
    before = ours[1].clone()
    optimizer = FusedAdamW(ours, **SETTINGS)
    ours[0].grad = torch.ones_like(ours[0])
    optimizer.step()
    assert torch.equal(ours[1], before)
