"""Bytes count from the operation that makes them until they are freed."""

from __future__ import annotations

import torch

from megatron_cpt.dry_run.live_bytes import LiveBytes, storage_bytes

KIB = 1024


def on_meta(elements: int) -> torch.Tensor:
    return torch.empty(elements, dtype=torch.uint8, device="meta")


def test_what_is_freed_no_longer_counts_and_the_peak_stays() -> None:
    with LiveBytes() as live:
        first = on_meta(3 * KIB)
        second = on_meta(KIB)
        view = second.view(2, -1)[0]
        del first, second
        assert live.live == KIB  # the view keeps all of it alive
        third = on_meta(KIB)
        assert live.live == 2 * KIB
        del view, third
    assert live.live == 0 and live.peak == 4 * KIB


def test_what_was_there_before_does_not_count() -> None:
    weight = on_meta(KIB)
    with LiveBytes(storage_bytes([weight])) as live:
        weight.add_(1)
        half = weight[: KIB // 2]
        assert live.live == 0
        del half
    with LiveBytes() as live:
        weight.add_(1)
    assert live.live == KIB


def test_a_backward_pass_is_transient_and_what_it_needs_is_kept() -> None:
    weight = torch.empty(256, 256, device="meta", requires_grad=True)  # 256 KiB
    with LiveBytes(storage_bytes([weight])) as live:
        x = torch.empty(64, 256, device="meta")  # 64 KiB
        kept = torch.mm(x, weight)
        live.forward_part = "logits"
        loss = (kept * kept).sum()
        forward = live.live
        loss.backward()
    assert forward == 2 * 64 * KIB + 4  # x, kept, the sum: the square itself is not needed
    assert live.at_peak["transient"] >= 256 * KIB  # the gradient of the weight
    assert live.at_peak["activations"] == 2 * 64 * KIB
