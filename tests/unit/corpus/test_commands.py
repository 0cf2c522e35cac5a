"""The commands as a shell sees them: exit codes, one JSON object on stdout, hints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt.corpus.dataset.manifest import read_manifest
from megatron_cpt.errors import DataError
from tests.unit.corpus.conftest import TEXTS, write_jsonl


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from megatron_cpt.cli import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    first, second = write_jsonl(folder / "a.jsonl", TEXTS[:3]), write_jsonl(folder / "b.jsonl", TEXTS[3:])
    result = run("preprocess", "--input", first, second, "--output-prefix", folder / "set", "--tokenizer",
                 tokenizer_dir, "--workers", 2, "--json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    fields = json.loads(result.stdout)
    assert fields["datasets"][str(folder / "set")]["document_count"] == len(TEXTS)
    assert fields["documents_read"] == len(TEXTS) and not fields["rejects"]
    return folder / "set"


def test_verify_and_inspect(dataset: Path, tokenizer_dir: Path) -> None:
    result = run("verify", dataset, "--tokenizer", tokenizer_dir, "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["ok"] is True
    result = run("inspect", dataset, "--tokenizer", tokenizer_dir, "--json")
    described = json.loads(result.stdout)
    assert described["manifest"]["complete"] and len(described["documents"]) == 3
    assert described["documents"][0]["text_start"].startswith("The patient")
    assert "EOD '<|endoftext|>'" in run("inspect", dataset).stdout


def test_user_errors_exit_2_with_a_hint(dataset: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "bad.yaml").write_text("output_prefx: x\nsources: [{files: a.jsonl, txt: b}]\n")
    cases = {
        ("verify", tmp_path / "none"): "no such dataset",
        ("preprocess", tmp_path / "none.yaml"): "No such file",
        ("preprocess", tmp_path / "bad.yaml"): "did you mean 'output_prefix'?",
        ("preprocess",): "give one CORPUS.yaml",
        ("preprocess", "--input", "none.jsonl", "--output-prefix", tmp_path / "x", "--tokenizer", tokenizer_dir):
            "matches no file",
        ("preprocess", "--input", "none.jsonl", "--output-prefix", tmp_path / "x"): "--tokenizer is required",
    }  # fmt: skip
    for args, message in cases.items():
        result = run(*args)
        assert result.returncode == 2, (args, result.stderr)
        assert message in result.stderr and not result.stdout and "Traceback" not in result.stderr
    result = run("preprocess", tmp_path / "bad.yaml")
    for problem in (
        "output_prefx = 'x': is not a key of the corpus",
        "did you mean 'sources.0.text'?",
        "tokenizer: is missing",
    ):
        assert problem in result.stderr


def test_verify_of_a_damaged_dataset_exits_2(dataset: Path) -> None:
    path = Path(f"{dataset}.idx")
    original = path.read_bytes()
    try:
        path.write_bytes(original[:-1] + b"\x01")
        result = run("verify", dataset, "--json")
        assert result.returncode == 2 and json.loads(result.stdout)["ok"] is False
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("value", ["7", "0", "nan", "0.3"])
def test_a_similarity_that_is_none_exits_2(dataset: Path, tmp_path: Path, value: str) -> None:
    result = run("dedup", dataset, "--near", "--similarity", value, "--output-prefix", tmp_path / "x")
    assert result.returncode == 2 and "Traceback" not in result.stderr and "--similarity" in result.stderr


HAND_EDITED = [
    ("token_count", "many"), ("token_count", None), ("tokenizer", "qwen"), ("tokenizer", {"name": "qwen"}),
    ("sources", {}), ("sources", [1]), ("config", []), ("rejects", {"empty": "two"}), ("dtype", "int7"),
    ("document_count", 10**30), ("sequence_count", 1), ("config", {"text_rules": {"suffix_ids": {"x": 1}}}),
    ("config", {"text_rules": {"prefix_ids": 7}}), ("config", {"documents_read": "many"}), ("config", {"notes": [1]}),
    ("dtype", "int32"), ("append_eod", "yes"), ("bin_bytes", -1), ("format_version", "x"), (None, None), (None, [1]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), HAND_EDITED)
def test_a_hand_edited_manifest_is_one_clear_error(dataset: Path, key: str | None, value: object) -> None:
    path = Path(f"{dataset}.manifest.json")
    original = path.read_bytes()
    assert read_manifest(dataset).complete
    try:
        path.write_text(json.dumps(value if key is None else json.loads(original) | {key: value}))
        with pytest.raises(DataError) as caught:
            read_manifest(dataset)
        assert path.name in caught.value.message and caught.value.hint
        path.write_text("[" * 100_000)
        with pytest.raises(DataError, match="is not a manifest"):
            read_manifest(dataset)
    finally:
        path.write_bytes(original)


def test_stages_are_named_in_order_from_the_start_and_every_file_at_the_end(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    files = str(write_jsonl(tmp_path / "a.jsonl", [*TEXTS, *TEXTS, ""]))
    corpus = {
        "output_prefix": str(tmp_path / "out" / "set"),
        "tokenizer": str(tokenizer_dir),
        "sources": [{"files": files, "metadata": ["text"]}],
        "split": {"train": 0.5, "valid": 0.5},
        "dedup": {"passages": True, "exact": True},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(corpus))
    result = run("preprocess", tmp_path / "c.yaml")
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    starts = ["finding the files", "clean 1/4", "tokenise 2/4", "find duplicates 3/4: 6 documents", "write 4/4"]
    assert [line.removeprefix("INFO ")[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
    listed = [line.split()[0] for line in result.stdout.partition("files:\n")[2].splitlines()]
    assert sorted(listed) == sorted(str(path) for path in (tmp_path / "out").iterdir())
    assert len(listed) == 2 * 4 + 3
    again = run("preprocess", tmp_path / "c.yaml")
    assert again.stdout == "already done, nothing to do\n" + result.stdout
