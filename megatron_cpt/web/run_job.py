"""`python -m megatron_cpt.web.run_job FOLDER COMMAND...`: run a command, its output to FOLDER/log, its exit code too.

It waits for the command, so that the exit code is known whatever becomes of the server. SIGINT is handed on to the
command and its processes; SIGUSR1 ends them at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from megatron_cpt.durable import write_atomically

KILL_NOW = signal.SIGUSR1


def main(folder: Path, command: list[str]) -> None:
    """Run `command` and leave exit.json in `folder`."""
    started: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        early.append(number)
        with contextlib.suppress(ProcessLookupError):
            for process in started:
                os.killpg(process.pid, signal.SIGKILL if number == KILL_NOW else signal.SIGINT)

    for number in (signal.SIGINT, signal.SIGTERM, KILL_NOW):
        signal.signal(number, hand_on)
    with (folder / "log").open("ab") as log:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
        except OSError as error:
            log.write(f"error: {command[0]} could not be started: {error.strerror}\n".encode())
            code = 1
        else:
            started.append(process)
            if early:
                hand_on(early[0], None)
            code = process.wait()
    write_atomically(folder / "exit.json", json.dumps({"exit_code": code}).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
