"""Answers on a terminal, as they come: one after the other, or two side by side."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from megatron_cpt.chat.speaker import Answer

logger = logging.getLogger(__name__)

SIDE_BY_SIDE_COLUMNS = 72  # of a terminal; a narrower one shows one answer after the other


def show_answers(console: Console, answers: Mapping[str, Answer], pieces: Sequence[Iterator[str]]) -> bool:
    """Show answers while they are made, with tokens and seconds. Return False when Ctrl-C ended them.

    Args:
        answers: by the model's name; each is kept up to date by the iterator at its place in `pieces`.
    """
    try:
        if len(pieces) > 1 and console.is_terminal and console.width >= SIDE_BY_SIDE_COLUMNS:
            _side_by_side(console, answers, pieces)
        else:
            _one_by_one(console, answers, pieces)
    except KeyboardInterrupt:
        console.print("\n(ended)", style="dim", highlight=False)
        return False
    return True


def _one_by_one(console: Console, answers: Mapping[str, Answer], pieces: Sequence[Iterator[str]]) -> None:
    for (name, answer), coming in zip(answers.items(), pieces, strict=True):
        if len(answers) > 1:
            console.print(Text(f"[{name}]", style="bold"))
        for piece in coming:
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        console.print()
        if console.is_terminal:
            console.print(Text(described(answer), style="dim"))
        else:  # a pipe gets the text alone
            logger.info("%s", described(answer))


def _side_by_side(console: Console, answers: Mapping[str, Answer], pieces: Sequence[Iterator[str]]) -> None:
    """Two models speak in turns, a piece each, so that both grow at once."""

    def table() -> Table:
        shown = Table(*(Column(Text(name), ratio=1) for name in answers), expand=True)
        shown.add_row(*(Text(answer.text) for answer in answers.values()))
        shown.add_row(*(Text(described(answer), style="dim") for answer in answers.values()))
        return shown

    coming = list(pieces)
    with Live(table(), console=console, refresh_per_second=8, vertical_overflow="visible") as live:
        while coming:
            coming = [one for one in coming if next(one, None) is not None]
            live.update(table())


def described(answer: Answer) -> str:
    """Tokens and seconds of an answer."""
    return (
        f"{answer.tokens:,} tokens in {answer.seconds:.1f} s, {answer.tokens_per_second:.1f} tokens/s, "
        f"ended by {answer.ended_by}"
    )
