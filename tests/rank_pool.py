"""Real training ranks for tests, started in a fraction of a second: forked from one process that has done the imports.

Run as a program it is that process: it reads one JSON job per line, forks its ranks, and answers with their process
ids and then with their exit codes, so that a test can kill, stop or signal them in between.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class RankPool:
    def __init__(self) -> None:
        self._running: list[int] = []
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(
        self,
        config: Path,
        *arguments: str,
        ranks: int,
        log: Path,
        env: dict[str, str] | None = None,
        main: str = "megatron_cpt.train.rank:main",
    ) -> list[int]:
        """Start `ranks` ranks of `main` (module:function) with the command line `config *arguments`; their process ids.

        By default they are ranks of `megatron-cpt train`.
        """
        if self._running:  # left over by a test that failed
            for pid in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.wait()
        job = {"argv": [str(config), *arguments], "ranks": ranks, "log": str(log), "env": env or {}, "main": main}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self._running = self._answer()
        return self._running

    def wait(self) -> list[int]:
        """Exit codes of the ranks started last; -9 for one that was killed."""
        codes: list[int] = self._answer()
        self._running = []
        return codes

    def have_ended(self) -> bool:
        """Whether all ranks started last have ended; `wait` then returns at once."""
        for pid in self._running:
            with contextlib.suppress(ProcessLookupError):  # the process that started it has collected its exit code
                os.kill(pid, 0)
                return False
        return True

    def run(
        self,
        config: Path,
        *arguments: str,
        ranks: int,
        log: Path,
        env: dict[str, str] | None = None,
        main: str = "megatron_cpt.train.rank:main",
    ) -> list[int]:
        self.start(config, *arguments, ranks=ranks, log=log, env=env, main=main)
        return self.wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that starts the ranks has ended"
        return json.loads(line)


def _wait(pids: list[int]) -> list[int]:
    """Exit codes; as the real launcher does, ranks that do not notice the end of a peer are killed after a while."""
    codes: dict[int, int] = {}
    kill_at = float("inf")
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG)) != (0, 0):
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
                if codes[pid] not in (0, 75):
                    kill_at = min(kill_at, time.monotonic() + 15)
        if time.monotonic() > kill_at:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _serve() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

    adapt_megatron_core_to_cpu()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import megatron_cpt.train.assemble  # all of torch and Megatron-Core, once
    import megatron_cpt.train.rank  # noqa: F401
    from megatron_cpt.launch.local import free_port

    for line in sys.stdin:
        job = json.loads(line)
        port = free_port()
        pids = []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                descriptor = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(job["ranks"]),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
                os.environ.update(job["env"])
                code = 1
                try:
                    for fault in filter(None, os.environ.get("TEST_FAULT", "").split(",")):
                        module, _, function = fault.partition(":")
                        getattr(importlib.import_module(module), function)()
                    module, _, function = job["main"].partition(":")
                    code = getattr(importlib.import_module(module), function)(job["argv"])
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            pids.append(pid)
        answers.write(json.dumps(pids) + "\n")
        codes = _wait(pids)
        answers.write(json.dumps(codes) + "\n")


if __name__ == "__main__":
    _serve()
