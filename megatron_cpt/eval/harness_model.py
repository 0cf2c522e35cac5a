"""lm-evaluation-harness's view of a model: text requests become batches of tokens for a `TaskModel` of either engine.

Rows of similar length share a batch, the longest first, and requests whose input tokens are equal share a row. An item
that is longer than the sequence keeps its end, as in lm-eval's own models, and is counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_cpt.corpus.tokenizers.tokenizer import CorpusTokenizer
from megatron_cpt.eval.generate import generate
from megatron_cpt.eval.scorer import TaskModel

OnRequests = Callable[[int, int], None]  # done, total
Pair = tuple[list[int], list[int]]  # what is given, what is scored

_TOKENS_PER_FORWARD = 2048
_MAX_NEW_TOKENS = 256  # of a task that states no limit, as in lm-eval
_GENERATION = ("until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p")


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """One adapter for both engines."""

    def __init__(
        self,
        model: TaskModel,
        tokenizer: CorpusTokenizer,
        seq_length: int,
        on_requests: OnRequests = lambda done, total: None,
        tokens_per_forward: int = _TOKENS_PER_FORWARD,
    ) -> None:
        """Evaluate `model`, whose inputs are at most `seq_length` tokens long."""
        super().__init__()
        self._model, self._tokenizer, self.max_length = model, tokenizer, seq_length
        self._on_requests, self._tokens_per_forward = on_requests, tokens_per_forward
        self._items: list[tuple[str, int]] = []  # of the requests at hand
        self._truncated: dict[str, set[int]] = defaultdict(set)
        self.ignored_settings: Counter[str] = Counter()

    @property
    def truncated_items(self) -> dict[str, int]:
        """How many items of each task were longer than the sequence."""
        return {task: len(items) for task, items in self._truncated.items()}

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eod_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids, _ = self._tokenizer.encode_batch([string])
        encoded: list[int] = ids.tolist()
        return encoded

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._items = [(request.task_name, request.doc_id) for request in requests]
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = []
        for item, (_, context, continuation) in zip(self._items, requests, strict=True):
            if len(context) + len(continuation) > self.max_length + 1:
                self._truncated[item[0]].add(item[1])
            pairs.append((context, continuation))
        return self._scored(pairs)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        pairs: list[Pair] = []
        counts = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            cut = [make_disjoint_window(window) for window in windows]
            pairs += [(list(context), list(continuation)) for context, continuation in cut]
            counts.append(len(cut))
        scored = iter(self._scored(pairs))
        return [sum(next(scored)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        done, texts = 0, [""] * len(requests)
        by_settings: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            by_settings[repr(request.args[1])].append(place)
        for places in by_settings.values():
            settings = requests[places[0]].args[1]
            self.ignored_settings.update(name for name in settings if name not in _GENERATION)
            room = min(_new_tokens(settings), self.max_length - 1)
            prompts = {place: self._prompt(requests[place], room) for place in places}
            for batch in _batches(places, lambda place: len(prompts[place]) + room, self._tokens_per_forward):  # noqa: B023
                written = self._written([prompts[place] for place in batch], room, settings)
                for place, text in zip(batch, written, strict=True):
                    texts[place] = text
                done += len(batch)
                self._on_requests(done, len(requests))
        return texts

    def _prompt(self, request: Any, room: int) -> list[int]:
        ids = self.tok_encode(request.args[0]) or [self.eot_token_id]
        if len(ids) + room > self.max_length:
            self._truncated[request.task_name].add(request.doc_id)
        return ids[-(self.max_length - room) :]

    def _written(self, prompts: Sequence[list[int]], room: int, settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        stops = [text for text in ([until] if isinstance(until, str) else until) if text]
        decode = self._tokenizer.decode

        def is_enough(row: int, ids: list[int]) -> bool:
            text = decode(ids)
            return any(stop in text for stop in stops)

        sampled = bool(settings.get("do_sample", False))
        new = generate(
            self._model,
            prompts,
            room,
            {self.eot_token_id},
            is_enough=is_enough,
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
        )
        return [_before(decode(ids), stops) for ids in new]

    def _scored(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Score the second part of each pair after the first, which is cut at its beginning where both are too long."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, (context, continuation) in enumerate(pairs):
            if continuation:
                rows[tuple((context + continuation)[-(self.max_length + 1) :][:-1])].append(place)
        done = 0
        for batch in _batches([*rows], len, self._tokens_per_forward):
            for place, result in self._scored_rows(batch, pairs, rows):
                results[place] = result
                done += 1
            self._on_requests(done, len(pairs))
        return results

    def _scored_rows(
        self, batch: Sequence[tuple[int, ...]], pairs: Sequence[Pair], requests: dict[tuple[int, ...], list[int]]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Score all requests of each row of input tokens; they differ in their last label alone."""
        width = max(map(len, batch))
        flat = [(row, inputs, place) for row, inputs in enumerate(batch) for place in requests[inputs]]
        counts = [min(len(pairs[place][1]), len(inputs)) for _, inputs, place in flat]
        first = min(len(inputs) - count for (_, inputs, _), count in zip(flat, counts, strict=True))
        tokens = torch.full((len(batch), width), self.eot_token_id, dtype=torch.int64)
        for row, inputs in enumerate(batch):
            tokens[row, : len(inputs)] = torch.tensor(inputs)
        labels = torch.full((len(flat), width - first), self.eot_token_id, dtype=torch.int64)
        for at, (_, inputs, place) in enumerate(flat):
            labels[at, : len(inputs) - first] = torch.tensor([*inputs[first + 1 :], pairs[place][1][-1]])
        found = self._model.likelihoods(tokens, first, labels, torch.tensor([row for row, _, _ in flat]))
        for at, ((_, inputs, place), count) in enumerate(zip(flat, counts, strict=True)):
            part = slice(len(inputs) - count - first, len(inputs) - first)
            nats = float(found.log_likelihood[at, part].double().sum())
            yield place, (nats, bool(found.is_greedy[at, part].all()))


def _new_tokens(settings: dict[str, Any]) -> int:
    return int(settings.get("max_gen_toks", settings.get("max_new_tokens", _MAX_NEW_TOKENS)))


def _before(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text


def _batches(rows: Sequence[Any], length: Callable[[Any], int], tokens: int) -> Iterator[list[Any]]:
    """Rows of similar length together, the longest first, as many as `tokens` allow."""
    batch: list[Any] = []
    widest = 0
    for row in sorted(rows, key=length, reverse=True):
        if batch and widest * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        if not batch:
            widest = length(row)
        batch.append(row)
    if batch:
        yield batch
