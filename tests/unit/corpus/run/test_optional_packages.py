"""What is not installed costs speed or is named: the same files without fastokens and rensa, an error for pyarrow."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.corpus.dataset.manifest import read_manifest
from megatron_cpt.corpus.dedup import minhash
from megatron_cpt.corpus.filters.language import model_file
from megatron_cpt.corpus.run.preprocess import preprocess
from megatron_cpt.corpus.schema_processing import Language
from megatron_cpt.errors import DataError
from tests.unit.corpus.conftest import TEXTS, write_jsonl


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    minhash._chosen.cache_clear()
    yield
    minhash._chosen.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
def test_without_fastokens_and_rensa_the_same_files_come_out_and_two_lines_say_slower(
    tmp_path: Path, make_corpus: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sentences = [f"{text} {number} {' '.join(TEXTS[:3])}" for number in range(12) for text in TEXTS]
    file = write_jsonl(tmp_path / "a.jsonl", sentences)  # many are near duplicates of each other
    corpus = make_corpus(file, dedup={"near": {"similarity": 0.6}})
    fast = preprocess(corpus, workers=1)
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("set.*") if path.is_file()}
    assert fast.rejects.get("duplicate_near") and {"set.bin", "set.idx", "set.manifest.json"} <= set(written)
    shutil.rmtree(tmp_path / "out")

    monkeypatch.setitem(sys.modules, "fastokens", None)
    monkeypatch.setitem(sys.modules, "rensa", None)
    minhash._chosen.cache_clear()
    with caplog.at_level(logging.WARNING):
        preprocess(corpus, workers=1)
    assert "fastokens is not used" in caplog.text and "rensa is not used" in caplog.text
    assert caplog.text.count("slower") == 2
    for name, content in written.items():
        assert (tmp_path / "out" / name).read_bytes() == content, name


def test_without_pyarrow_a_parquet_file_names_the_extra(
    tmp_path: Path, make_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    for name in ("arrow", "columnar"):
        monkeypatch.delitem(sys.modules, f"megatron_cpt.corpus.readers.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="need the package pyarrow") as caught:
        preprocess(make_corpus(tmp_path / "a.parquet"), workers=1)
    assert "megatron-cpt[parquet]" in (caught.value.hint or "")
    monkeypatch.undo()
    importlib.import_module("megatron_cpt.corpus.readers.columnar")


def test_the_language_model_is_in_the_manifest_and_may_be_a_file_of_the_users(tmp_path: Path, make_corpus: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS[:2])
    shipped = model_file(Language(keep=("en",)))
    sha256 = hashlib.sha256(shipped.read_bytes()).hexdigest()
    rule: dict[str, Any] = {"keep": ["en"], "min_score": 0.1}
    prefix = next(iter(preprocess(make_corpus(file, filters={"language": rule}), workers=1).datasets))
    assert read_manifest(prefix).config["language_models"] == {"lid.176.ftz": sha256}

    own = tmp_path / "own.ftz"
    shutil.copy(shipped, own)
    mine = make_corpus(
        file, filters={"language": {**rule, "model": str(own)}}, output_prefix=str(tmp_path / "own" / "set")
    )
    prefix = next(iter(preprocess(mine, workers=1).datasets))
    config = json.loads(Path(f"{prefix}.manifest.json").read_text())["config"]
    assert config["language_models"] == {"own.ftz": sha256}


@pytest.mark.parametrize(
    ("content", "says"), [(None, "there is no such file"), (b"nonsense", "is not a fastText model")]
)
def test_a_wrong_language_model_is_named(tmp_path: Path, make_corpus: Any, content: bytes | None, says: str) -> None:
    own = tmp_path / "own.ftz"
    if content is not None:
        own.write_bytes(content)
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS[:2])
    with pytest.raises(DataError, match=says) as caught:
        preprocess(make_corpus(file, filters={"language": {"keep": ["en"], "model": str(own)}}), workers=1)
    assert str(own) in caught.value.message and caught.value.hint
