"""One rank of a training job, from its command line to its exit code.

    python -m megatron_cpt.train.rank RUN --prepared                        a parent process has prepared the folder RUN
    python -m megatron_cpt.train.rank CONFIG [--accept-changes] [key=value ...]     under torchrun or srun

Under torchrun or srun rank 0 prepares the run, and tells the others through the store at which all ranks meet; they
never read the user's file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil

from megatron_cpt.config.load import build_config, load_config
from megatron_cpt.console import ConsoleHandler, guarded_output
from megatron_cpt.errors import CheckpointError, CptError
from megatron_cpt.launch.local import CONSOLE_FD, RankFailure
from megatron_cpt.launch.place import adopt_slurm_ranks, rank_here
from megatron_cpt.launch.preflight import index_cache_dir
from megatron_cpt.launch.start import KillSwitchSet, PreparedRun, load_prepared, load_run, prepare
from megatron_cpt.runs.exit_codes import FINISHED, STOPPED
from megatron_cpt.runs.folder import RunFolder, resolved_dict
from megatron_cpt.runs.lease import Lease, is_superseded
from megatron_cpt.runs.rank_errors import ATTEMPT_LOGS, RankError, leave_rank_error, rank_error_path
from megatron_cpt.runs.repeated_failures import advise_after_failure
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu
from megatron_cpt.train.clock import LapClock
from megatron_cpt.train.console_view import open_console
from megatron_cpt.train.stop_signals import StopInSetup, stop_in_setup
from megatron_cpt.train.watchdog import Watchdog, phase_timeouts

logger = logging.getLogger("megatron_cpt.train.rank")  # __name__ is __main__ in a rank that a parent started


def main(argv: Sequence[str] | None = None) -> int:
    """Be one rank. Return its exit code."""
    parser = argparse.ArgumentParser(prog="megatron_cpt.train.rank")
    parser.add_argument("source", type=Path, metavar="CONFIG_OR_RUN")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--accept-changes", action="store_true")
    parser.add_argument("--prepared", action="store_true")
    arguments = parser.parse_args(argv)
    source, folder = arguments.source, RunFolder(arguments.source)
    if arguments.prepared:
        return _run_to_exit_code(partial(load_prepared, folder), rank_here(), folder)
    os.environ.update(adopt_slurm_ranks())
    return join_run(
        lambda: prepare(load_config(source, arguments.overrides), str(source), accept_changes=arguments.accept_changes)
    )


def join_run(prepare_here: Callable[[], PreparedRun]) -> int:
    """Be the rank that torchrun or srun started: rank 0 calls `prepare_here`, the others wait. Return the exit code."""
    return _run_to_exit_code(partial(_prepare_once, prepare_here, rank_here()), rank_here(), None)


def _prepare_once(prepare_here: Callable[[], PreparedRun], rank: int) -> PreparedRun:
    """The prepared run on every rank, or rank 0's error on every rank."""
    adapt_megatron_core_to_cpu()
    from megatron_cpt.runtime.distributed import meeting_store, tell_ranks

    if rank == 0:
        try:
            run = prepare_here()
        except CptError as error:
            told = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
            with contextlib.suppress(CptError):  # nobody there to be told
                tell_ranks(meeting_store(timeout_minutes=1), json.dumps({"error": told}))
            raise
        tell_ranks(meeting_store(), json.dumps({"config": resolved_dict(run.checked.config)}))
        return run
    answer = json.loads(meeting_store().get("prepared"))
    meeting_store().set(f"heard/{rank}", "1")
    if "error" in answer:
        told = answer["error"]
        raise RankFailure(f"rank 0: {told['message']}", hint=told["hint"], exit_code=told["exit_code"])
    config = build_config(answer["config"], origin=f"{answer['config']['run_dir']}/resolved.yaml")
    return load_run(config, "the config of rank 0")


def _run_to_exit_code(get_run: Callable[[], PreparedRun], rank: int, folder: RunFolder | None) -> int:
    """Get the run and train it; every way to end becomes an exit code and a file that says why."""
    clock = LapClock({"import_python": time.time() - psutil.Process().create_time()})
    _log_to(rank)
    run_folder, leave_error = folder, partial(_leave_error, folder, rank)
    try:
        with stop_in_setup():
            run = get_run()
            run_folder = run.folder
            leave_error = partial(_leave_error, run_folder, rank)
            clock.lap("checks")
            return _train(run, rank, clock)
    except StopInSetup as stopped:
        logger.info("%s before the first step: nothing was trained, the same command continues", stopped)
        return STOPPED
    except CptError as error:
        logger.error("%s", error)
        leave_error(error.message, error.hint, error.exit_code)
        return _code_for_launcher(run_folder, error.exit_code)
    except Exception as error:
        logger.exception("unexpected")
        what = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        hint, code = advise_after_failure(run_folder, rank)
        leave_error(f"rank {rank} failed: {what}; details in its log", hint, code)
        return _code_for_launcher(run_folder, code)


def _train(run: PreparedRun, rank: int, clock: LapClock) -> int:
    """Build indices, join the other ranks, and train. Return the exit code."""
    config, folder = run.checked.config, run.folder
    folder.rank_error(rank).unlink(missing_ok=True)  # of an earlier attempt
    watchdog = Watchdog(
        phase_timeouts(config.failure),
        partial(_leave_error, folder, rank),
        end=lambda code: os._exit(_code_for_launcher(folder, code)),
    )
    if rank == 0:
        logger.info("loading Megatron-Core")
    adapt_megatron_core_to_cpu()
    from megatron_cpt.data.batches import open_batches
    from megatron_cpt.runtime.distributed import init_runtime, leave_together, shutdown_runtime
    from megatron_cpt.train.assemble import train_run

    clock.lap("import_engine")
    if folder.kill_switch.exists():
        raise KillSwitchSet(folder)
    lease = Lease(folder.lease, on_lost=partial(_end_without_lease, folder)) if rank == 0 else None
    if lease is not None:
        lease.acquire()
        logger.info("opening the data")
    try:
        batches = open_batches(config, run.checked.datasets, run.ledger, run.plans, index_cache_dir(config))
        clock.lap("data_indices")
        # Longer than every phase: the watchdog, which says where each rank stands, comes first.
        runtime = init_runtime(config, timeout_minutes=1.5 * max(phase_timeouts(config.failure).values()) / 60)
        clock.lap("process_groups")
        code = train_run(run, batches, runtime, lease, watchdog, clock)
        if lease is not None:
            lease.release()
        leave_together()  # srun ends all ranks when the first one leaves with a code other than 0
        shutdown_runtime()
        return code
    finally:
        if lease is not None:
            lease.release()


def _end_without_lease(folder: RunFolder, error: CheckpointError) -> None:
    """End this rank, rank 0, whatever it waits for: another job writes the run folder now."""
    logger.error("%s", error)
    _leave_error(folder, 0, error.message, error.hint, error.exit_code)
    logging.shutdown()
    _end(_code_for_launcher(folder, error.exit_code))


def _code_for_launcher(folder: RunFolder | None, code: int) -> int:
    """The code to end with: 0 for a rank that is cut off while a later start of its Slurm job trains.

    Slurm gives the steps of both starts the same number: srun, told of a failure here, would end the ranks there.
    """
    if folder is None or not is_superseded(folder.lease):
        return code
    logger.warning("this start was cut off; a later start of its job has the run")
    return FINISHED


def _end(code: int) -> None:
    """Leave at once: threads of the communication back ends may keep a failed rank alive."""
    for child in multiprocessing.active_children():  # Megatron-Core's writer: os._exit would orphan it
        child.terminate()
    os._exit(code)


def _log_to(rank: int) -> None:
    """Everything to this rank's log, its stderr; of rank 0 also to the console of whoever started it."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format=f"%(asctime)s %(levelname)s [rank {rank}] %(name)s: %(message)s",
    )
    if rank == 0 and CONSOLE_FD in os.environ:
        logging.getLogger("megatron_cpt").addHandler(ConsoleHandler(open_console()))


def _leave_error(folder: RunFolder | None, rank: int, message: str, hint: str | None, code: int) -> None:
    """Tell the process that started the ranks why this one ends, and the batch job that it is a part of."""
    error = RankError(message, hint, code)
    if folder is not None and folder.logs.is_dir() and not is_superseded(folder.lease):
        leave_rank_error(folder.rank_error(rank), error)
    if (logs := os.environ.get(ATTEMPT_LOGS)) is not None:
        leave_rank_error(rank_error_path(Path(logs), rank), error)


if __name__ == "__main__":
    with guarded_output():
        code = main()
    logging.shutdown()
    _end(code)
