"""A file descriptor for rank 0's progress lines that ends where this process's stderr does, whatever that is."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_cpt.console import SafeStream


@contextmanager
def console_descriptor() -> Iterator[int | None]:
    """A descriptor to hand to rank 0 within the block; None when this process has no stderr.

    A real stderr is duplicated, so that the rank sees whether it is a terminal. A notebook's or a test's stderr is an
    object without a descriptor: then a thread copies to it from a pipe.
    """
    if sys.stderr is None:
        yield None
        return
    try:
        descriptor = os.dup(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # io.UnsupportedOperation is an OSError and a ValueError
        with _relay() as descriptor:
            yield descriptor
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _relay() -> Iterator[int]:
    reading, writing = os.pipe()
    stream = SafeStream(sys.stderr)

    def copy() -> None:
        with os.fdopen(reading, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                stream.write(line)
                stream.flush()

    thread = threading.Thread(target=copy, name="console", daemon=True)
    thread.start()
    try:
        yield writing
    finally:
        os.close(writing)  # the ranks have ended: the thread comes to the end of the pipe
        thread.join(timeout=5)
