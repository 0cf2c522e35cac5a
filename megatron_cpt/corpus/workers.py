"""A pool of forked processes that take units one by one; results come in any order, output order is by unit.

Units are known beforehand, or are pieces of streams that reader processes decode as fast as workers take them.
The parent hands out the next unit when a worker is free, so that a slow unit never holds the others. A worker
that dies ends the run with its signal named; what other units left on disk stays for the next run.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from megatron_cpt.errors import CptError

Item = TypeVar("Item")
Result = TypeVar("Result")


def worker_count(requested: int | None) -> int:
    """Workers asked for, or the processor cores this process may use."""
    return requested or len(os.sched_getaffinity(0))


def run_units(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    streams: Sequence[Callable[[], Iterator[Item]]] = (),
) -> Iterator[Result]:
    """Yield `function(item)` for all items, computed by up to `workers` processes, in order of completion.

    Further items come from `streams`, each iterated in a process of its own, never more than `workers` of them
    and of their items that wait. An exception in a process is raised here. With one worker, or one item and no
    stream, everything runs in this process.
    """
    if workers <= 1 or (len(items) <= 1 and not streams):
        yield from map(function, items)
        for stream in streams:
            yield from map(function, stream())
        return
    pool = _Pool(function, items, workers, streams)
    try:
        yield from pool.results()
    finally:
        pool.stop()


class _Pool:
    """The processes, what each is doing, and what waits for them."""

    def __init__(
        self, function: Callable[[Any], Any], items: Sequence[Any], workers: int, streams: Sequence[Callable[[], Any]]
    ) -> None:
        self._function, self._workers = function, workers
        self._items, self._unread = iter(items), deque(streams)
        self._pieces: deque[Any] = deque()  # items of streams that wait for a worker; they go first
        self._processes: dict[Connection, Any] = {}
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._reading: set[Connection] = set()  # readers that were asked for an item
        self._paused: set[Connection] = set()  # readers with an item that nobody has room for

    def results(self) -> Iterator[Any]:
        while True:
            starving = not self._give_out()
            self._read_on(starving)
            if not (self._busy or self._reading):
                return
            for connection in wait([*self._busy, *self._reading]):
                assert isinstance(connection, Connection)
                value = _receive(connection, self._processes[connection])
                if connection in self._busy:
                    self._busy.remove(connection)
                    self._idle.append(connection)
                    yield value
                elif value is _END:
                    self._reading.remove(connection)
                    connection.close()
                    self._processes.pop(connection).join()
                else:
                    self._reading.remove(connection)
                    self._paused.add(connection)
                    self._pieces.append(value)

    def _give_out(self) -> bool:
        """Give every free worker an item; False when the items at hand are not enough."""
        while len(self._busy) < self._workers:
            item = self._pieces.popleft() if self._pieces else next(self._items, _END)
            if item is _END:
                return False
            connection = self._idle.pop() if self._idle else self._start(_serve, self._function)
            self._busy.add(connection)
            connection.send(item)
        return True

    def _read_on(self, starving: bool) -> None:
        """Ask paused readers to go on while there is room, and open another stream where readers fall behind."""
        while self._paused and len(self._pieces) < self._workers:
            connection = self._paused.pop()
            connection.send(None)
            self._reading.add(connection)
        readers = len(self._reading) + len(self._paused)
        if self._unread and readers < self._workers and (starving or not readers):
            connection = self._start(_serve_stream, self._unread.popleft())
            connection.send(None)
            self._reading.add(connection)

    def _start(self, target: Callable[..., None], function: Callable[..., Any]) -> Connection:
        context = mp.get_context("fork")
        here, there = context.Pipe()
        process = context.Process(target=target, args=(function, there, [*self._processes, here]), daemon=True)
        process.start()
        there.close()
        self._processes[here] = process
        return here

    def stop(self) -> None:
        for process in self._processes.values():
            if process.is_alive():
                process.terminate()
                process.join()
        for connection in self._processes:
            connection.close()


class _End:
    """The answer of a stream that has no further item; one object per process, so it is known by `is`."""

    def __reduce__(self) -> str:
        return "_END"


_END = _End()


def _serve_stream(stream: Callable[[], Iterator[Any]], connection: Connection, inherited: list[Connection]) -> None:
    """A reader's loop: one item ahead, and the next only when asked for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for other in inherited:
        other.close()
    items, goes_on = stream(), True
    while goes_on:
        try:
            answer = (True, next(items, _END))
        except Exception as error:
            answer = (False, error)
        goes_on = answer[0] and answer[1] is not _END
        try:
            connection.recv()
            connection.send(answer)
        except (EOFError, BrokenPipeError):
            return


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
