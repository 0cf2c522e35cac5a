"""Which files a source has: folders, links, globs; what is passed over is named."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path

import pytest

from megatron_cpt.corpus.readers.input_files import find_files
from megatron_cpt.corpus.schema import Source
from megatron_cpt.errors import DataError


def found(*patterns: str, **keys: str) -> list[str]:
    return [file.path for file in find_files(Source.model_validate({"files": patterns, **keys}))]


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that people have in folders: links, loops, other cases, files of unknown kinds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("raw/a.jsonl", "raw/sub/b.TXT", "raw/part-00000", "raw/c.pdf", "raw/.hidden.txt"):
        Path(name).write_text("{}\n")
    Path("raw/B.JSONL.GZ").write_bytes(gzip.compress(b"{}\n"))
    Path("elsewhere/z.csv").write_text("text\nz\n")
    Path("raw/linked").symlink_to("../elsewhere")
    Path("raw/sub/loop").symlink_to("..")
    Path("raw/same.jsonl").symlink_to("a.jsonl")
    Path("raw/broken.jsonl").symlink_to("nowhere")
    return tmp_path / "raw"


READ = ["raw/B.JSONL.GZ", "raw/a.jsonl", "raw/linked/z.csv", "raw/sub/b.TXT"]


@pytest.mark.usefixtures("raw")
@pytest.mark.parametrize("pattern", ["raw", "raw/", "./raw", "raw/*", "raw/**", "ra[w]"])
def test_all_ways_to_name_a_folder_give_its_files_once(pattern: str) -> None:
    assert found(pattern) == READ


@pytest.mark.usefixtures("raw")
def test_what_is_passed_over_is_counted_and_named_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found("raw")
    (line,) = [record.getMessage() for record in caplog.records]
    assert "5 file(s) passed over" in line
    for named in ("1 .pdf", "1 without a suffix", "1 hidden", "1 other name(s) of a file that is read", "broken link"):
        assert named in line
    caplog.clear()
    found("raw/a.jsonl")
    assert not caplog.records


@pytest.mark.usefixtures("raw")
def test_with_a_stated_format_every_file_is_read() -> None:
    assert found("raw", format="text") == [
        "raw/B.JSONL.GZ", "raw/a.jsonl", "raw/c.pdf", "raw/linked/z.csv", "raw/part-00000", "raw/sub/b.TXT",
    ]  # fmt: skip


@pytest.mark.usefixtures("raw")
@pytest.mark.parametrize(
    ("patterns", "message", "hint"),
    [
        (["raw/a.jsonl", "raw/*.jsonl"], "has raw/a.jsonl twice", "once"),
        (["raw", "raw/same.jsonl"], "the second time as raw/same.jsonl", "once"),
        (["raw/c.pdf"], "cannot tell its format", "state format:"),
        (["raw/*.pdf"], "matches no file", "1 .pdf"),
        (["raw/*.nothing"], "matches no file", "relative to the working directory"),
    ],
)
def test_mistakes_are_named(patterns: list[str], message: str, hint: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        found(*patterns)
    assert caught.value.hint is not None and hint in caught.value.hint


def test_a_glob_in_a_folder_with_brackets_is_told_to_escape_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data [2024]" / "x").mkdir(parents=True)
    (tmp_path / "data [2024]" / "x" / "a.jsonl").write_text("{}\n")
    for pattern in ("data [2024]/x/*.jsonl", "data [2024]/**/*.jsonl"):
        with pytest.raises(DataError, match="matches no file") as caught:
            found(pattern)
        assert caught.value.hint is not None
        assert found(caught.value.hint.rpartition(", ")[2]) == ["data [2024]/x/a.jsonl"]
