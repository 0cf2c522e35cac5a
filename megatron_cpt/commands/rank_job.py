"""A command that runs on all ranks of a config's layout: it starts them on one machine, or is one of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import CptError, LaunchError
from megatron_cpt.launch.local import CONSOLE_FD, run_ranks
from megatron_cpt.launch.place import rank_here
from megatron_cpt.runs.exit_codes import STOPPED
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.runs.rank_errors import ATTEMPT_LOGS, RankError, leave_rank_error, rank_error_path


def start_ranks(config: RunConfig, command: str, arguments: Sequence[str], work: Path) -> None:
    """Run `megatron-cpt COMMAND ARGUMENTS` once per rank of this machine; logs stay in `work` where one failed.

    Raises:
        LaunchError: the layout has several machines, or somebody stopped it.
        CptError: a rank's own error.
    """
    if config.parallel.nodes > 1:
        raise LaunchError(
            f"parallel.nodes = {config.parallel.nodes}: one machine cannot start the others",
            hint="start this command under srun or torchrun on every node, one process per GPU",
        )
    folder = RunFolder(work)
    folder.logs.mkdir(parents=True, exist_ok=True)
    program = (sys.executable, "-m", "megatron_cpt", command)
    variables = {ATTEMPT_LOGS: str(folder.logs)}
    if run_ranks(folder, arguments, config.parallel.world_size, program, variables) == STOPPED:
        raise LaunchError("stopped before it was finished", hint="start the same command again")
    shutil.rmtree(work)


def speaks_for_all() -> bool:
    """Whether this rank prints the result: rank 0, unless a parent does."""
    return rank_here() == 0 and CONSOLE_FD not in os.environ


@contextlib.contextmanager
def told_to_parent() -> Iterator[None]:
    """Leave an error of this rank for the process that started the ranks, if it was `start_ranks`."""
    try:
        yield
    except CptError as error:
        if (logs := os.environ.get(ATTEMPT_LOGS)) is not None:
            told = RankError(error.message, error.hint, error.exit_code)
            leave_rank_error(rank_error_path(Path(logs), rank_here()), told)
        raise
