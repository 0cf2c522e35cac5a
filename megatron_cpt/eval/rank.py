"""One rank of an evaluation whose model is spread over several: `python -m megatron_cpt.eval.rank FOLDER`.

FOLDER holds request.json; rank 0 leaves results.json there, and a rank that fails says why in FOLDER/logs.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.console import ConsoleHandler
from megatron_cpt.errors import CptError
from megatron_cpt.eval.task_run import TaskRequest, measure_tasks
from megatron_cpt.launch.local import CONSOLE_FD
from megatron_cpt.launch.place import rank_here
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.runs.rank_errors import RankError, leave_rank_error
from megatron_cpt.runs.task_results import write_task_results

logger = logging.getLogger("rank")  # to its own log: the console gets the error from the command


def main(argv: Sequence[str] | None = None) -> int:
    """Be one rank. Return its exit code."""
    root = Path((sys.argv[1:] if argv is None else argv)[0])
    rank, folder = rank_here(), RunFolder(root)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s %(levelname)s [rank {rank}] %(name)s: %(message)s"
    )
    if rank == 0 and CONSOLE_FD in os.environ:
        console = os.fdopen(int(os.environ[CONSOLE_FD]), "w", buffering=1)
        sys.stderr = console  # where progress is shown
        logging.getLogger("megatron_cpt").addHandler(ConsoleHandler(console))
    request = TaskRequest.from_json((root / "request.json").read_text())
    try:
        results = measure_tasks(request)
    except CptError as error:
        logger.error("%s", error)
        leave_rank_error(folder.rank_error(rank), RankError(error.message, error.hint, error.exit_code))
        return error.exit_code
    if results is not None:
        write_task_results(root / "results.json", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
