"""One rank of a training job, from its command line to its exit code.

    python -m megatron_cpt.train.rank CONFIG [--accept-changes] [key=value ...]

`megatron-cpt train` starts it for each rank of one machine; under torchrun or srun it is the process itself.
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
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import psutil

from megatron_cpt.data.datasets import plan_sources
from megatron_cpt.errors import CptError
from megatron_cpt.launch.local import CONSOLE_FD, adopt_slurm_ranks
from megatron_cpt.launch.preflight import Job, announce, check_free_space, check_job, index_cache_dir, standing_ledger
from megatron_cpt.runs.exit_codes import DO_NOT_RESTART, FAILED
from megatron_cpt.runs.folder import RunFolder, prepare_run_folder, record_start
from megatron_cpt.runs.lease import Lease
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu
from megatron_cpt.train.clock import LapClock
from megatron_cpt.train.watchdog import Watchdog, phase_timeouts

logger = logging.getLogger(__name__)


def run_rank(job: Job, clock: LapClock, accept_changes: bool = False) -> int:
    """Train as the rank that the environment names; the exit code."""
    adapt_megatron_core_to_cpu()
    from megatron_cpt.data.batches import open_batches
    from megatron_cpt.runtime.distributed import init_runtime, shutdown_runtime
    from megatron_cpt.train.assemble import train_job

    clock.lap("import_engine")
    config = job.config
    folder, lease, rank = RunFolder(Path(config.folder)), None, int(os.environ.get("RANK", "0"))
    watchdog = Watchdog(phase_timeouts(config.failure), partial(_leave_error, folder, rank))
    folder.rank_error(rank).unlink(missing_ok=True)  # of an earlier start
    if rank == 0 and CONSOLE_FD not in os.environ:  # else the parent has done it
        _, changes = prepare_run_folder(config, job.model_dir, accept_changes=accept_changes)
        record_start(folder, config, changes)
        check_free_space(job)
    if folder.kill_switch.exists():
        logger.error("%s is there: remove it to let this run start", folder.kill_switch)
        return DO_NOT_RESTART
    if rank == 0:
        lease = Lease(folder.lease)
        lease.acquire()
    ledger = standing_ledger(job)
    plans = plan_sources(config, job.datasets, ledger)
    if rank == 0 and CONSOLE_FD not in os.environ:
        announce(job, plans, changes)
    batches = open_batches(config, job.datasets, ledger, plans, index_cache_dir(config))
    clock.lap("data_indices")
    # Longer than every phase: the watchdog, which says where each rank stands, comes first.
    runtime = init_runtime(config, timeout_minutes=1.5 * max(phase_timeouts(config.failure).values()) / 60)
    clock.lap("process_groups")
    code = train_job(job, folder, batches, runtime, lease, watchdog, clock)
    shutdown_runtime()
    if lease is not None:
        lease.release()
    return code


def main(argv: Sequence[str] | None = None) -> int:
    clock = LapClock({"import_python": time.time() - psutil.Process().create_time()})
    parser = argparse.ArgumentParser(prog="megatron_cpt.train.rank")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--accept-changes", action="store_true")
    arguments = parser.parse_args(argv)
    os.environ.update(adopt_slurm_ranks())
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format=f"%(asctime)s %(levelname)s [rank {rank}] %(name)s: %(message)s",
    )
    folder: RunFolder | None = None
    try:
        job = check_job(arguments.config, arguments.overrides)
        folder = RunFolder(Path(job.config.folder))
        clock.lap("checks")
        return run_rank(job, clock, arguments.accept_changes)
    except CptError as error:
        logger.error("%s", error)
        _leave_error(folder, rank, error.message, error.hint, error.exit_code)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        where = f"; details in {folder.rank_log(rank)}" if folder else ""
        _leave_error(
            folder,
            rank,
            f"rank {rank} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}{where}",
            "start the same command again: it continues from the newest complete checkpoint",
            FAILED,
        )
        return FAILED


def _leave_error(folder: RunFolder | None, rank: int, message: str, hint: str | None, code: int) -> None:
    """Tell the process that started the ranks why this one ends."""
    if folder is not None and folder.logs.is_dir():
        told = json.dumps({"message": message, "hint": hint, "exit_code": code})
        with contextlib.suppress(OSError):  # a full disk: the log has said it
            folder.rank_error(rank).write_text(told, encoding="utf-8")


if __name__ == "__main__":
    sys.stdout.flush()
    code = main()
    logging.shutdown()
    for child in multiprocessing.active_children():  # Megatron-Core's writer: os._exit would orphan it
        child.terminate()
    os._exit(code)  # threads of the communication back ends may otherwise keep a failed rank alive
