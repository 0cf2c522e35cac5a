"""Readers: every format gives the same documents, every bad input is a counted reject or one clear error."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import resource
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.corpus.documents import UnitTally
from megatron_cpt.corpus.readers import jsonl as readers
from megatron_cpt.corpus.readers import plan as sources
from megatron_cpt.corpus.readers.html_text import html_to_text
from megatron_cpt.corpus.readers.plan import plan_units
from megatron_cpt.corpus.readers.read import read_unit
from megatron_cpt.corpus.readers.registry import resolve_datasets
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.schema import Corpus, parse_corpus
from megatron_cpt.errors import ConfigError, CptError, DataError
from tests.unit.corpus.conftest import TEXTS, write_jsonl

LIMIT = 1 << 20


def corpus_of(*files: Path, **source: Any) -> Corpus:
    raw = {"files": [str(file) for file in files], **source}
    return parse_corpus({"output_prefix": "unused", "tokenizer": "unused", "sources": [raw]}, "test")


def read(*files: Path, limit: int = LIMIT, **source: Any) -> tuple[list[str], UnitTally]:
    """All texts of the units of `files`, and one tally over them."""
    texts, tally = [], UnitTally()
    for unit in plan_units(corpus_of(*files, **source)):
        own = UnitTally()
        for batch in read_unit(unit, own, limit):
            assert len(batch.texts) == len(batch.places)
            texts += batch.texts
        tally.documents_read += own.documents_read
        tally.counts += own.counts
        tally.rejects += own.rejects
    assert tally.documents_read == len(texts) + sum(tally.counts.values())
    return texts, tally


COMPRESSORS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_jsonl(tmp_path: Path, suffix: str) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    file = tmp_path / f"b.jsonl{suffix}"
    file.write_bytes(COMPRESSORS[suffix](data))
    assert read(file)[0] == TEXTS
    file.write_bytes(COMPRESSORS[suffix](data) * 2)  # several members or frames in one file
    assert read(file)[0] == TEXTS * 2


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_cut_or_damaged_compressed_file_is_an_error(tmp_path: Path, suffix: str) -> None:
    compressed = COMPRESSORS[suffix](write_jsonl(tmp_path / "a.jsonl", [*TEXTS, *map(str, range(999))]).read_bytes())
    file = tmp_path / f"b.jsonl{suffix}"
    file.write_bytes(compressed[: len(compressed) * 2 // 3])
    with pytest.raises(DataError, match="damaged"):
        read(file)
    file.write_bytes(b"not compressed at all, whatever the name says")
    with pytest.raises(DataError, match="damaged"):
        read(file)


def test_arrow_and_save_to_disk_folder(tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS, "n": list(range(len(TEXTS)))})
    folder = tmp_path / "saved"
    folder.mkdir()
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text('{"_data_files": []}')
    (folder / "dataset_info.json").write_text("{}")
    assert read(folder)[0] == TEXTS
    with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path / "b.arrow")[0] == TEXTS
    (tmp_path / "dict" / "train").mkdir(parents=True)
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match="several splits") as caught:
        read(tmp_path / "dict")
    assert "train" in str(caught.value.hint)


def test_columns_missing_null_or_not_text(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a", None, "b"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    texts, tally = read(tmp_path / "a.parquet")
    assert texts == ["a", "b"] and tally.counts == {"text_not_a_string": 1} and tally.rejects[0].place == 2
    for key, message in (("body", "no column 'body'"), ("n", "int64, not text")):
        with pytest.raises(DataError, match=message):
            read(tmp_path / "a.parquet", text=key)


def test_folder_of_code_markdown_and_html(tmp_path: Path) -> None:
    (tmp_path / "src" / "pkg").mkdir(parents=True)
    (tmp_path / "src" / ".git").mkdir()
    (tmp_path / "src" / ".git" / "config.py").write_text("hidden")
    (tmp_path / "src" / "a.py").write_text("x = 1\n")
    (tmp_path / "src" / "pkg" / "b.rs").write_text("fn main() {}\n")
    (tmp_path / "src" / "logo.png").write_bytes(b"\x89PNG")
    (tmp_path / "src" / "z.md").write_bytes(b"\xef\xbb\xbf# title\n")
    (tmp_path / "src" / "page.html").write_text("<p>Hello <b>world</b></p><script>x()</script>")
    assert read(tmp_path / "src")[0] == ["x = 1\n", "Hello world", "fn main() {}\n", "# title\n"]


def test_html_keeps_the_text_and_drops_the_page_furniture() -> None:
    html = """<html><head><title>t</title><style>p{}</style></head><body><nav><a>Home</a></nav>
    <h1>Title</h1><div><p>First&nbsp;line<br>second <i>italic</i> &amp; more</p><p>中文</p></div>
    <script>var a = "<p>no</p>";</script><footer>(c)</footer></body></html>"""
    assert html_to_text(html) == "Title\n\nFirst line\nsecond italic & more\n\n中文"
    assert html_to_text("") == ""


def test_template_dotted_key_and_metadata(tmp_path: Path, make_corpus: Any) -> None:
    rows = [{"id": i, "meta": {"title": f"T{i}"}, "body": text} for i, text in enumerate(TEXTS)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"body": "no title"}\n')
    assert read(file, text="meta.title")[0] == [f"T{i}" for i in range(len(TEXTS))]
    texts, tally = read(file, text="{meta.title}: {body}")
    assert texts[1] == f"T1: {TEXTS[1]}" and tally.counts == {"missing_key": 1}
    source = {"text": "body", "metadata": ["id"]}
    corpus = make_corpus(file, source=source, split={"train": 0.5, "valid": 0.5})
    outcome = preprocess(corpus, workers=1)
    kept = [
        json.loads(line)
        for prefix in outcome.datasets
        for line in Path(f"{prefix}.documents.jsonl").read_text().splitlines()
    ]
    found = sorted((row["line"], row["id"] is None or row["id"] == row["line"] - 1) for row in kept)
    assert found == [(line, True) for line in range(1, 7)]
    for prefix, manifest in outcome.datasets.items():
        assert len(Path(f"{prefix}.documents.jsonl").read_text().splitlines()) == manifest.document_count


def test_registry(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "a.jsonl", TEXTS, key="content")
    registry = tmp_path / "data" / "dataset_info.json"
    registry.write_text(json.dumps({"med": {"file_name": "a.jsonl", "text": "content"}}))
    raw = {"output_prefix": "x", "tokenizer": "t", "registry": str(registry), "sources": [{"dataset": "med"}]}
    (source,) = resolve_datasets(parse_corpus(raw, "test")).sources
    assert source.files == (str(tmp_path / "data" / "a.jsonl"),) and source.text == "content" and source.name == "med"
    raw["sources"] = [{"dataset": "mad"}]
    with pytest.raises(ConfigError, match="no dataset 'mad'") as caught:
        resolve_datasets(parse_corpus(raw, "test"))
    assert "did you mean 'med'" in str(caught.value.hint)


def test_standard_input(tmp_path: Path, tokenizer_dir: Path, make_corpus: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    preprocess(make_corpus(file), workers=1)
    command = [sys.executable, "-c", "from megatron_cpt.cli import main; main()", "preprocess", "--input", "-"]
    command += ["--output-prefix", str(tmp_path / "piped"), "--tokenizer", str(tokenizer_dir)]
    result = subprocess.run(command, input=file.read_bytes(), capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    assert (tmp_path / "piped.bin").read_bytes() == (tmp_path / "out" / "set.bin").read_bytes()
    assert not list(tmp_path.glob("piped.stdin*"))


def test_line_over_the_limit_is_a_reject_and_memory_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BATCH_BYTES", 1 << 12)
    file = tmp_path / "a.jsonl"
    with file.open("wb") as out:
        out.write(b'{"text": "before"}\n{"text": "')
        for _ in range(300):
            out.write(b"x" * 100_000)
        out.write(b'"}\n{"text": "after"}\n')
    import tracemalloc

    tracemalloc.start()
    texts, tally = read(file, limit=100_000)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["before", "after"] and tally.counts == {"document_too_long": 1}
    assert tally.rejects[0].place == 2 or tally.documents_read == 3
    assert peak_bytes < 10 << 20


def test_bom_blank_lines_and_windows_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert read(file)[0] == ["a", "b"]


def test_records_that_are_not_documents(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('[1]\n"text"\n{"text": 5}\n{"text": null}\n{}\n{"text": "ok"}\n')
    texts, tally = read(file)
    assert texts == ["ok"]
    assert tally.counts == {"not_an_object": 2, "text_not_a_string": 2, "missing_key": 1}
    assert [r.place for r in tally.rejects] == [1, 2, 3, 4, 5]


_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(_text, min_size=1, max_size=40), unit_bytes=st.integers(5, 300), block=st.integers(1, 64))
def test_any_cut_of_a_file_into_units_gives_every_document_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], unit_bytes: int, block: int
) -> None:
    file = write_jsonl(tmp_path_factory.getbasetemp() / "cut.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "MIN_UNIT_BYTES", unit_bytes)
        patch.setattr(sources, "MAX_UNIT_BYTES", unit_bytes)
        patch.setattr(readers, "BATCH_BYTES", block)
        assert read(file)[0] == texts


ODD_LINES = [
    b'{"text": "ok"}', b'{"text": "\\ud83d"}', b'{"text": NaN}', b'{"text": "a", "text": 1}', b"{" * 2000,
    b"\xff" * 9, b'{"text": "\\u0000"}', b"null", b'{"text": 1e999}', b"\r", b"\x00",
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(data=st.lists(st.one_of(st.binary(max_size=60), st.sampled_from(ODD_LINES)), max_size=30))
def test_fuzz_no_line_crashes_a_reader_or_gets_lost(
    tmp_path_factory: pytest.TempPathFactory, data: list[bytes]
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    file.write_bytes(b"\n".join(data) + b"\n")
    try:
        texts, tally = read(file)  # asserts read = kept + rejected
    except DataError as error:
        assert "by its content" in error.message  # it begins as a compressed file does
        return
    content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    assert tally.documents_read == sum(bool(line.strip()) for line in content.split(b"\n"))
    assert all(isinstance(text, str) for text in texts)


def _whole_files(folder: Path) -> dict[str, bytes]:
    """The same texts in every format that damage may befall."""
    import pyarrow.parquet as pq

    table = pa.table({"text": TEXTS * 5})
    plain = write_jsonl(folder / "whole.jsonl", TEXTS * 5).read_bytes()
    pq.write_table(table, folder / "whole.parquet", write_page_checksum=True)
    with pa.ipc.new_file(folder / "whole.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    with pa.ipc.new_stream(folder / "stream.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    files = {name: (folder / name).read_bytes() for name in ("whole.parquet", "whole.arrow", "stream.arrow")}
    return (
        files
        | {f"fuzz.jsonl{suffix}": compress(plain) for suffix, compress in COMPRESSORS.items()}
        | {"fuzz.csv": b"id,text\n" + b"".join(b'%d,"a ""quoted"" text, %d"\n' % (i, i) for i in range(50))}
    )


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(
        ["whole.parquet", "whole.arrow", "stream.arrow", "fuzz.csv", *(f"fuzz.jsonl{suffix}" for suffix in COMPRESSORS)]
    ),
    cut=st.one_of(st.just(0), st.integers(0, 2000)),
    flips=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=4),
)
def test_fuzz_a_damaged_file_is_a_data_error_or_read_with_every_document_counted(
    tmp_path_factory: pytest.TempPathFactory, name: str, cut: int, flips: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz_damaged"
    folder.mkdir(exist_ok=True)
    data = bytearray(_whole_files(folder)[name])
    for place, value in flips:
        data[place % len(data)] = value
    file = folder / name
    file.write_bytes(bytes(data[: len(data) - cut]))
    try:
        texts, _ = read(file)  # asserts read = kept + rejected
    except DataError as error:
        assert error.hint
    else:
        is_checked = name.endswith((".gz", ".bz2", ".xz", ".zst")) and bytes(data) != _whole_files(folder)[name]
        assert not is_checked or texts == TEXTS * 5  # a flip in a name or a time of the header


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"output_prefix": "out/"}, "is a folder"),
        ({"output_prefix": "a.jsonl/x"}, "cannot write a.jsonl/x: Not a directory"),
        ({"output_prefix": "/proc/none/x"}, "cannot write /proc/none/x"),
        ({"filters": {"custom": ["bad_filter:raises"]}}, r"raised RuntimeError: boom .*bad_filter.py:2.*a.jsonl:1"),
        ({"filters": {"custom": ["bad_filter:number"]}}, "returned int"),
        ({"registry": "registry.json", "source": {"files": (), "dataset": "x"}}, "'x' is not a mapping"),
    ],
)
def test_mistakes_are_one_clear_error(
    tmp_path: Path, make_corpus: Any, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ["hello world"])
    (tmp_path / "registry.json").write_text('{"x": 5}')
    lines = "def raises(text):\n    raise RuntimeError('boom')\n\ndef number(text):\n    return 5\n"
    (tmp_path / "bad_filter.py").write_text(lines)
    with pytest.raises((ConfigError, DataError), match=message):
        preprocess(make_corpus(Path("a.jsonl"), **keys), workers=1)
    assert not list(tmp_path.rglob("*.bin"))


def test_one_json_array_is_told_how_to_become_jsonl(tmp_path: Path, make_corpus: Any) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "b"}]')
    with pytest.raises(DataError) as caught:
        preprocess(make_corpus(tmp_path / "a.json"), workers=1)
    assert "jq -c" in str(caught.value.hint)


def test_file_size_limit_is_one_clear_error(tmp_path: Path, make_corpus: Any) -> None:
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", ["hello world"] * 5000))
    with ExitStack() as stack:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(CptError, match=r"is full \(File too large\)"):
            preprocess(corpus, workers=1)
    preprocess(corpus, workers=1)  # the same call continues
