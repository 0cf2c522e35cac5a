"""`log`: metrics and trackers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_cpt.budget import Interval
from megatron_cpt.config.section import Every, Section


class LogConfig(Section):
    """Where metrics go. `metrics.jsonl` in the run folder is always written."""

    every: Every = Field(Interval(1, "iters"), validate_default=True, description="Interval between metric lines.")
    report: bool = Field(False, description="Write the page that `megatron-cpt report` writes when the run ends.")
    tensorboard: bool = Field(False, description="Also write <run_dir>/tensorboard.")
    wandb_project: str | None = Field(None, description="Also log to this Weights & Biases project.")
    wandb_mode: Literal["online", "offline"] = Field(
        "offline", description="`offline` writes below <run_dir>/wandb, for `wandb sync` later."
    )
    mlflow_experiment: str | None = Field(None, description="Also log to this MLflow experiment.")
    mlflow_uri: str | None = Field(
        None, description="MLflow's tracking server or database; default: <run_dir>/mlflow.db, for `mlflow ui` later."
    )
    trackio_project: str | None = Field(
        None, description="Also log to this trackio project, in <run_dir>/trackio unless TRACKIO_DIR is set."
    )
