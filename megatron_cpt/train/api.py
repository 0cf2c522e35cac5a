"""Start or continue a run: what `megatron-cpt train` and `from megatron_cpt import run_training` do."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

from megatron_cpt.config.load import build_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import CptError
from megatron_cpt.launch.local import run_ranks
from megatron_cpt.launch.place import adopt_slurm_ranks, under_launcher
from megatron_cpt.launch.start import PreparedRun, prepare
from megatron_cpt.runs.exit_codes import DO_NOT_RESTART, FINISHED, STOPPED

logger = logging.getLogger(__name__)


def run_training(config: RunConfig, overrides: Sequence[str] = (), *, accept_changes: bool = False) -> int:
    """Start the run of `config`, or continue it from its newest complete checkpoint.

    An ordinary function: it may be called from a script, a thread or a notebook. It starts one process per rank of this
    machine and returns when they have ended; in a process that torchrun or srun started it is that rank.

    Args:
        config: from `load_config`.
        overrides: `key.sub=value` each, as on the command line.
        accept_changes: continue although seed, name, precision or the model's content changed.

    Returns:
        The exit code of `megatron-cpt train`: 0 finished, 75 stopped after saving, 76 do not restart.

    Raises:
        CptError: what is wrong with the config, the model, the data or the run folder, or a rank's own error.
    """
    named = "the config given to run_training"

    def read() -> RunConfig:
        return build_config(config.model_dump(mode="json"), overrides, origin=named) if overrides else config

    return start_run(read, named, accept_changes=accept_changes)


def start_run(read_config: Callable[[], RunConfig], named: str, *, accept_changes: bool) -> int:
    """Prepare the run once per job, and train it. Return the exit code.

    `read_config` is called by the one process that prepares; `named` says in errors where its config is from.

    Raises:
        CptError: as `run_training`.
    """
    os.environ.update(adopt_slurm_ranks())

    prepared: list[PreparedRun] = []  # by this process, if it is the one that prepares

    def prepare_here() -> PreparedRun:
        prepared.append(prepare(read_config(), named, accept_changes=accept_changes))
        return prepared[-1]

    try:
        code = _train(prepare_here)
    except CptError as error:
        _report_when_asked(prepared, error.exit_code)
        raise
    _report_when_asked(prepared, code)
    return code


def _train(prepare_here: Callable[[], PreparedRun]) -> int:
    """Be one rank of a launcher's, or start the ranks of this machine. Return the exit code."""
    if under_launcher():
        from megatron_cpt.train.rank import join_run

        return join_run(prepare_here)
    run = prepare_here()
    if run.finished:
        logger.info("%s", run.describe_end())
        return FINISHED
    code = run_ranks(run.folder, [str(run.folder.root), "--prepared"], run.checked.derived.world_size)
    if code == STOPPED:
        logger.info("stopped; the same command continues")
    return code


def _report_when_asked(prepared: Sequence[PreparedRun], code: int) -> None:
    """Write the report of a run that has ended for good; what goes wrong with it is a message alone."""
    if not prepared or not prepared[0].checked.config.log.report or code not in (FINISHED, DO_NOT_RESTART):
        return
    from megatron_cpt.report.write import write_report  # here, as no start of a run needs it

    run = prepared[0].folder.root
    try:
        for path in write_report([run], run / "report"):
            logger.info("wrote %s", path)
    except Exception as error:
        logger.error("no report: %s; `megatron-cpt report %s` writes it", error, run)
