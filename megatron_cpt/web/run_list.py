"""The runs below one folder, each under an id that is looked up and never becomes part of a path."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.errors import CptError
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.runs.status import find_runs
from megatron_cpt.runs.summary import RunSummary, read_summary

_SECONDS_BETWEEN_SEARCHES = 2.0


@dataclass(frozen=True)
class ListedRun:
    """A run with its summary, or with the reason why there is none."""

    id: str
    name: str  # its path below the root
    summary: RunSummary | None
    problem: str | None


class RunList:
    """Finds the runs below `root`; symbolic links are not followed, so that no run can lead out of it."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._paths: dict[str, Path] = {}
        self._searched = -_SECONDS_BETWEEN_SEARCHES
        self._summaries: dict[str, tuple[tuple[float, ...], ListedRun]] = {}
        self._lock = threading.Lock()

    def path(self, run_id: str) -> Path | None:
        """Return the folder of a run, None where there is none of this id."""
        path = self._find(run_id) or self._find(run_id, again=True)
        return path if path is not None and RunFolder(path).resolved.is_file() else None

    def id_of(self, path: Path) -> str:
        """Return the id of a run's folder below the root."""
        return hashlib.sha256(self.name_of(path).encode()).hexdigest()[:16]

    def name_of(self, path: Path) -> str:
        """Return how a run's folder is called in lists: its path below the root."""
        path = path.resolve()
        return path.name if path == self.root else str(path.relative_to(self.root))

    def listed(self) -> list[ListedRun]:
        """Return all runs, the one with the newest activity first."""
        self._search()
        return [self._listed(run_id, path) for run_id, path in self._paths.items()]

    def one(self, path: Path) -> ListedRun:
        """Return the run in the folder `path` below the root."""
        return self._listed(self.id_of(path), path)

    def _find(self, run_id: str, *, again: bool = False) -> Path | None:
        self._search(again=again)
        return self._paths.get(run_id)

    def _search(self, *, again: bool = False) -> None:
        with self._lock:
            if not again and time.monotonic() - self._searched < _SECONDS_BETWEEN_SEARCHES:
                return
            self._paths = {self.id_of(path): path for path in find_runs(self.root)} if self.root.is_dir() else {}
            self._searched = time.monotonic()

    def _listed(self, run_id: str, path: Path) -> ListedRun:
        """The summary, read again only when a file that it comes from has changed, or while the run is alive."""
        stamp = tuple(_stamps(RunFolder(path)))
        known = self._summaries.get(run_id)
        if known is not None and known[0] == stamp and not _is_alive(known[1]):
            return known[1]
        try:
            listed = ListedRun(run_id, self.name_of(path), read_summary(path), None)
        except CptError as error:
            listed = ListedRun(run_id, self.name_of(path), None, error.message)
        except OSError as error:  # it vanishes while it is read
            listed = ListedRun(run_id, self.name_of(path), None, f"cannot be read: {error.strerror}")
        self._summaries[run_id] = (stamp, listed)
        return listed


def _is_alive(run: ListedRun) -> bool:
    return run.summary is not None and run.summary.state == "running"


def _stamps(folder: RunFolder) -> Iterator[float]:
    for path in (folder.resolved, folder.metrics, folder.history, folder.lease, folder.logs):
        with contextlib.suppress(OSError):
            found = path.stat()
            yield found.st_mtime
            yield found.st_size
