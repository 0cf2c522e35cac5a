"""`megatron-cpt eval tasks`: downstream tasks, before and after."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from megatron_cpt.errors import CheckpointError, ConfigError
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.runs.task_results import (
    TaskResults,
    read_task_results,
    shown_estimate,
    task_results_path,
    write_task_results,
)

if TYPE_CHECKING:
    from checkpoint_convert.checkpoint import IndexedCheckpoint
    from megatron_cpt.eval.task_run import TaskRequest

logger = logging.getLogger(__name__)

_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@click.command()
@click.argument("model", metavar="MODEL|RUN|CHECKPOINT", type=click.Path(path_type=Path))
@click.option(
    "--tasks",
    "names",
    required=True,
    multiple=True,
    metavar="NAME,FILE.yaml,...",
    help="Tasks, groups or tags of lm-eval, and task files of your own; separated by commas, or given several times.",
)
@click.option(
    "--base",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The model before training: it is put to the same items, and the two are compared in pairs.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first items of each task.  [default: all]")
@click.option("--fewshot", type=click.IntRange(min=0), help="Examples in each prompt.  [default: as the task says]")
@click.option(
    "--primary",
    metavar="TASK:METRIC",
    help="The one metric that is tested, named before anything is measured.  [default: the first task's first]",
)
@click.option("--offline", is_flag=True, help="Open no connection: data that is not on this machine is an error.")
@click.option(
    "--engine",
    type=click.Choice(["hf", "megatron"]),
    help="transformers or Megatron-Core.  [default: hf for a Hugging Face folder, else megatron]",
)
@click.option("--tp", type=click.IntRange(min=1), help="Tensor-parallel ranks.  [default: the run's on GPUs; else 1]")
@click.option("--pp", type=click.IntRange(min=1), help="Pipeline stages.  [default: the run's on GPUs; else 1]")
@click.option("--dtype", type=click.Choice([*_DTYPES]), help="Of weights and activations.  [default: as stored]")
@click.option("--seq-length", type=click.IntRange(min=8), help="Longest input.  [default: the run's; else 2048]")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="[default: RUN/eval/tasks_TIME.json]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def tasks(
    model: Path,
    names: tuple[str, ...],
    base: Path | None,
    limit: int | None,
    fewshot: int | None,
    primary: str | None,
    offline: bool,
    engine: str | None,
    tp: int | None,
    pp: int | None,
    dtype: str | None,
    seq_length: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Downstream tasks through lm-evaluation-harness, of a model alone or before and after.

    MODEL is a Hugging Face folder, a Megatron checkpoint, or a run, whose newest checkpoint is meant; a checkpoint
    needs no export: --tp and --pp start that many processes. With --base both models are measured under the same
    conditions on the same items. Of all numbers one metric is tested, --primary; "not distinguishable" is an answer.

    \b
    The tasks of lm-eval, their data from the hub, and a file of your own with its items beside it:
      megatron-cpt eval tasks runs/JOB --base MODEL --tasks pubmedqa,medqa_4options --primary pubmedqa:acc
      megatron-cpt eval tasks runs/JOB --base MODEL --tasks my.yaml --offline
    """
    wanted = [name.strip() for entry in names for name in entry.split(",") if name.strip()]
    if not wanted:
        raise click.UsageError("--tasks names no task")
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's own bars; read when tqdm is imported
    from checkpoint_convert.open import open_checkpoint

    found = open_checkpoint(model)
    request = _request(found, model, base, wanted, engine, tp, pp, dtype, seq_length)
    request = _with(request, limit=limit, fewshot=fewshot, offline=offline, primary=primary)
    path = output or (None if found.run_dir is None else task_results_path(found.run_dir))
    results = _measured(request)
    if path is not None:
        write_task_results(path, results)
    if as_json:
        click.echo(json.dumps({**results.to_json(), "file": None if path is None else str(path)}))
        return
    Console(soft_wrap=not sys.stdout.isatty()).print(_table(results))
    for line in _words(results):
        click.echo(line)
    if path is not None:
        click.echo(f"wrote {path}")


def _with(request: TaskRequest, **values: object) -> TaskRequest:
    from dataclasses import replace

    return replace(request, **values)  # type: ignore[arg-type]


def _request(
    found: IndexedCheckpoint,
    model: Path,
    base: Path | None,
    names: list[str],
    engine: str | None,
    tp: int | None,
    pp: int | None,
    dtype: str | None,
    seq_length: int | None,
) -> TaskRequest:
    """Return what to measure, with what follows from the model filled in."""
    from checkpoint_convert.open import open_checkpoint
    from megatron_cpt.eval.settings import settings_of_run
    from megatron_cpt.eval.task_run import TaskRequest

    engine = engine or ("hf" if found.format == "hf" else "megatron")
    for checkpoint in [found] if base is None else [found, open_checkpoint(base)]:
        _check_readable(checkpoint, engine)
    run_tp, run_pp = _layout_of_run(found)
    tp, pp = tp or run_tp, pp or run_pp
    if engine == "hf" and tp * pp > 1:
        raise ConfigError("--tp and --pp are layouts of Megatron-Core", hint="--engine megatron")
    limit = found.arch.max_position_embeddings
    if seq_length is not None and seq_length > limit:
        raise ConfigError(
            f"--seq-length {seq_length} is more than {model} attends to ({limit})", hint=f"at most {limit}"
        )
    default = 2048 if found.run_config is None else settings_of_run(found.run_config).seq_length
    stored = "float32" if found.arch.dtype == "float32" else "bfloat16"
    return TaskRequest(
        model=str(model),
        base=None if base is None else str(base),
        tasks=tuple(names),
        engine=engine,
        dtype=stored if dtype is None else _DTYPES[dtype],
        seq_length=seq_length or min(default, limit),
        tp=tp,
        pp=pp,
    )


def _check_readable(found: IndexedCheckpoint, engine: str) -> None:
    wanted = ("hf",) if engine == "hf" else ("hf", "torch_dist")
    if found.format not in wanted or found.gammas_less_one:
        raise CheckpointError(
            f"{found.path} is a {found.format} checkpoint, which the engine {engine} does not read",
            hint=f"megatron-cpt convert {found.path} DIR --to hf, then give DIR",
        )


def _layout_of_run(found: IndexedCheckpoint) -> tuple[int, int]:
    """TP and PP of the run on a machine with GPUs: one of them may not hold the model. Memory of a CPU is one."""
    from megatron_cpt.config.load import load_config

    if found.run_config is None or found.format == "hf" or not Path("/dev/nvidiactl").exists():
        return 1, 1
    parallel = load_config(found.run_config, []).parallel
    return parallel.tp, parallel.pp


def _measured(request: TaskRequest) -> TaskResults:
    """Measure in this process, or with a process for each rank."""
    from megatron_cpt.eval.task_run import measure_tasks
    from megatron_cpt.launch.local import run_ranks

    ranks = request.tp * request.pp
    if ranks == 1:
        results = measure_tasks(request)
        assert results is not None, "the only rank is the first"
        return results
    with tempfile.TemporaryDirectory(prefix="megatron-cpt-eval-") as root:
        folder = RunFolder(Path(root))
        folder.logs.mkdir()
        (folder.root / "request.json").write_text(request.to_json())
        code = run_ranks(folder, [root], ranks, (sys.executable, "-m", "megatron_cpt.eval.rank"))
        if code != 0:
            sys.exit(code)
        results = read_task_results(folder.root / "results.json")
        assert results is not None, "rank 0 wrote it before it ended well"
        return results


def _table(results: TaskResults) -> Table:
    paired = results.base is not None
    table = Table(box=None, pad_edge=False)
    for heading in (
        "task",
        "metric",
        "items",
        *(("before",) if paired else ()),
        "after",
        *(("change",) if paired else ()),
    ):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right", overflow="fold")
    for row in results.rows:
        cells = [row.task, row.metric, f"{row.items:,}"]
        if paired:
            cells.append(shown_estimate(row.before))
        cells.append(shown_estimate(row.after))
        if paired:
            cells.append(shown_estimate(row.difference, sign=True))
        table.add_row(*cells)
    return table


def _words(results: TaskResults) -> list[str]:
    lines = ["[ ] are 95 % intervals"]
    lines += [f"{row.name}, named beforehand: {row.conclusion}" for row in results.rows if row.conclusion]
    for task, count in results.truncated_items.items():
        limit = results.conditions["seq_length"]
        lines.append(f"{task}: {count:,} items are longer than {limit:,} tokens and lost their beginning")
    return lines
