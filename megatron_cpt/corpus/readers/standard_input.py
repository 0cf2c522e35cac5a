"""`-` as an input: jsonl from a pipe, kept in a file so that it can be read by several workers and again."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from megatron_cpt.corpus.schema import Corpus


@contextmanager
def standard_input_as_file(corpus: Corpus) -> Iterator[Corpus]:
    """The corpus with `-` replaced by a file beside the output; the file goes when the block succeeds.

    It is named by its content and has a fixed time, so that the same input continues a killed run.
    """
    if not any("-" in source.files for source in corpus.sources):
        yield corpus
        return
    spool = _spool(Path(f"{corpus.output_prefix}.stdin.partial"))
    sources = [
        source.model_copy(update={"files": tuple(str(spool) if f == "-" else f for f in source.files)})
        for source in corpus.sources
    ]
    yield corpus.model_copy(update={"sources": tuple(sources)})
    spool.unlink()


def _spool(partial: Path) -> Path:
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    digest = xxhash.xxh3_64()
    with partial.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    final = partial.with_name(partial.name.removesuffix(".partial") + f"-{digest.hexdigest()}.jsonl")
    partial.replace(final)
    os.utime(final, (0, 0))
    return final
