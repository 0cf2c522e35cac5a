"""The run as a whole: same bytes for any number of workers, resume, splits, rejects, refusals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cpt.corpus.dataset.indexed import open_indexed
from megatron_cpt.corpus.dataset.manifest import bin_path, idx_path, manifest_path, read_manifest
from megatron_cpt.corpus.dataset.verify import verify_dataset
from megatron_cpt.corpus.readers import plan as sources
from megatron_cpt.corpus.run.preprocess import dataset_prefixes, preprocess
from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.errors import CptError, DataError
from tests.unit.corpus.conftest import TEXTS, write_jsonl


def many_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(TEXTS, k=rng.randrange(1, 6))) + f" #{i}" for i in range(count)]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut even a small input into many units."""
    monkeypatch.setattr(sources, "MIN_UNIT_BYTES", 4_000)


def dataset_bytes(prefix: str) -> tuple[bytes, bytes, bytes]:
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes(), manifest_path(prefix).read_bytes()


def test_ids_are_the_tokenizers_with_eod(tmp_path: Path, make_corpus: Any, tokenizer_dir: Path) -> None:
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    preprocess(corpus, workers=1)
    reader, tokenizer = open_indexed(corpus.output_prefix), load_tokenizer(tokenizer_dir)
    assert reader.document_count == len(TEXTS)
    for document, text in zip(reader, TEXTS, strict=True):
        ids, _ = tokenizer.encode_batch([text])
        assert document.tolist() == [*ids.tolist(), tokenizer.eod_id]
    assert verify_dataset(corpus.output_prefix, str(tokenizer_dir)).ok


@pytest.mark.usefixtures("small_units")
def test_same_bytes_for_any_number_of_workers(tmp_path: Path, make_corpus: Any) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", many_texts(400))
    corpus = make_corpus(file, split={"train": 0.7, "valid": 0.3})
    assert len(sources.plan_units(corpus)) > 8
    seen = []
    for workers in (1, 2, 5):
        preprocess(corpus, workers=workers, overwrite=True)
        seen.append([dataset_bytes(prefix) for prefix in dataset_prefixes(corpus).values()])
    assert seen[0] == seen[1] == seen[2]
    assert open_indexed(dataset_prefixes(corpus)["train"]).document_count > 200


@pytest.mark.usefixtures("small_units")
def test_input_order_is_kept(tmp_path: Path, make_corpus: Any, tokenizer_dir: Path) -> None:
    texts = many_texts(300)
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", texts))
    preprocess(corpus, workers=3)
    tokenizer = load_tokenizer(tokenizer_dir)
    decoded = [tokenizer.decode(ids[:-1].tolist()) for ids in open_indexed(corpus.output_prefix)]
    assert [d.rsplit("#", 1)[1] for d in decoded] == [str(i) for i in range(300)]


def test_split_is_by_content_and_stable_when_data_is_added(tmp_path: Path, make_corpus: Any) -> None:
    texts = many_texts(300)
    fractions = {"train": 0.8, "valid": 0.2}

    def valid_documents(name: str, rows: list[str]) -> list[bytes]:
        corpus = make_corpus(write_jsonl(tmp_path / name, rows), split=fractions)
        preprocess(corpus, workers=1, overwrite=True)
        return [ids.tobytes() for ids in open_indexed(dataset_prefixes(corpus)["valid"])]

    before = valid_documents("a.jsonl", texts)
    after = valid_documents("b.jsonl", ["a new document in front", *reversed(texts), *many_texts(50, seed=9)])
    assert 30 < len(before) < 90
    assert set(before) <= set(after)


def test_finished_run_is_not_repeated_and_another_input_is_refused(tmp_path: Path, make_corpus: Any) -> None:
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    assert not preprocess(corpus, workers=1).already_done
    again = preprocess(corpus, workers=1)
    assert again.already_done and again.datasets[corpus.output_prefix].document_count == len(TEXTS)
    write_jsonl(tmp_path / "a.jsonl", [*TEXTS, "more"])
    with pytest.raises(DataError, match="another input"):
        preprocess(corpus, workers=1)
    preprocess(corpus, workers=1, overwrite=True)
    assert read_manifest(corpus.output_prefix).document_count == len(TEXTS) + 1


RUN_AND_DIE = """
import os, signal, sys
from megatron_cpt.corpus.run import preprocess as run
from megatron_cpt.corpus.readers import plan as sources
from megatron_cpt.corpus.dataset import writer as dataset_writer
from megatron_cpt.corpus.schema import load_corpus
sources.MIN_UNIT_BYTES = 4000
moment, count = sys.argv[2], int(sys.argv[3])
def die_at(module, name):
    original = getattr(module, name)
    calls = []
    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(module, name, wrapped)
import megatron_cpt.corpus.run.unit as pipeline
die_at({"commit": pipeline, "split": pipeline, "index": dataset_writer, "manifest": dataset_writer,
        "sync": dataset_writer}[moment],
       {"commit": "commit_unit", "split": "split_of", "index": "write_index", "manifest": "write_manifest",
        "sync": "sync"}[moment])
run.preprocess(load_corpus(sys.argv[1]), workers=1)
"""


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize(
    ("moment", "count"), [("split", 3), ("commit", 1), ("commit", 7), ("index", 2), ("sync", 1), ("manifest", 2)]
)
def test_killed_at_any_moment_the_same_command_finishes_with_the_same_files(
    tmp_path: Path, make_corpus: Any, moment: str, count: int
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", many_texts(200))
    corpus = make_corpus(file, split={"train": 0.7, "valid": 0.3})
    preprocess(corpus, workers=1)
    prefixes = list(dataset_prefixes(corpus).values())
    expected = [dataset_bytes(prefix) for prefix in prefixes]
    for prefix in prefixes:
        for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)):
            path.unlink()
    description = tmp_path / "corpus.yaml"
    description.write_text(json.dumps(corpus.model_dump(mode="json")))
    run = subprocess.run(
        [sys.executable, "-c", RUN_AND_DIE, str(description), moment, str(count)], cwd=Path.cwd(), capture_output=True
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    assert not all(manifest_path(prefix).exists() for prefix in prefixes)
    if not manifest_path(prefixes[0]).exists():
        with pytest.raises(DataError):
            read_manifest(prefixes[0])
    preprocess(corpus, workers=2)
    assert [dataset_bytes(prefix) for prefix in prefixes] == expected
    assert not Path(f"{corpus.output_prefix}.partial").exists()


def test_second_writer_is_refused(tmp_path: Path, make_corpus: Any) -> None:
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    folder = Path(f"{corpus.output_prefix}.partial")
    folder.mkdir(parents=True)
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(folder / "lock")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match="another process is writing"):
            preprocess(corpus, workers=1)
    finally:
        holder.kill()
        holder.wait()
    preprocess(corpus, workers=1)


@pytest.mark.usefixtures("small_units")
def test_killed_worker_is_named_and_the_run_continues(
    tmp_path: Path, make_corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", many_texts(200)))
    parent = os.getpid()

    def die(texts: list[str], fractions: dict[str, float]) -> list[int]:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return [0] * len(texts)

    import megatron_cpt.corpus.run.unit as pipeline

    broken = corpus.model_copy(update={"split": {"train": 0.5, "valid": 0.5}})
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "split_of", die)
        with pytest.raises(CptError, match="SIGKILL"):
            preprocess(broken, workers=2)
    preprocess(broken, workers=2)


def test_disk_full_is_one_clear_error(tmp_path: Path, make_corpus: Any) -> None:
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", many_texts(2000)))
    description = tmp_path / "corpus.yaml"
    description.write_text(json.dumps(corpus.model_dump(mode="json")))
    # RLIMIT_FSIZE gives EFBIG where a full disk gives ENOSPC: the same place fails, so map one to the other
    code = (
        "import sys, errno, builtins\n"
        "from megatron_cpt.corpus.run import parts, preprocess\n"
        "from megatron_cpt.corpus.schema import load_corpus\n"
        "def full(self, *a): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "parts.PartWriter.write = full\n"
        "from megatron_cpt.errors import CptError\n"
        "try: preprocess.preprocess(load_corpus(sys.argv[1]), workers=2)\n"
        "except CptError as e: print(e)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(description)], capture_output=True, text=True)
    assert "disk of" in run.stdout and "full" in run.stdout, run.stderr
    assert not bin_path(corpus.output_prefix).exists()


def test_bad_lines_below_the_threshold_are_listed_with_their_place(tmp_path: Path, make_corpus: Any) -> None:
    file = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": text}).encode() for text in many_texts(50)]
    rows[9] = b'{"text": "cut'
    rows[19] = b'{"text": "\xff\xfe"}'
    rows[29] = b'{"text": "\\ud800"}'
    rows[39] = b'{"text": NaN}'
    file.write_bytes(b"\n".join(rows) + b"\n")
    with pytest.raises(DataError, match=r"4 of 50 documents cannot be read.*\n.*a\.jsonl:10: invalid_json"):
        preprocess(make_corpus(file), workers=1)
    corpus = make_corpus(file, max_reject_ratio=0.1)
    assert not bin_path(corpus.output_prefix).exists()
    outcome = preprocess(corpus, workers=1)
    assert outcome.rejects == {"invalid_json": 2, "invalid_utf8": 1, "lone_surrogate": 1}
    assert outcome.rejects_file is not None
    listed = [json.loads(line) for line in Path(outcome.rejects_file).read_text().splitlines()]
    assert [(r["line"], r["reason"]) for r in listed] == [
        (10, "invalid_json"), (20, "invalid_utf8"), (30, "lone_surrogate"), (40, "invalid_json"),
    ]  # fmt: skip
    assert outcome.documents_read == 50 == read_manifest(corpus.output_prefix).document_count + 4


@pytest.mark.usefixtures("small_units")
def test_places_of_rejects_are_absolute_over_units(tmp_path: Path, make_corpus: Any) -> None:
    rows = [json.dumps({"text": text}) for text in many_texts(300)]
    rows[250] = "{"
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(rows))
    outcome = preprocess(make_corpus(file, max_reject_ratio=0.5), workers=2)
    assert outcome.rejects_file is not None
    assert json.loads(Path(outcome.rejects_file).read_text())["line"] == 251


def test_wrong_key_names_the_keys_there_are(tmp_path: Path, make_corpus: Any) -> None:
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS, key="content"))
    with pytest.raises(DataError, match="keys: content") as caught:
        preprocess(corpus, workers=1)
    assert "--json-key" in str(caught.value.hint)


def test_parquet_and_text_folder_give_the_same_dataset_as_jsonl(tmp_path: Path, make_corpus: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    jsonl = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    pq.write_table(
        pa.table({"text": TEXTS, "other": list(range(len(TEXTS)))}), tmp_path / "a.parquet", row_group_size=2
    )
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_bytes(text.encode())
    results = []
    for path in (jsonl, tmp_path / "a.parquet", folder):
        corpus = make_corpus(path)
        preprocess(corpus, workers=1, overwrite=True)
        results.append(dataset_bytes(corpus.output_prefix)[:2])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "corpus is empty"), (b"\n\n", "no token"), (b'{"text": ""}\n', "no token")],
)
def test_empty_corpus(tmp_path: Path, make_corpus: Any, content: bytes, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        preprocess(make_corpus(file), workers=1)


def test_missing_file_and_damaged_parquet(tmp_path: Path, make_corpus: Any) -> None:
    with pytest.raises(DataError, match="matches no file"):
        preprocess(make_corpus(tmp_path / "none.jsonl"), workers=1)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut in the middle")
    with pytest.raises(DataError, match="not readable parquet"):
        preprocess(make_corpus(tmp_path / "a.parquet"), workers=1)


def test_split_without_a_document_is_refused(tmp_path: Path, make_corpus: Any) -> None:
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS[:1]), split={"train": 0.999, "valid": 0.001})
    with pytest.raises(DataError, match="split 'valid' has no token"):
        preprocess(corpus, workers=1)


def test_verify_finds_a_flipped_byte(tmp_path: Path, make_corpus: Any) -> None:
    corpus = make_corpus(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    preprocess(corpus, workers=1)
    assert verify_dataset(corpus.output_prefix).ok
    path = bin_path(corpus.output_prefix)
    data = np.fromfile(path, np.uint16)
    data[3] = 65_000
    data.tofile(path)
    problems = " ".join(verify_dataset(corpus.output_prefix).problems)
    assert "outside the vocabulary" in problems and "sha256" in problems
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="bytes, its manifest says"):
        verify_dataset(corpus.output_prefix)


def test_parent_killed_leaves_no_worker_behind(tmp_path: Path, make_corpus: Any) -> None:
    """Workers end when the parent is gone: their pipe is at its end."""
    code = (
        "import os, sys, time\n"
        "from megatron_cpt.corpus.workers import run_units\n"
        "def f(i):\n"
        "    os.write(1, b'%d\\n' % os.getpid()); time.sleep(0.3); return i\n"
        "list(run_units(f, list(range(1000)), 2))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = {int(parent.stdout.readline()) for _ in range(4)}
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


SBATCH = Path(__file__).parents[4] / "slurm" / "preprocess.sbatch"


def test_slurm_array_gives_the_same_files(tmp_path: Path, make_corpus: Any) -> None:
    """The real batch script as an array of three tasks at once and a joining job, Slurm played by its variables."""
    file = write_jsonl(tmp_path / "a.jsonl", many_texts(12_000))
    corpus = make_corpus(file, split={"train": 0.7, "valid": 0.3}, dedup={"near": False})
    assert len(sources.plan_units(corpus)) >= 3
    preprocess(corpus, workers=1)
    prefixes = list(dataset_prefixes(corpus).values())
    expected = [dataset_bytes(prefix)[:2] for prefix in prefixes]
    other = corpus.model_copy(update={"output_prefix": str(tmp_path / "array" / "set")})
    description = tmp_path / "corpus.yaml"
    description.write_text(json.dumps(other.model_dump(mode="json")))
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    command = bin_folder / "megatron-cpt"
    command.write_text(f"#!{sys.executable}\nfrom megatron_cpt.cli import main\nmain()\n")
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{bin_folder}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "1", "SLURM_SUBMIT_DIR": str(tmp_path),
        "PYTHONPATH": str(SBATCH.parents[1]),
    }  # fmt: skip
    tasks = [
        subprocess.Popen(
            ["bash", str(SBATCH), str(description)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment | {"SLURM_ARRAY_TASK_ID": str(4 + i), "SLURM_ARRAY_TASK_MIN": "4",
                               "SLURM_ARRAY_TASK_COUNT": "3"},
        )
        for i in range(3)
    ]  # fmt: skip
    for task in tasks:
        _, errors = task.communicate()
        assert task.returncode == 0, errors.decode()
    staging = Path(f"{other.output_prefix}.partial")
    assert len(list(staging.glob("??????.json"))) == len(sources.plan_units(corpus))
    joined = subprocess.run(["bash", str(SBATCH), str(description)], capture_output=True, env=environment)
    assert joined.returncode == 0 and b"continuing: " in joined.stderr, joined.stderr.decode()
    assert [dataset_bytes(prefix)[:2] for prefix in dataset_prefixes(other).values()] == expected
