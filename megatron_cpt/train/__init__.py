"""Training: the state that a step works on, the step, and the loop around it.

The package itself can be called, as `from megatron_cpt import train` promises: `train(config)` runs the job that
`megatron-cpt train` runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_cpt.config.run_config import RunConfig


class _CallablePackage(ModuleType):
    def __call__(self, config: RunConfig, overrides: Sequence[str] = (), *, accept_changes: bool = False) -> int:
        """Start or continue the run that `config` describes, with one process per rank; the command's exit code."""
        from megatron_cpt.train.api import train_config

        return train_config(config, overrides, accept_changes=accept_changes)


sys.modules[__name__].__class__ = _CallablePackage
