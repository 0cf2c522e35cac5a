"""TensorBoard, Weights & Biases, MLflow and trackio: optional copies of metrics.jsonl, by consumed tokens."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.runs.folder import RunFolder, resolved_dict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tracker:
    """One place that rows of metrics.jsonl go to as well."""

    name: str
    write: Callable[[dict[str, Any]], None]
    close: Callable[[], None]  # a rank ends by os._exit: what is not written by then is lost


def open_trackers(config: RunConfig, folder: RunFolder) -> list[Tracker]:
    """The trackers that `config` asks for; each goes on where an earlier attempt of the run stopped.

    One that cannot be opened, for want of a network or of space, is left out: the run has metrics.jsonl.
    """
    log = config.log
    asked = (
        ("TensorBoard", log.tensorboard, _open_tensorboard),
        ("Weights & Biases", log.wandb_project is not None, _open_wandb),
        ("MLflow", log.mlflow_experiment is not None, _open_mlflow),
        ("trackio", log.trackio_project is not None, _open_trackio),
    )
    trackers: list[Tracker] = []
    for name, wanted, open_tracker in asked:
        if not wanted:
            continue
        try:
            trackers.append(open_tracker(name, config, folder))
        except Exception as error:
            logger.error("no rows for %s: %s; metrics.jsonl has all of them", name, error)
    return trackers


def _open_tensorboard(name: str, config: RunConfig, folder: RunFolder) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder.root / "tensorboard"))

    def write(row: dict[str, Any]) -> None:
        for scalar, value in scalars(row).items():
            writer.add_scalar(scalar, value, row["consumed_tokens"])
        writer.flush()

    return Tracker(name, write, writer.close)


def _open_wandb(name: str, config: RunConfig, folder: RunFolder) -> Tracker:
    import wandb

    run = wandb.init(
        project=config.log.wandb_project,
        name=config.job_name,
        id=config.job_name,
        resume="allow",
        mode=config.log.wandb_mode,
        dir=str(folder.root),
        config=resolved_dict(config),
    )
    run.define_metric("*", step_metric="consumed_tokens")

    def write(row: dict[str, Any]) -> None:
        run.log({**scalars(row), "consumed_tokens": row["consumed_tokens"]})

    return Tracker(name, write, run.finish)


def _open_mlflow(name: str, config: RunConfig, folder: RunFolder) -> Tracker:
    # A server that does not answer would hold up every step for minutes; and nothing is sent that was not asked for.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    for talkative in ("mlflow", "alembic"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    client = MlflowClient(tracking_uri=config.log.mlflow_uri or f"sqlite:///{(folder.root / 'mlflow.db').resolve()}")
    title = str(config.log.mlflow_experiment)
    experiment = client.get_experiment_by_name(title)
    number = experiment.experiment_id if experiment else client.create_experiment(title)
    earlier = client.search_runs([number], f"attributes.run_name = '{config.job_name}'", max_results=1)
    run = earlier[0].info.run_id if earlier else client.create_run(number, run_name=config.job_name).info.run_id
    if not earlier:
        params = [Param(key, value[:6000]) for key, value in _flat(resolved_dict(config)).items()]
        for first in range(0, len(params), 100):  # the most that a request may hold
            client.log_batch(run, params=params[first : first + 100])
    client.update_run(run, status="RUNNING")

    def write(row: dict[str, Any]) -> None:
        now_ms, tokens = int(time.time() * 1000), row["consumed_tokens"]
        found = [Metric(key, value, now_ms, tokens) for key, value in scalars(row).items()]
        if found:
            client.log_batch(run, metrics=found)

    return Tracker(name, write, lambda: client.set_terminated(run))


def _open_trackio(name: str, config: RunConfig, folder: RunFolder) -> Tracker:
    os.environ.setdefault("TRACKIO_DIR", str(folder.root / "trackio"))  # read when it is imported
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import trackio

    with contextlib.redirect_stdout(sys.stderr):  # it greets on stdout, which is for results
        run = trackio.init(
            project=str(config.log.trackio_project),
            name=config.job_name,
            resume="allow",
            config=_flat(resolved_dict(config)),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(row: dict[str, Any]) -> None:
        if found := scalars(row):
            run.log(found, step=row["consumed_tokens"])

    def close() -> None:
        with contextlib.redirect_stdout(sys.stderr):
            run.finish()

    return Tracker(name, write, close)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> text of every value of a config that is set."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = str(value)
    return flat


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """name -> number of a row: `loss_by_source/NAME` for nested ones, `validation/NAME/loss` for a validation's."""
    if row.get("event") == "validation":
        return {f"validation/{row['name']}/{key}": row[key] for key in ("loss", "perplexity")}
    if "event" in row:
        return {}
    flat = {f"{key}/{name}": v for key, value in row.items() if isinstance(value, dict) for name, v in value.items()}
    plain = {key: value for key, value in row.items() if isinstance(value, int | float)}
    return {**plain, **flat}
