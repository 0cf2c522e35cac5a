"""`megatron-cpt eval perplexity` as a user calls it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron_cpt.cli import cli
from megatron_cpt.errors import UserError
from tests.unit.eval.conftest import TEXTS

KEYS = {"model", "data", "loss", "perplexity", "tokens", "documents", "seq_length", "document_attention"}
KEYS |= {"bits_per_byte", "text_bytes", "stride", "per_document"}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(" ".join(TEXTS))
    return path


def _eval(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["eval", "perplexity", *map(str, arguments)], catch_exceptions=True)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_json_is_one_object_with_exact_numbers(model_dir: Path, text_file: Path) -> None:
    row = json.loads(_eval(model_dir, "--data", text_file, "--json"))
    assert set(row) == KEYS
    assert row["seq_length"] == 64  # the model's own limit, below the default of 1024
    assert row["tokens"] == len(text_file.read_text())  # bytes, plus the end, less the first
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert row["text_bytes"] == len(text_file.read_text()) - 1  # the first is not predicted
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * row["tokens"] / row["text_bytes"] / math.log(2))


def test_several_data_are_measured_in_one_go(model_dir: Path, text_file: Path) -> None:
    both = json.loads(_eval(model_dir, "--data", text_file, "--data", text_file, "--max-tokens", 20, "--json"))
    assert [set(row) for row in both["results"]] == [KEYS, KEYS]
    assert both["results"][0] == both["results"][1]


def test_text_output_names_the_data(model_dir: Path, text_file: Path) -> None:
    assert str(text_file) in _eval(model_dir, "--data", text_file, "--seq-length", 16)


def test_megatron_core_agrees_with_transformers(model_dir: Path, tmp_path: Path) -> None:
    """In processes of their own: a process group and the engine's global state belong to one evaluation."""

    def command(*arguments: object) -> str:
        words = [sys.executable, "-m", "megatron_cpt", *map(str, arguments)]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    command("convert", model_dir, tmp_path / "megatron", "--to", "torch_dist")
    common = ("--data", texts, "--json", "--document-attention")
    row = json.loads(command("eval", "perplexity", tmp_path / "megatron", *common))
    here = json.loads(_eval(model_dir, *common))
    assert row["loss"] == pytest.approx(here["loss"], abs=1e-6)
    for other in (("--seq-length", 32), ("--no-document-attention",)):  # negative controls
        assert abs(json.loads(_eval(model_dir, *common, *other))["loss"] - here["loss"]) > 1e-3
    assert {key: row[key] for key in ("tokens", "documents")} == {key: here[key] for key in ("tokens", "documents")}


def test_mistakes_are_user_errors(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    for arguments, message in [
        ((tmp_path / "nowhere", "--data", text_file), "does not exist"),
        ((model_dir, "--data", tmp_path / "nowhere"), "neither a dataset nor a text"),
        ((model_dir, "--data", text_file, "--seq-length", 65), "--seq-length 65"),
    ]:
        with pytest.raises(UserError, match=message):
            _eval(*arguments)


def test_weights_that_do_not_fit_are_refused(model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="missing"):
        _eval(broken, "--data", text_file)


def test_overlapping_windows_are_asked_for_by_name(model_dir: Path, text_file: Path) -> None:
    strided = json.loads(_eval(model_dir, "--data", text_file, "--window", 32, "--stride", 8, "--json"))
    plain = json.loads(_eval(model_dir, "--data", text_file, "--seq-length", 32, "--json"))
    assert (strided["seq_length"], strided["stride"], strided["tokens"]) == (32, 8, plain["tokens"])
    assert strided["loss"] != plain["loss"]
    assert "windows of 32 with a stride of 8" in _eval(model_dir, "--data", text_file, "--window", 32, "--stride", 8)
    same = json.loads(_eval(model_dir, "--data", text_file, "--window", 32, "--stride", 32, "--json"))
    assert same["loss"] == plain["loss"]
