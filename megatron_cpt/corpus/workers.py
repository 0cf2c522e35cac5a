"""A pool of forked processes that take units one by one; results come in any order, output order is by unit.

The parent hands out the next unit when a worker is free, so that a slow unit never holds the others. A worker
that dies ends the run with its signal named; what other units left on disk stays for the next run.
"""

from __future__ import annotations

import multiprocessing as mp
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from megatron_cpt.errors import CptError

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_units(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Yield `function(item)` for all items, computed by up to `workers` processes, in order of completion.

    An exception in a worker is raised here. With one worker (or one item) everything runs in this process.
    """
    if workers <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    context = mp.get_context("fork")
    pending = iter(items)
    busy: dict[Connection, Any] = {}
    processes: list[Any] = []
    try:
        for _ in range(min(workers, len(items))):
            here, there = context.Pipe()
            inherited = [*busy, here]
            process = context.Process(target=_serve, args=(function, there, inherited), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            busy[here] = process
            here.send(next(pending))
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                yield _receive(connection, busy[connection])
                try:
                    connection.send(next(pending))
                except StopIteration:
                    connection.close()
                    busy.pop(connection).join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()


def _serve(function: Callable[[Any], Any], connection: Connection, inherited: list[Connection]) -> None:
    """The worker's loop. The parent's ends are closed here, so that its death ends this process too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for other in inherited:
        other.close()
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, function(item))
        except Exception as error:
            answer = (False, error)
        try:
            connection.send(answer)
        except BrokenPipeError:
            return


def _receive(connection: Connection, process: Any) -> Any:
    try:
        succeeded, value = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        process.join()
        code = process.exitcode or 0
        cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "out of memory? use fewer --workers; " if code == -signal.SIGKILL else ""
        raise CptError(
            f"a worker process died ({cause})", hint=hint + "the same command continues where it stopped"
        ) from error
    if not succeeded:
        raise value
    return value
