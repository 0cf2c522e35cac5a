"""What one stage sends is what its neighbour expects, or the first difference is named."""

from __future__ import annotations

import torch

from megatron_cpt.dry_run.exchange import exchange_faults
from megatron_cpt.dry_run.live_bytes import Message

SENT = Message("send", 1, (8, 1, 64), torch.bfloat16)
EXPECTED = Message("recv", 0, (8, 1, 64), torch.bfloat16)


def test_messages_that_pair_up_are_no_fault() -> None:
    back, into = Message("send", 0, (8, 1, 64), torch.bfloat16), Message("recv", 1, (8, 1, 64), torch.bfloat16)
    assert exchange_faults({0: [SENT, SENT, into], 1: [EXPECTED, EXPECTED, back]}) == []


def test_another_shape_another_dtype_a_missing_one_and_a_stranger_are_found() -> None:
    wider = Message("recv", 0, (8, 1, 96), torch.bfloat16)
    assert exchange_faults({0: [SENT, SENT], 1: [EXPECTED, wider]}) == [
        "stage 0 to stage 1, tensor 2 of a step: bfloat16 (8, 1, 64) is sent, bfloat16 (8, 1, 96) is expected"
    ]
    in_fp32 = Message("recv", 0, (8, 1, 64), torch.float32)
    assert "float32 (8, 1, 64) is expected" in exchange_faults({0: [SENT], 1: [in_fp32]})[0]
    assert "nothing is expected" in exchange_faults({0: [SENT], 1: []})[0]
    assert "nothing is sent" in exchange_faults({0: [], 1: [EXPECTED]})[0]
    assert "stage 1, which does not exist" in exchange_faults({0: [SENT]})[0]
