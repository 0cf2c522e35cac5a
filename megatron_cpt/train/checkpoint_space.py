"""Room for checkpoints: whether the next one fits, and which old ones go. Only rank 0 uses it."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

from megatron_cpt.runs.checkpoints import complete_checkpoints, free_bytes, list_checkpoints, read_best, set_aside
from megatron_cpt.runs.retention import Retention
from megatron_cpt.train.checkpoint_errors import SaveFailed

logger = logging.getLogger(__name__)


class CheckpointSpace:
    """The space that the checkpoints in `root` take."""

    def __init__(self, root: Path, retention: Retention, first_bytes: int) -> None:
        """`first_bytes` is the predicted size of the first checkpoint."""
        self.root = root
        self.retention = retention
        self.first_bytes = first_bytes
        self._removal: threading.Thread | None = None

    def make_room(self, partial: Path) -> SaveFailed | None:
        """Create the folder `partial` of the next checkpoint; return what is in the way."""
        try:
            expected, free = self.expected_bytes(), free_bytes(self.root)
            if free >= expected:
                partial.mkdir(parents=True, exist_ok=True)
                return None
        except OSError as error:
            return SaveFailed(
                f"cannot create {partial}: {error.strerror}",
                hint="the run folder must stay where it is, and writable, while the run goes on",
            )
        return SaveFailed(
            f"cannot create {partial}: it needs {expected:,} bytes and {free:,} are free",
            hint="free some space, for example by `megatron-cpt checkpoints RUN --prune --keep-last 1`; the newest "
            "complete checkpoint is untouched",
        )

    def expected_bytes(self) -> int:
        """Size of the next checkpoint: that of the newest one, or predicted while there is none."""
        markers = [checkpoint.marker for checkpoint in list_checkpoints(self.root) if checkpoint.marker is not None]
        return markers[-1].total_bytes if markers else self.first_bytes

    def retain(self) -> None:
        best = read_best(self.root)
        removed = []
        for path in self.retention.removable(complete_checkpoints(self.root), best["iteration"] if best else None):
            logger.info("retention removes %s", path)
            removed.append(set_aside(path))
        if removed:  # deleting gigabytes takes a while, and the loop need not wait for it
            self.finish_removal()
            self._removal = threading.Thread(target=_remove_all, args=(removed,))
            self._removal.start()

    def finish_removal(self) -> None:
        if self._removal is not None:
            self._removal.join()
            self._removal = None


def _remove_all(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
