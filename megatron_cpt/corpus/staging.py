"""The staging folder PREFIX.partial: what an unfinished run left, and a lock against a second writer.

The folder belongs to one plan, named by a fingerprint. The same plan again continues; another one starts anew.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import CptError, DataError

SHARE_ATTEMPTS, SHARE_WAIT_SECONDS = 50, 0.1

log = logging.getLogger(__name__)


def staging_path(prefix: str) -> Path:
    return Path(f"{prefix}.partial")


@contextmanager
def write_errors_told(prefix: str) -> Iterator[None]:
    """An error of the system on the way to a dataset under `prefix` as one of ours; whatever has its name is whole."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            where = f" ({error.filename})" if error.filename else ""
            raise DataError(
                f"cannot write {prefix}: {error.strerror or error}{where}",
                hint="check the folder, its permissions and the disk, then run the same command again",
            ) from error
        raise CptError(
            f"the disk of {prefix} is full ({error.strerror}); nothing was written under the final name",
            hint="about 2x the size of the .bin is needed; free some space and run the same command again",
        ) from error


@contextmanager
def shared_staging_folder(prefix: str, fingerprint: str) -> Iterator[Path]:
    """The staging folder for one of several shards that fill it at the same time; it always stays.

    Raises DataError while a whole run, or shards of another plan, use it.
    """
    folder = staging_path(prefix)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _claim(folder, fingerprint)
        except OSError:
            pass  # other shards are at work; what they claimed is checked below
        _share(lock, folder, prefix)
        if (folder / "plan").read_text() != fingerprint:
            raise DataError(
                f"{folder} is filled by shards of another input, configuration or tokenizer",
                hint="wait for them to end, or choose another output_prefix",
            )
        yield folder


def _share(lock: IO[str], folder: Path, prefix: str) -> None:
    """Take the shared lock; another shard may hold the exclusive one for the moment of its claim."""
    for _ in range(SHARE_ATTEMPTS):
        try:
            fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except OSError:
            time.sleep(SHARE_WAIT_SECONDS)
    raise DataError(f"{folder} is in use: another process is writing {prefix}", hint="wait for it to end")


@contextmanager
def staging_folder(prefix: str, fingerprint: str) -> Iterator[Path]:
    """The locked staging folder of `prefix`, holding what an earlier run of the same plan left.

    Raises DataError when another process writes to the same prefix. The folder stays when the block raises.
    """
    folder = staging_path(prefix)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        # A POSIX record lock: it is not inherited by the workers, and network file systems honour it.
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"{folder} is in use: another process is writing {prefix}",
                hint="wait for it to end, or choose another --output-prefix",
            ) from error
        _claim(folder, fingerprint)
        yield folder
        shutil.rmtree(folder)


def _claim(folder: Path, fingerprint: str) -> None:
    """Keep the content if it is of this plan, else clear it."""
    plan = folder / "plan"
    if plan.exists() and plan.read_text() == fingerprint:
        return
    stale = [path for path in folder.iterdir() if path.name != "lock"]
    if stale:
        log.info("%s is of another input, configuration, tokenizer or version: starting anew", folder)
    for path in stale:
        path.unlink()
    write_atomically(plan, fingerprint.encode())
