"""Whatever reads a dataset refuses a damaged one, with one error and without output under a final name."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cpt.cli import cli
from megatron_cpt.corpus.dataset.indexed import HEADER, open_indexed
from megatron_cpt.corpus.dataset.manifest import bin_path, idx_path, manifest_path
from megatron_cpt.corpus.dataset.merge import merge_datasets
from megatron_cpt.corpus.dataset.soundness import open_dataset, open_proven
from megatron_cpt.corpus.dataset.split import split_dataset
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.errors import CptError, DataError
from megatron_cpt.eval.token_stream import open_token_stream
from tests.synthetic_data import random_documents, write_dataset
from tests.unit.corpus.conftest import TEXTS, write_jsonl
from tools.merge_datasets import datasets_of

ROOT = Path(__file__).parents[4]
DOCUMENTS, VOCABULARY = 12, 100
DTYPE_CODE, SEQUENCE_COUNT = 17, 18  # bytes of .idx
LENGTHS = HEADER.size
POINTERS = LENGTHS + 4 * DOCUMENTS
INDICES = POINTERS + 8 * DOCUMENTS

Damage = Callable[[Path], object]
PathOf = Callable[[Path], Path]


def stated(prefix: Path, **changes: object) -> None:
    """Change the manifest; sizes and hashes become those of the files unless they are among the changes."""
    fields = json.loads(manifest_path(prefix).read_text())
    for name, path in (("bin", bin_path(prefix)), ("idx", idx_path(prefix))):
        content = path.read_bytes()
        fields |= {f"{name}_bytes": len(content), f"{name}_sha256": hashlib.sha256(content).hexdigest()}
    manifest_path(prefix).write_text(json.dumps(fields | changes))


def index_with(place: int, value: int, dtype: str) -> Damage:
    """Another number in .idx, hashed as if it had always been there."""

    def damage(prefix: Path) -> None:
        content = bytearray(idx_path(prefix).read_bytes())
        new = np.array([value], dtype).tobytes()
        content[place : place + len(new)] = new
        idx_path(prefix).write_bytes(content)
        stated(prefix)

    return damage


def id_with(value: int, hashed: bool) -> Damage:
    def damage(prefix: Path) -> None:
        tokens = np.fromfile(bin_path(prefix), np.uint16)
        tokens[len(tokens) // 2] = value
        tokens.tofile(bin_path(prefix))
        if hashed:
            stated(prefix)

    return damage


def cut(path_of: PathOf, bytes_left: int) -> Damage:
    return lambda prefix: path_of(prefix).write_bytes(path_of(prefix).read_bytes()[:bytes_left])


def cut_and_stated(prefix: Path) -> None:
    content = bin_path(prefix).read_bytes()
    bin_path(prefix).write_bytes(content[:-2])
    stated(prefix, token_count=len(content) // 2 - 1)


def missing(path_of: PathOf) -> Damage:
    return lambda prefix: path_of(prefix).unlink()


def folder_instead(path_of: PathOf) -> Damage:
    def damage(prefix: Path) -> None:
        path_of(prefix).unlink()
        path_of(prefix).mkdir()

    return damage


def of_another(prefix: Path) -> None:
    """The ids of another dataset of the same size."""
    tokens = np.fromfile(bin_path(prefix), np.uint16)
    tokens[tokens > 0] = 1 + tokens[tokens > 0] % (VOCABULARY - 1)
    tokens.tofile(bin_path(prefix))


# What was done to the dataset, and words of the error.
INDEX_DAMAGE: dict[str, tuple[Damage, str]] = {
    "bin cut": (cut(bin_path, 100), "its manifest says"),
    "bin cut within an id": (cut(bin_path, 101), "its manifest says"),
    "bin cut, as stated": (cut_and_stated, ".bin holds"),
    "bin empty": (cut(bin_path, 0), "its manifest says"),
    "bin missing": (missing(bin_path), "is missing"),
    "bin a folder": (folder_instead(bin_path), "its manifest says"),
    "idx cut": (cut(idx_path, 90), "its manifest says"),
    "idx missing": (missing(idx_path), "is missing"),
    "manifest missing": (missing(manifest_path), "no set.manifest.json"),
    "manifest a folder": (folder_instead(manifest_path), "cannot be read"),
    "manifest cut": (cut(manifest_path, 50), "is not a manifest"),
    "magic": (index_with(0, 0, "u1"), "is not a Megatron index"),
    "version": (index_with(9, 2, "u8"), "version 2"),
    "dtype unknown": (index_with(DTYPE_CODE, 99, "u1"), "dtype code 99"),
    "dtype signed": (index_with(DTYPE_CODE, 3, "u1"), "dtype: int16 found"),
    "dtype narrower": (index_with(DTYPE_CODE, 1, "u1"), "dtype: uint8 found"),
    "more sequences": (index_with(SEQUENCE_COUNT, DOCUMENTS + 2, "u8"), "where its counts need"),
    "very many sequences": (index_with(SEQUENCE_COUNT, 2**62, "u8"), "where its counts need"),
    "length negative": (index_with(LENGTHS, -5, "i4"), "sequence 0 has no tokens"),
    "length zero": (index_with(LENGTHS + 8, 0, "i4"), "sequence 2 has no tokens"),
    "length beyond the end": (index_with(POINTERS - 4, 2**31 - 1, "i4"), ".bin holds"),
    "pointer beyond the end": (index_with(POINTERS + 8, 2**40, "i8"), "sequence 1 points"),
    "pointer negative": (index_with(POINTERS + 8, -2, "i8"), "sequence 1 points"),
    "pointer between ids": (index_with(POINTERS + 8, 3, "i8"), "sequence 1 points"),
    "document beyond the end": (index_with(INDICES + 16, 10**9, "i8"), "document indices"),
    "document negative": (index_with(INDICES + 16, -1, "i8"), "document indices"),
    "documents descend": (index_with(INDICES + 24, 1, "i8"), "document indices"),
    "first document missing": (index_with(INDICES, 1, "i8"), "document indices"),
    "last document missing": (index_with(INDICES + 8 * DOCUMENTS, DOCUMENTS - 1, "i8"), "document indices"),
}
CONTENT_DAMAGE: dict[str, tuple[Damage, str]] = {
    "id beyond the vocabulary": (id_with(VOCABULARY, hashed=True), f"id {VOCABULARY} near token 0 is outside"),
    "id changed": (id_with(1, hashed=False), "content of .bin"),
    "bin of another dataset": (of_another, "content of .bin"),
    "hash of idx": (lambda prefix: stated(prefix, idx_sha256="0" * 64), "content of .idx"),
    "hash of bin": (lambda prefix: stated(prefix, bin_sha256="0" * 64), "content of .bin"),
    "tokens of the sources": (
        lambda prefix: stated(prefix, sources=[{"name": "a", "files": 1, "documents": 1, "tokens": 7, "share": 1.0}]),
        "the sources have 7 tokens",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_dataset(folder / "other", random_documents(DOCUMENTS, VOCABULARY, seed=2), VOCABULARY)
    return write_dataset(folder / "set", random_documents(DOCUMENTS, VOCABULARY, seed=1), VOCABULARY)


@pytest.fixture
def damaged(sound: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A damaged dataset, beside the sound one `other`, and what is said of it."""
    shutil.copytree(sound.parent, tmp_path / "in")
    damage, words = request.param
    damage(tmp_path / "in" / "set")
    return tmp_path / "in" / "set", words


def cases(*kinds: dict[str, tuple[Damage, str]]) -> pytest.MarkDecorator:
    named = {name: case for kind in kinds for name, case in kind.items()}
    return pytest.mark.parametrize("damaged", list(named.values()), ids=list(named), indirect=True)


def refused(*args: object) -> str:
    """What a command says when it refuses."""
    result = CliRunner().invoke(cli, list(map(str, args)))
    assert isinstance(result.exception, DataError), (args, result.output, result.exc_info)
    assert result.exception.hint
    return result.exception.message


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@cases(INDEX_DAMAGE, CONTENT_DAMAGE)
def test_no_command_makes_a_dataset_of_a_damaged_one(damaged: tuple[Path, str], tmp_path: Path) -> None:
    prefix, words = damaged
    other, before = prefix.with_name("other"), files(tmp_path)
    out = ("--output-prefix", tmp_path / "out")
    for args in (
        ("merge", prefix, other, *out),
        ("merge", other, prefix, *out),
        ("dedup", other, prefix, *out, "--workers", 1),
        ("dedup", prefix, *out, "--near", "--workers", 1),
        ("split", prefix, "--split", "a=0.5,b=0.5"),
    ):
        said = refused(*args)
        assert words in said and str(prefix) in said, (args, said)
        assert files(tmp_path) == before, args


@cases(INDEX_DAMAGE)
def test_no_command_reads_along_a_damaged_index(damaged: tuple[Path, str], tmp_path: Path) -> None:
    prefix, words = damaged
    for args in (("inspect", prefix, "--documents", 20), ("verify", prefix)):
        assert words in refused(*args), args
    if bin_path(prefix).is_file() and idx_path(prefix).is_file():
        with pytest.raises(DataError) as caught:
            open_token_stream(str(prefix), tmp_path, VOCABULARY)
        assert words in caught.value.message


@cases(CONTENT_DAMAGE)
def test_verify_finds_damaged_content(damaged: tuple[Path, str]) -> None:
    assert damaged[1] in refused("verify", damaged[0])


def test_the_sound_dataset_passes_where_damaged_ones_are_refused(sound: Path, tmp_path: Path) -> None:
    """The control: the same calls work, so that it is the damage which is refused."""
    other = sound.with_name("other")
    assert open_dataset(str(sound))[0].document_count == DOCUMENTS
    assert len(open_proven([str(sound), str(other)])[1]) == 2
    for args in (
        ("merge", sound, other, "--output-prefix", tmp_path / "merged"),
        ("dedup", sound, other, "--output-prefix", tmp_path / "unique", "--workers", 1),
        ("split", tmp_path / "merged", "--split", "a=0.5,b=0.5"),
        ("inspect", sound, "--documents", 20),
        ("verify", sound),
    ):
        result = CliRunner().invoke(cli, list(map(str, args)))
        assert result.exit_code == 0, (args, result.output, result.exception)
    assert len(open_token_stream(str(sound), tmp_path, VOCABULARY).document_ends) == DOCUMENTS


def test_the_tool_with_megatrons_flags_passes_over_nothing(sound: Path, tmp_path: Path) -> None:
    def join(output: Path, *more: str) -> tuple[int, str]:
        line = [sys.executable, str(ROOT / "tools/merge_datasets.py"), "--input", str(folder), "--output-prefix"]
        done = subprocess.run([*line, str(output), *more], capture_output=True, text=True, cwd=ROOT)
        return done.returncode, done.stderr

    folder = tmp_path / "in"
    shutil.copytree(sound.parent, folder)
    (folder / "half.partial").mkdir()
    code, said = join(tmp_path / "out")
    assert code == 2 and f"{folder}/half: the dataset is half-written" in said
    (folder / "half.partial").rmdir()
    idx_path(folder / "set").unlink()
    code, said = join(tmp_path / "out")
    assert code == 2 and "set.idx is missing" in said and "hint:" in said and "Traceback" not in said
    shutil.copy(idx_path(sound), folder)
    assert join(folder / "joined") == (0, "")
    code, said = join(folder / "joined", "--overwrite")
    assert code == 2 and "joined with its own parts" in said
    assert not list(tmp_path.glob("out*")) and open_indexed(folder / "joined").document_count == 2 * DOCUMENTS


def test_a_dataset_that_is_joined_with_itself_is_told_of(
    sound: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    merge_datasets([str(sound), str(sound.with_name("other"))], str(tmp_path / "a"))
    assert "twice" not in caplog.text
    merge_datasets([str(sound), str(sound)], str(tmp_path / "b"))
    assert "hold them twice" in caplog.text and open_indexed(tmp_path / "b").document_count == 2 * DOCUMENTS


@cases({name: INDEX_DAMAGE[name] for name in ("bin cut", "pointer beyond the end", "document beyond the end")})
def test_a_damaged_reference_of_a_corpus_is_refused_before_the_work(
    damaged: tuple[Path, str], make_corpus: Any, tmp_path: Path
) -> None:
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS), dedup={"against": [str(damaged[0])]})
    with pytest.raises(DataError, match=damaged[1]):
        preprocess(corpus, workers=1)
    assert not (tmp_path / "out").exists()


def test_changed_content_of_a_reference_stops_a_corpus_before_its_duplicates(make_corpus: Any, tmp_path: Path) -> None:
    reference = make_corpus(write_jsonl(tmp_path / "r.jsonl", TEXTS[:2]), output_prefix=str(tmp_path / "ref"))
    preprocess(reference, workers=1)
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS), dedup={"against": [str(tmp_path / "ref")]})
    content = bin_path(tmp_path / "ref").read_bytes()
    bin_path(tmp_path / "ref").write_bytes(content[2:4] + content[:2] + content[4:])
    with pytest.raises(DataError, match=r"content of \.bin"):
        preprocess(corpus, workers=1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set.partial"]
    bin_path(tmp_path / "ref").write_bytes(content)
    assert preprocess(corpus, workers=1).datasets[corpus.output_prefix].document_count == len(TEXTS) - 2


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    suffix=st.sampled_from([".bin", ".idx", ".manifest.json"]),
    changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=3),
    cut_bytes=st.sampled_from([0, 0, 1, 2, 8, 40]),
)
def test_any_change_of_a_dataset_is_refused_or_leaves_every_document(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    suffix: str,
    changes: list[tuple[int, int]],
    cut_bytes: int,
) -> None:
    """What tools/merge_datasets.py calls, on the files that it finds."""
    folder = tmp_path_factory.mktemp("merge")
    documents = [random_documents(size, VOCABULARY, seed) for seed, size in enumerate(sizes)]
    for number, own in enumerate(documents):
        write_dataset(folder / f"part{number}", own, VOCABULARY)
    path = folder / f"part{len(sizes) - 1}{suffix}"
    original = path.read_bytes()
    content = bytearray(original)
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content[: len(content) - cut_bytes])
    try:
        manifest = merge_datasets(datasets_of(folder), str(folder / "out"))
    except DataError as error:
        assert error.hint and not list(folder.glob("out*")) and path.read_bytes() != original
        return
    assert path.read_bytes() == original or suffix == ".manifest.json"
    assert [ids.tolist() for ids in open_indexed(folder / "out")] == [ids.tolist() for own in documents for ids in own]
    assert manifest.document_count == sum(sizes) == sum(source.documents for source in manifest.sources)


@pytest.mark.parametrize(
    ("output", "words"),
    [("{}/", "is a folder"), ("{}/set.bin/x", "Not a directory"), ("/proc/none/x", "cannot write /proc/none/x")],
)
def test_an_output_that_cannot_be_written_is_one_clear_error(sound: Path, output: str, words: str) -> None:
    folder = sound.parent
    before = files(folder)
    for args in (("merge", sound, sound.with_name("other")), ("dedup", sound, "--workers", 1)):
        assert words in refused(*args, "--output-prefix", output.format(folder))
    assert files(folder) == before


def test_a_full_disk_leaves_nothing_under_the_final_name(sound: Path, tmp_path: Path) -> None:
    prefixes = [str(write_dataset(tmp_path / name, random_documents(400, VOCABULARY, seed=3))) for name in "ab"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(CptError, match=r"is full \(File too large\)"):
            merge_datasets(prefixes, str(tmp_path / "out"))
        with pytest.raises(CptError, match=r"is full \(File too large\)"):
            split_dataset(prefixes[0], {"x": 0.9, "y": 0.1})
    assert not [
        path for path in tmp_path.iterdir() if path.name.startswith(("out", "a_")) and path.suffix != ".partial"
    ]
    assert merge_datasets(prefixes, str(tmp_path / "out")).document_count == 800
