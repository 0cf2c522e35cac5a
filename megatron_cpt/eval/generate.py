"""Text after prompts, token by token, from any model that gives the logits of the next token.

Each step runs the whole text so far through the model: no cache of keys and values, the same code for every engine and
layout. That suits the short answers of tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from megatron_cpt.eval.scorer import TaskModel


def generate(
    model: TaskModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
    *,
    is_enough: Callable[[int, list[int]], bool] = lambda row, ids: False,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Return the new token ids of each prompt, without the stop token that ended it.

    Args:
        model: whose logits decide.
        prompts: at least one token each.
        max_new_tokens: of each prompt.
        stop_ids: tokens that end a text, such as the separator of documents.
        is_enough: told a prompt's number and its new ids after each token; True ends that text.
        temperature: 0 takes the likeliest token; else the logits are divided by it and a token is drawn.
        top_p: draw among the likeliest tokens whose probabilities reach this sum (Holtzman et al. 2019,
            arXiv:1904.09751).
        generator: of the draws.
    """
    new: list[list[int]] = [[] for _ in prompts]
    open_rows = list(range(len(prompts))) if max_new_tokens > 0 else []
    while open_rows:
        texts = [[*prompts[row], *new[row]] for row in open_rows]
        lengths = torch.tensor([len(text) for text in texts])
        tokens = torch.zeros(len(texts), int(lengths.max()), dtype=torch.int64)
        for place, text in enumerate(texts):
            tokens[place, : len(text)] = torch.tensor(text)
        chosen = choose(model.next_logits(tokens, lengths), temperature, top_p, generator)
        still_open = []
        for row, token in zip(open_rows, chosen.tolist(), strict=True):
            if token in stop_ids:
                continue
            new[row].append(token)
            if len(new[row]) < max_new_tokens and not is_enough(row, new[row]):
                still_open.append(row)
        open_rows = still_open
    return new


def choose(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> torch.Tensor:
    """Return a token id for each row of `logits`, float32 [b, vocabulary]; see `generate`."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, ids = probabilities.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(dim=-1) - ordered >= top_p] = 0  # the likeliest always stays
        probabilities = torch.zeros_like(probabilities).scatter(-1, ids, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
