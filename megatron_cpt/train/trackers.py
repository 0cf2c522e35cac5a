"""TensorBoard and Weights & Biases: optional copies of metrics.jsonl, by consumed tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.runs.folder import RunFolder, resolved_dict


@dataclass(frozen=True)
class Tracker:
    """One place that rows of metrics.jsonl go to as well."""

    name: str
    write: Callable[[dict[str, Any]], None]
    close: Callable[[], None]  # a rank ends by os._exit: what is not written by then is lost


def open_trackers(config: RunConfig, folder: RunFolder) -> list[Tracker]:
    """The trackers that `config` asks for; each goes on where an earlier start of the run stopped."""
    trackers: list[Tracker] = []
    if config.log.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder.root / "tensorboard"))

        def to_tensorboard(row: dict[str, Any]) -> None:
            for name, value in scalars(row).items():
                writer.add_scalar(name, value, row["consumed_tokens"])
            writer.flush()

        trackers.append(Tracker("TensorBoard", to_tensorboard, writer.close))
    if config.log.wandb_project is not None:
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

        def to_wandb(row: dict[str, Any]) -> None:
            run.log({**scalars(row), "consumed_tokens": row["consumed_tokens"]})

        trackers.append(Tracker("Weights & Biases", to_wandb, run.finish))
    return trackers


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """name -> number of a row: `loss_by_source/NAME` for nested ones, `validation/NAME/loss` for a validation's."""
    if row.get("event") == "validation":
        return {f"validation/{row['name']}/{key}": row[key] for key in ("loss", "perplexity")}
    if "event" in row:
        return {}
    flat = {f"{key}/{name}": v for key, value in row.items() if isinstance(value, dict) for name, v in value.items()}
    plain = {key: value for key, value in row.items() if isinstance(value, int | float)}
    return {**plain, **flat}
