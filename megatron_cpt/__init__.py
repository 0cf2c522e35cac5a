"""Continued pre-training of large language models on Megatron-Core, driven by token budgets.

    from megatron_cpt import load_config, run_training

    config = load_config("config.yaml", ["optimizer.lr=1e-5"])
    run_training(config)

does what `megatron-cpt train config.yaml optimizer.lr=1e-5` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_cpt.config.load import load_config
    from megatron_cpt.train.api import run_training

__all__ = ["__version__", "load_config", "run_training"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # imported on use, so that `megatron-cpt --help` stays fast
    if name == "load_config":
        from megatron_cpt.config.load import load_config

        return load_config
    if name == "run_training":
        from megatron_cpt.train.api import run_training

        return run_training
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
