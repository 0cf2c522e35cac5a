"""Labels drawn from a vocabulary: the model's own distribution, never padding, and defined at both ends."""

from __future__ import annotations

import math

import torch

from megatron_cpt.forgetting.sampled_labels import sampled_labels


def test_labels_are_as_frequent_as_the_model_says_and_padding_is_never_drawn() -> None:
    draws, real, rows = 20_000, 5, 8
    logits = torch.tensor([0.0, 1.0, -2.0, 2.0, 0.5, 9.0, 9.0, 9.0]).expand(draws, 1, rows)
    uniform = torch.rand(draws, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = sampled_labels(logits, uniform, real_rows=real)
    found = torch.bincount(labels.flatten(), minlength=rows) / draws
    wanted = logits[0, 0, :real].softmax(0)
    assert found[real:].sum() == 0
    for share, probability in zip(found[:real].tolist(), wanted.tolist(), strict=True):
        assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / draws)


def test_both_ends_of_the_line_are_tokens_that_can_occur() -> None:
    logits = torch.tensor([-1e4, 0.0, 0.0, -1e4]).expand(2, 1, 4)  # the first and the last never occur
    uniform = torch.tensor([[0.0], [1.0 - 2.0**-53]], dtype=torch.float64)
    assert sampled_labels(logits, uniform, real_rows=4).flatten().tolist() == [1, 2]


def test_samples_are_drawn_apart_and_logits_are_kept() -> None:
    logits = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(0))
    before, uniform = logits.clone(), torch.rand(3, 2, dtype=torch.float64)
    labels = sampled_labels(logits, uniform, real_rows=6)
    below = logits.double().softmax(-1).cumsum(-1)
    assert torch.equal(labels, (below <= uniform.unsqueeze(-1)).sum(-1))
    assert torch.equal(logits, before)
