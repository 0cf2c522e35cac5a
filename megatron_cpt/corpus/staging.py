"""The staging folder PREFIX.partial: parts of done units, a lock against a second writer, resume.

The folder belongs to one plan (input files with sizes and times, corpus description, tokenizer). The same plan
again continues; another plan starts the folder anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from megatron_cpt.corpus.files import write_atomically
from megatron_cpt.corpus.manifest import FORMAT_VERSION, TokenizerRecord
from megatron_cpt.corpus.schema import Corpus
from megatron_cpt.corpus.sources import Unit
from megatron_cpt.errors import DataError

log = logging.getLogger(__name__)


def plan_fingerprint(corpus: Corpus, units: Sequence[Unit], tokenizer: TokenizerRecord) -> str:
    """Identity of a run's output: same fingerprint, same bytes."""
    paths = sorted({path for unit in units for path in unit.paths})
    stats = [(path, stat.st_size, stat.st_mtime_ns) for path in paths for stat in (Path(path).stat(),)]
    content = {
        "format": FORMAT_VERSION,
        "corpus": corpus.model_dump(mode="json", exclude={"output_prefix", "tokenizer", "max_reject_ratio"}),
        "tokenizer": [tokenizer.fingerprint, tokenizer.eod_id],
        "files": stats,
        "units": [asdict(unit) for unit in units],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def staging_path(prefix: str) -> Path:
    return Path(f"{prefix}.partial")


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
        log.info("%s is of another input, configuration or tokenizer: starting anew", folder)
    for path in stale:
        path.unlink()
    write_atomically(plan, fingerprint.encode())
