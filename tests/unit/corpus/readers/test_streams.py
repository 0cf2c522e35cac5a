"""Streams (compressed files, large row groups, Arrow): all workers share one file, and the result is the same."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megatron_cpt import durable
from megatron_cpt.corpus.dataset.manifest import bin_path, idx_path, read_manifest
from megatron_cpt.corpus.readers import plan as sources
from megatron_cpt.corpus.readers import streams
from megatron_cpt.corpus.run import corpus_run
from megatron_cpt.corpus.run import unit as pipeline
from megatron_cpt.corpus.run.preprocess import preprocess, preprocess_shard
from megatron_cpt.corpus.workers import run_units
from megatron_cpt.errors import DataError
from tests.unit.corpus.conftest import write_jsonl
from tests.unit.corpus.run.test_preprocess import many_texts

COMPRESS = {
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.compress(data),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
TEXTS = many_texts(400)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every compressed file is a stream of many blocks."""
    for name, value in {"MIN_UNIT_BYTES": 500, "MAX_UNIT_BYTES": 500, "MIN_PIECE_BYTES": 10_000}.items():
        monkeypatch.setattr(sources, name, value)
    monkeypatch.setattr("megatron_cpt.corpus.readers.jsonl.BATCH_BYTES", 3_000)


def data_of(corpus: Any) -> tuple[bytes, bytes]:
    return bin_path(corpus.output_prefix).read_bytes(), idx_path(corpus.output_prefix).read_bytes()


def staged(corpus: Any, pattern: str) -> list[Path]:
    return sorted(Path(f"{corpus.output_prefix}.partial").glob(pattern))


def compressed(path: Path, suffix: str, texts: list[str] = TEXTS) -> Path:
    plain = write_jsonl(path, texts)
    out = path.with_name(path.name + suffix)
    out.write_bytes(COMPRESS[suffix](plain.read_bytes()))
    return out


@pytest.mark.parametrize("suffix", list(COMPRESS))
def test_compressed_file_gives_the_files_of_the_plain_one(tmp_path: Path, make_corpus: Any, suffix: str) -> None:
    stream = compressed(tmp_path / "a.jsonl", suffix)
    plain = make_corpus(tmp_path / "a.jsonl")
    preprocess(plain, workers=1)
    expected = data_of(plain)
    corpus = make_corpus(stream)
    assert [unit.piece_bytes for unit in sources.plan_units(corpus)] == [10_000]
    for workers in (1, 3):
        preprocess(corpus, workers=workers, overwrite=True)
        assert data_of(corpus) == expected
        assert read_manifest(corpus.output_prefix).input_bytes == stream.stat().st_size


@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrow stream"])
def test_one_large_row_group_and_arrow_are_shared(tmp_path: Path, make_corpus: Any, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": TEXTS, "id": list(range(len(TEXTS)))})
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=len(TEXTS))
    else:
        open_writer = pa.ipc.new_stream if kind == "arrow stream" else pa.ipc.new_file
        with path.open("wb") as file, open_writer(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=50)
    corpus = make_corpus(path, source={"metadata": ["id"]})
    assert sum(unit.piece_bytes > 0 for unit in sources.plan_units(corpus)) == 1
    results = []
    for source in (write_jsonl(tmp_path / "plain.jsonl", TEXTS), path):
        corpus = make_corpus(source, source={"metadata": ["id"]})
        preprocess(corpus, workers=2, overwrite=True)
        results.append(data_of(corpus))
    assert results[0] == results[1]
    rows = [json.loads(line) for line in Path(f"{corpus.output_prefix}.documents.jsonl").read_text().splitlines()]
    assert [(row["id"], row["line"], row["file"]) for row in rows] == [(i, i + 1, str(path)) for i in range(len(TEXTS))]


def test_rejects_of_blocks_have_absolute_lines_and_long_lines_do_not_join(tmp_path: Path, make_corpus: Any) -> None:
    rows = [json.dumps({"text": text}).encode() for text in TEXTS]
    rows[0] = b"\xef\xbb\xbf" + rows[0]  # a byte order mark
    rows[250] = b"{"
    rows[320] = b'{"text": "' + b"x" * 50_000 + b'"}'
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b"\r\n".join(rows)))
    corpus = make_corpus(file, max_reject_ratio=0.5, max_document_bytes=20_000)
    outcome = preprocess(corpus, workers=2)
    assert outcome.rejects == {"invalid_json": 1, "document_too_long": 1}
    assert outcome.documents_read == len(TEXTS)
    assert outcome.rejects_file is not None
    listed = [json.loads(line) for line in Path(outcome.rejects_file).read_text().splitlines()]
    assert [(entry["line"], entry["file"]) for entry in listed] == [(251, str(file)), (321, str(file))]


def test_cut_stream_is_an_error_and_the_run_continues_when_nothing_changed(tmp_path: Path, make_corpus: Any) -> None:
    file = compressed(tmp_path / "a.jsonl", ".gz")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is damaged or cut short"):
        preprocess(make_corpus(file), workers=2)
    assert not bin_path(make_corpus(file).output_prefix).exists()


KILL = """
import os, signal, sys
from megatron_cpt.corpus.readers import plan as sources
from megatron_cpt.corpus.run import unit as pipeline
from megatron_cpt.corpus.readers import streams
from megatron_cpt.corpus.run import preprocess
from megatron_cpt.corpus.schema import load_corpus
import megatron_cpt.corpus.readers.jsonl as readers
sources.MIN_UNIT_BYTES = sources.MAX_UNIT_BYTES = 500
sources.MIN_PIECE_BYTES, readers.BATCH_BYTES = 10_000, 3_000
module, name, count = {"commit": pipeline, "read": streams}[sys.argv[2]], sys.argv[3], int(sys.argv[4])
original, calls = getattr(module, name), []
def wrapped(*args, **kwargs):
    calls.append(1)
    if len(calls) == count:
        os.killpg(os.getpgid(0), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(module, name, wrapped)
preprocess.preprocess(load_corpus(sys.argv[1]), workers=2)
"""


@pytest.mark.parametrize(("module", "name", "count"), [("commit", "commit_unit", 2), ("read", "_with_file", 4)])
def test_killed_in_the_middle_of_a_stream(tmp_path: Path, make_corpus: Any, module: str, name: str, count: int) -> None:
    file = compressed(tmp_path / "a.jsonl", ".zst")
    corpus = make_corpus(file, dedup={"near": True})
    preprocess(corpus, workers=1)
    expected = data_of(corpus)
    for path in Path(corpus.output_prefix).parent.glob("set*"):
        path.unlink()
    description = tmp_path / "corpus.yaml"
    description.write_text(json.dumps(corpus.model_dump(mode="json")))
    run = subprocess.run(
        [sys.executable, "-c", KILL, str(description), module, name, str(count)], start_new_session=True
    )
    assert run.returncode == -signal.SIGKILL
    assert staged(corpus, "*.json" if module == "commit" else "*.piece.*")
    assert not bin_path(corpus.output_prefix).exists()
    preprocess(corpus, workers=2)
    assert data_of(corpus) == expected
    assert not staged(corpus, "*")


@pytest.mark.parametrize("keys", [{}, {"dedup": {"near": True, "passages": True}}])
def test_shards_share_one_stream(tmp_path: Path, make_corpus: Any, keys: dict[str, Any]) -> None:
    corpus = make_corpus(compressed(tmp_path / "a.jsonl", ".gz"), compressed(tmp_path / "b.jsonl", ".gz"), **keys)
    preprocess(corpus, workers=1)
    expected = data_of(corpus)
    for shards in (2, 3):
        for _ in range(1 + bool(keys)):
            done = [preprocess_shard(corpus, shard, shards, workers=1) for shard in range(shards)]
        assert min(done) >= 3
        assert not staged(corpus, "*.piece.*")
        preprocess(corpus, workers=1, overwrite=True)
        assert data_of(corpus) == expected


def test_few_blocks_wait_on_disk(tmp_path: Path, make_corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus(compressed(tmp_path / "a.jsonl", ".gz", many_texts(3000)))
    seen: list[int] = []
    original = pipeline.commit_unit
    log = tmp_path / "seen"

    def counting(*args: Any) -> None:
        with log.open("a") as file:
            file.write(f"{len(staged(corpus, '*.piece.*'))}\n")
        original(*args)

    monkeypatch.setattr(pipeline, "commit_unit", counting)
    preprocess(corpus, workers=2)
    seen = [int(line) for line in log.read_text().split()]
    assert len(seen) > 20 and max(seen) <= 2 + 2 + 2  # in work, waiting, held by the reader


def test_error_of_a_stream_reaches_the_caller() -> None:
    def broken() -> Iterator[int]:
        yield from range(3)
        raise DataError("the stream broke")

    seen = []
    with pytest.raises(DataError, match="the stream broke"):
        for value in run_units(lambda x: x * 10, [], 2, [broken]):
            seen.append(value)
    assert set(seen) <= {0, 10, 20}


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("streams", [1, 4, 9])
def test_pool_gives_every_item_once(workers: int, streams: int) -> None:
    several = [lambda s=s: iter(range(s * 100, s * 100 + 7)) for s in range(1, streams + 1)]
    expected = [*range(20), *(i for s in range(1, streams + 1) for i in range(s * 100, s * 100 + 7))]
    assert sorted(run_units(lambda x: x, range(20), workers, several)) == expected


def test_a_unit_is_on_the_disk_before_its_record_says_so(
    tmp_path: Path, make_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power nothing that a record counts on may be empty: flushed first, then named, then recorded."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.replace

    def log_fsync(descriptor: int) -> None:
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").resolve().name))
        fsync(descriptor)

    def log_rename(self: Path, target: Path) -> Path:
        events.append(("name", f"{self.name} {Path(target).name}"))
        return rename(self, target)

    monkeypatch.setattr(durable.os, "fsync", log_fsync)
    monkeypatch.setattr(Path, "replace", log_rename)
    rows = write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:20], 5])
    keys = {"dedup": {"near": True}, "max_reject_ratio": 1, "source": {"metadata": ["text"]}}
    monkeypatch.setattr(sources, "MAX_UNIT_BYTES", 1 << 20)
    monkeypatch.setattr(sources, "MIN_UNIT_BYTES", 1 << 20)
    preprocess(make_corpus(rows, **keys), workers=1)
    record = next(i for i, (kind, what) in enumerate(events) if kind == "name" and what.endswith(" 000000.json"))
    synced = {what for kind, what in events[:record] if kind == "sync"}
    named = [what.split() for kind, what in events[:record] if kind == "name"]
    finals = {final for _, final in named}
    assert {"000000.all.part", "000000.rejects.jsonl", "000000.keys.npy", "000000.order.npy"} <= finals
    for partial, _ in [*named, events[record][1].split()]:
        assert partial in synced, partial
    assert "000000.all.documents.jsonl" in synced
    last_name = max(i for i, (kind, _) in enumerate(events[:record]) if kind == "name")
    assert ("sync", "set.partial") in events[last_name:record], "the names themselves"


def test_stale_blocks_of_a_killed_run_go_at_once(tmp_path: Path, make_corpus: Any) -> None:
    corpus = make_corpus(compressed(tmp_path / "a.jsonl", ".gz"))
    folder = Path(f"{corpus.output_prefix}.partial")
    folder.mkdir(parents=True)
    (folder / "000000-0000.piece.999999").write_bytes(b"left")
    streams.forget_stale_pieces(folder)
    assert not list(folder.iterdir())
    assert corpus_run.LARGE_PART_OF_SHARE < 1
