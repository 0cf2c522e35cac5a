"""Put tasks to a model, and to its base under the same conditions, and compare the two item by item."""

from __future__ import annotations

import datetime
import json
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint_convert.checkpoint import IndexedCheckpoint
from checkpoint_convert.open import open_checkpoint
from megatron_cpt import __version__
from megatron_cpt.console import ProgressBar
from megatron_cpt.corpus.tokenizers.load import load_tokenizer, tokenizer_fingerprint
from megatron_cpt.errors import CheckpointError, DataError
from megatron_cpt.eval.layout_model import PRECISION, Layout, eval_config, joined_ranks, open_layout_model
from megatron_cpt.eval.scorer import TaskModel
from megatron_cpt.eval.task_list import NamedTask, load_tasks
from megatron_cpt.eval.task_rows import Values, find_primary, task_rows
from megatron_cpt.runs.task_results import TaskResults
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

logger = logging.getLogger(__name__)

_SEED = 1234  # of the examples in a prompt, lm-eval's own


@dataclass(frozen=True)
class TaskRequest:
    """What to measure, and how; the same for every rank."""

    model: str
    base: str | None
    tasks: tuple[str, ...]
    engine: str  # hf or megatron
    dtype: str  # float32 or bfloat16
    seq_length: int
    tp: int = 1
    pp: int = 1
    limit: int | None = None
    fewshot: int | None = None
    offline: bool = False
    primary: str | None = None  # task:metric

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TaskRequest:
        told = json.loads(text)
        return cls(**told | {"tasks": tuple(told["tasks"])})


@dataclass(frozen=True)
class _Measured:
    """One model on all tasks. `items` are what it was asked, by task: the models must have been asked the same."""

    values: Values
    items: dict[str, list[str]]
    truncated: dict[str, int]
    seconds: float


def measure_tasks(request: TaskRequest) -> TaskResults | None:
    """Measure; on other ranks than the first, help and return None.

    Raises:
        ConfigError: a task or a metric that is not there.
        DataError: a task's data cannot be had, or two models were not asked the same.
        CheckpointError: a model cannot be read, or base and model have different tokenizers.
    """
    models = [name for name in (request.base, request.model) if name is not None]
    found = [open_checkpoint(Path(name)) for name in models]
    check_same_tokenizer(found)
    started = time.monotonic()
    adapt_megatron_core_to_cpu()
    from megatron_cpt.runtime.distributed import failing_together

    with _engine(request, found[-1]) as (rank, open_model):
        tasks: list[NamedTask] = []
        with failing_together():
            if rank == 0:
                tasks = load_tasks(request.tasks, offline=request.offline)
                primary = find_primary(tasks, request.primary)
        loaded = time.monotonic() - started
        measured = []
        for name, checkpoint in zip(models, found, strict=True):
            logger.info("loading %s (%s)", checkpoint.path, checkpoint.format)
            with open_model(checkpoint) as model:
                if rank == 0:
                    measured.append(_measure_model(name, checkpoint, model, tasks, request))
    if rank != 0:
        return None
    seconds = {"tasks": loaded, **{name: one.seconds for name, one in zip(models, measured, strict=True)}}
    return _results(request, tasks, primary, measured, seconds, found[-1].iteration)


def check_same_tokenizer(found: Sequence[IndexedCheckpoint]) -> None:
    """Raise CheckpointError unless all models have one tokenizer: else the same text is other tokens for each."""
    prints = {tokenizer_fingerprint(checkpoint.side_dir) for checkpoint in found}
    if len(prints) > 1:
        raise CheckpointError(
            f"{found[0].path} and {found[-1].path} have different tokenizers: the items would not be the same for both",
            hint="give the base that this model was trained from",
        )


@contextmanager
def _engine(request: TaskRequest, found: IndexedCheckpoint) -> Iterator[tuple[int, Callable[..., Any]]]:
    """This process's rank, and how it opens a model: a context in which ranks other than the first answer it."""
    if request.engine == "hf":
        yield 0, lambda checkpoint: _open_hf(checkpoint, request.dtype)
        return
    layout = Layout(request.tp, request.pp)

    def config(checkpoint: IndexedCheckpoint) -> Any:
        return eval_config(checkpoint, layout, request.seq_length, PRECISION[request.dtype])

    with joined_ranks(config(found)) as rank:
        yield rank, lambda checkpoint: _open_megatron(checkpoint, config(checkpoint), rank)


@contextmanager
def _open_hf(checkpoint: IndexedCheckpoint, dtype: str) -> Iterator[TaskModel]:
    from megatron_cpt.eval.hf_model import open_hf_model

    yield open_hf_model(checkpoint.path, dtype)


@contextmanager
def _open_megatron(checkpoint: IndexedCheckpoint, config: Any, rank: int) -> Iterator[TaskModel]:
    model = open_layout_model(checkpoint, config)
    if rank != 0:
        model.serve()
        yield model
        return
    try:
        yield model
    except BaseException:
        model.release(failed=True)
        raise
    model.release()


def _measure_model(
    name: str, checkpoint: IndexedCheckpoint, model: TaskModel, tasks: Sequence[NamedTask], request: TaskRequest
) -> _Measured:
    from lm_eval.evaluator import evaluate

    from megatron_cpt.eval.harness_model import HarnessModel

    started = time.monotonic()
    tokenizer = load_tokenizer(checkpoint.side_dir, special_tokens_in_text="parse")
    random.seed(_SEED)
    np.random.seed(_SEED)
    for named in tasks:
        wanted = named.task.config.num_fewshot if request.fewshot is None else request.fewshot
        named.task.set_config(key="num_fewshot", value=wanted or 0)
        named.task.set_fewshot_seed(seed=_SEED)
    with ProgressBar(Path(name).name, 0, "requests") as bar:
        adapter = HarnessModel(model, tokenizer, request.seq_length, bar.update)
        told = evaluate(
            lm=adapter,
            task_dict={"tasks": {named.name: named.task for named in tasks}, "groups": {}, "group_map": {}},
            limit=request.limit,
            bootstrap_iters=0,
        )
    for setting in adapter.ignored_settings:
        logger.warning("a task's generation setting %r has no effect here", setting)
    values: Values = {}
    items: dict[str, list[str]] = {}
    for named in tasks:
        for sample in told["samples"][named.name]:
            filtered = "" if sample["filter"] == "none" else f",{sample['filter']}"
            for metric in sample["metrics"]:
                values.setdefault((named.name, metric + filtered), []).append(sample[metric])
            items.setdefault(named.name, []).append(f"{sample['doc_hash']} {sample['prompt_hash']}")
    return _Measured(values, items, adapter.truncated_items, time.monotonic() - started)


def _results(
    request: TaskRequest,
    tasks: Sequence[NamedTask],
    primary: tuple[str, str],
    measured: Sequence[_Measured],
    seconds: dict[str, float],
    iteration: int | None,
) -> TaskResults:
    after = measured[-1]
    before = measured[0] if len(measured) > 1 else None
    if before is not None and before.items != after.items:
        raise DataError(
            "the two models were not asked the same items: a task draws its own at random",
            hint="measure such a task without --base",
        )
    rows = task_rows(tasks, primary, None if before is None else before.values, after.values)
    kept = {
        f"{task}: {metric}": {
            **({} if before is None else {"before": [*map(_plain, before.values[task, metric])]}),
            "after": [*map(_plain, values)],
        }
        for (task, metric), values in after.values.items()
    }
    import lm_eval

    return TaskResults(
        model=request.model,
        base=request.base,
        conditions={
            **{k: v for k, v in asdict(request).items() if k not in ("model", "base", "primary", "offline")},
            "lm_eval": lm_eval.__version__,
        },
        rows=tuple(replace(row, iteration=iteration) for row in rows),
        truncated_items=after.truncated,
        values=kept,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        written=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        version=__version__,
    )


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return [*map(_plain, value)] if isinstance(value, (list, tuple)) else value
