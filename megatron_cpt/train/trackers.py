"""TensorBoard and Weights & Biases: optional copies of metrics.jsonl, by consumed tokens."""

from __future__ import annotations

import logging
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
    asked = {"TensorBoard": (config.log.tensorboard, _open_tensorboard)}
    asked["Weights & Biases"] = (config.log.wandb_project is not None, _open_wandb)
    trackers: list[Tracker] = []
    for name, (wanted, open_tracker) in asked.items():
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


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """name -> number of a row: `loss_by_source/NAME` for nested ones, `validation/NAME/loss` for a validation's."""
    if row.get("event") == "validation":
        return {f"validation/{row['name']}/{key}": row[key] for key in ("loss", "perplexity")}
    if "event" in row:
        return {}
    flat = {f"{key}/{name}": v for key, value in row.items() if isinstance(value, dict) for name, v in value.items()}
    plain = {key: value for key, value in row.items() if isinstance(value, int | float)}
    return {**plain, **flat}
