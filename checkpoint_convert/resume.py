"""An output folder in the making: NAME.partial, with a lock, and a journal of what is finished.

After `kill -9` the same command finds the folder, proves each tensor of the journal by reading it back, and
continues with the rest. Only a finished conversion is renamed to its final name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from pathlib import Path
from types import TracebackType

from checkpoint_convert.stream import TensorRecord
from megatron_cpt.durable import sync
from megatron_cpt.errors import ConversionError

JOURNAL = ".journal.jsonl"
LOCK = ".lock"


def partial_path(final: Path) -> Path:
    return final.with_name(final.name + ".partial")


class PartialFolder:
    """Context manager around FINAL.partial. `plan` identifies source and options; another plan starts afresh."""

    def __init__(self, final: Path, plan: str) -> None:
        self.final, self._plan = final, plan
        self.path = partial_path(final)
        self._write_lock = threading.Lock()

    def __enter__(self) -> PartialFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock_fd = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock_fd)
            raise ConversionError(f"another process is writing {self.path}", hint="wait for it, or end it") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock_fd)

    def finished_records(self) -> dict[str, TensorRecord]:
        """Records that an earlier, killed run of the same plan left; clears the folder of any other plan."""
        lines = []
        journal = self.path / JOURNAL
        if journal.is_file():
            for line in journal.read_text(encoding="utf-8").splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    break  # the line that the kill cut off
        if lines and lines[0] == {"plan": self._plan}:
            records = [TensorRecord.from_json(line) for line in lines[1:]]
            return {record.name: record for record in records}
        self.clear()
        return {}

    def clear(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def start_journal(self, records: dict[str, TensorRecord]) -> None:
        """Write the journal anew with what was proven."""
        lines = [json.dumps({"plan": self._plan})] + [json.dumps(r.as_json()) for r in records.values()]
        (self.path / JOURNAL).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def finished(self, record: TensorRecord) -> None:
        with self._write_lock, (self.path / JOURNAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.as_json()) + "\n")

    def publish(self, *, overwrite: bool) -> None:
        """Flush everything to disk and give the folder its final name."""
        (self.path / JOURNAL).unlink(missing_ok=True)
        (self.path / LOCK).unlink()
        for path in sorted(self.path.rglob("*"), reverse=True):
            sync(path)
        sync(self.path)
        replaced = self.final.with_name(self.final.name + ".replaced")
        if overwrite and self.final.exists():
            self.final.rename(replaced)
        self.path.rename(self.final)
        sync(self.final.parent)
        if replaced.exists():
            shutil.rmtree(replaced)
