"""Neighbouring pipeline stages must agree on every tensor that passes between them, in order, shape and dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from megatron_cpt.dry_run.live_bytes import Message


def exchange_faults(messages: Mapping[int, Sequence[Message]]) -> list[str]:
    """Return the first disagreement of each pair of stages. `messages` are those of each stage, in order.

    NCCL matches what one rank sends to another with what that one expects, in order; a difference is a hang or memory
    that is read wrongly.
    """
    found = []
    for sender in sorted(messages):
        for receiver in sorted(messages):
            sent = [m for m in messages[sender] if m.kind == "send" and m.peer == receiver]
            expected = [m for m in messages[receiver] if m.kind == "recv" and m.peer == sender]
            for number, (out, into) in enumerate(zip_longest(sent, expected)):
                if _described(out) != _described(into):
                    found.append(
                        f"stage {sender} to stage {receiver}, tensor {number + 1} of a step: {_described(out)} is "
                        f"sent, {_described(into)} is expected"
                    )
                    break
    strangers = {m.peer for stage in messages.values() for m in stage} - set(messages)
    return found + [f"tensors go to or come from stage {stage}, which does not exist" for stage in sorted(strangers)]


def _described(message: Message | None) -> str:
    return "nothing" if message is None else f"{str(message.dtype).removeprefix('torch.')} {message.shape}"
