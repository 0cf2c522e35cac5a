"""Which files a source has: folders, links, globs; what is passed over is named."""

from __future__ import annotations

import glob
import gzip
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_cpt.corpus.readers.globs import matching_names
from megatron_cpt.corpus.readers.input_files import find_files
from megatron_cpt.corpus.readers.plan import plan_units
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.schema import Source
from megatron_cpt.errors import DataError
from tests.unit.corpus.conftest import TEXTS, write_jsonl


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


@pytest.mark.parametrize("name", ["old.tar.GZ", "old.zip", "old.jsonl.Z", "old.jsonl.lzma"])
def test_an_archive_is_told_to_be_unpacked(raw: Path, name: str) -> None:
    (raw / name).write_bytes(b"x")
    with pytest.raises(DataError, match="this kind of archive or compression is not read") as caught:
        found(f"raw/{name}")
    assert "unpack it" in str(caught.value.hint)


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
        (["raw/broken.jsonl"], "is a link to nowhere, which is not there", "repair"),
        (["/dev/null"], "neither a file nor a folder", "take - for standard input"),
        (["~/a.jsonl"], "~ is not expanded", str(Path("~/a.jsonl").expanduser())),
        (["raw/{a,b}.jsonl"], "braces are not expanded", "a pattern for each"),
        (["s3://bucket/a.jsonl"], "not on this machine", "copy it"),
    ],
)
def test_mistakes_are_named(patterns: list[str], message: str, hint: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        found(*patterns)
    assert caught.value.hint is not None and hint in caught.value.hint


@pytest.mark.usefixtures("raw")
def test_links_that_lead_in_circles_are_followed_once_by_a_recursive_glob(caplog: pytest.LogCaptureFixture) -> None:
    """The library's glob goes round a circle 40 times, and takes forever where two links lead back."""
    for number in range(5):
        Path(f"raw/sub/back{number}").symlink_to("..")
    with caplog.at_level(logging.INFO):
        assert found("raw/**/*.jsonl") == ["raw/a.jsonl"]
    assert "1 file(s) passed over" in caplog.text
    assert found("**/linked/*.csv") == ["raw/linked/z.csv"]


@pytest.mark.parametrize(
    "pattern", ["**/*.py", "*/corpus/*", "./tests/**/corpus/**/test_*.py", "[dt]*/*", ".*", "docs/../docs/*.md", "docs"]
)
def test_a_glob_matches_what_the_library_matches(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[4])
    theirs = {os.path.normpath(name) for name in glob.glob(pattern, recursive=True)}  # noqa: PTH207
    assert {os.path.normpath(name) for name in matching_names(pattern)} == theirs
    assert theirs


@pytest.mark.usefixtures("raw")
@pytest.mark.parametrize("pattern", ["raw", "raw/**/*.jsonl", "*/*/*", "raw/sub"])
def test_a_folder_that_may_not_be_read_is_an_error_not_an_omission(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if path.endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match="raw/sub: Permission denied"):
        found(pattern)


def test_an_empty_name_is_not_the_working_directory() -> None:
    with pytest.raises(ValidationError, match="empty name"):
        found("")


def test_a_file_in_two_sources_is_told_of(tmp_path: Path, make_corpus: Any, caplog: pytest.LogCaptureFixture) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl").symlink_to(file)
    sources = [{"name": name, "files": str(tmp_path / f"{name}.jsonl")} for name in "ab"]
    assert len(plan_units(make_corpus(sources=sources))) == 2
    assert f"sources 'a' and 'b' both read 1 file(s), such as {tmp_path}/b.jsonl" in caplog.text


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


@pytest.mark.parametrize("pattern", ["data", "data/*", "data/**"])
@pytest.mark.parametrize("split", [{}, {"train": 0.5, "valid": 0.5}])
def test_what_a_run_writes_into_the_folder_that_it_reads_is_no_input_of_the_next(
    tmp_path: Path, make_corpus: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    pattern: str, split: dict[str, float],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "data" / "a.jsonl", [*TEXTS, *TEXTS, ""])
    write_jsonl(tmp_path / "data" / "other.rejects.jsonl", ["a name that a user may give"])
    (tmp_path / "data" / "unfinished.partial").mkdir()
    for name in ("lock", "plan", "000001.pieces.json"):
        (tmp_path / "data" / "unfinished.partial" / name).write_text("{}")
    keys: dict[str, Any] = {
        "output_prefix": "data/set",
        "split": split,
        "dedup": True,
        "source": {"metadata": ["text"]},
    }
    first = preprocess(make_corpus(Path(pattern), **keys), workers=1)
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert {"set.rejects.jsonl", "set.duplicates.jsonl", "set.report.html"} <= names and first.documents_read == 12
    with caplog.at_level(logging.INFO):
        again = preprocess(make_corpus(Path(pattern), **keys), workers=1)
    assert again.already_done and again.documents_read == 12
    assert "output of an earlier run" in caplog.text
    assert found("data/set.rejects.jsonl", "data/*.duplicates.jsonl") == [
        "data/set.rejects.jsonl",
        "data/set.duplicates.jsonl",
    ]
