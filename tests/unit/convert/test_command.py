"""The command line: dry run, receipt as JSON, verify, exit codes; no torch and no Megatron where none is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint_convert import forward
from megatron_cpt.cli import cli, run
from megatron_cpt.commands.convert import convert, parse_size
from megatron_cpt.errors import ConversionError
from tests.unit.convert.tiny_checkpoints import change_tensors, hf_tensors, write_hf


def command(capsys: pytest.CaptureFixture[str], *args: object, through: str = "cli") -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `megatron-cpt convert ...`, or of `python -m checkpoint_convert ...`."""
    words = [str(arg) for arg in args]
    with pytest.raises(SystemExit) as stopped:
        run(cli, ["convert", *words]) if through == "cli" else run(convert, words)
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def test_convert_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_hf(tmp_path / "hf")
    code, out, _ = command(capsys, source, tmp_path / "td", "--to", "torch_dist", "--tp", 2, "--json")
    receipt = json.loads(out)
    assert code == 0 and receipt["target"]["format"] == "torch_dist" and len(receipt["tensors"]) > 30
    code, out, _ = command(capsys, tmp_path / "td", tmp_path / "back", "--to", "hf", through="module")
    assert code == 0 and "left out: 20 TransformerEngine extra state" in out
    code, out, _ = command(capsys, "verify", tmp_path / "td", tmp_path / "back", "--json")
    result = json.loads(out)
    assert code == 0 and result["ok"] and result["logits"]["max_difference"] == 0.0
    code, out, _ = command(capsys, "verify", tmp_path / "td", tmp_path / "back", "--no-logits", through="module")
    assert code == 0 and "the same model" in out
    with pytest.raises(SystemExit) as stopped:
        run(cli, ["compare", str(tmp_path / "td"), str(tmp_path / "back"), "--no-logits"])
    assert not stopped.value.code and capsys.readouterr().out == out


def test_a_source_may_have_the_name_of_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_hf(tmp_path / "run").parent)
    assert command(capsys, "run", "out", "--to", "hf")[0] == 0
    (tmp_path / "run").rename(tmp_path / "verify")
    assert command(capsys, "./verify", "again", "--to", "hf")[0] == 0
    code, _, err = command(capsys, "verify", "again", "--to", "hf")  # this one is the comparison
    assert code == 2 and "--to" in err


def test_a_conversion_whose_summary_cannot_be_printed_is_done(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    line = f"{sys.executable} -m checkpoint_convert {source} {tmp_path / 'out'} --to hf --json"
    done = subprocess.run(["bash", "-c", line + " > /dev/full"], text=True, capture_output=True, check=False)
    assert done.returncode == 0 and "the work is done; its summary could not be printed" in done.stderr
    assert "Traceback" not in done.stderr and (tmp_path / "out" / "conversion.json").is_file()
    done = subprocess.run(
        ["bash", "-c", line + " --overwrite 2>&1 | :; echo ${PIPESTATUS[0]}"],
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.stdout == "0\n"


def test_verify_finds_one_changed_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_hf(tmp_path / "hf")
    command(capsys, source, tmp_path / "copy", "--to", "hf")
    weight = hf_tensors(tmp_path / "copy")["model.layers.2.mlp.up_proj.weight"].clone()
    weight.view(torch.int16)[3, 3] ^= 1
    change_tensors(tmp_path / "copy", model__layers__2__mlp__up_proj__weight=weight)
    code, out, _ = command(capsys, "verify", source, tmp_path / "copy", "--no-logits")
    assert code == 1 and "differs: model.layers.2.mlp.up_proj.weight" in out and "NOT the same model" in out


def test_verify_finds_another_rope_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_hf(tmp_path / "hf")
    command(capsys, source, tmp_path / "copy", "--to", "hf")
    config = json.loads((tmp_path / "copy" / "config.json").read_text()) | {"rope_theta": 500.0}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    code, out, _ = command(capsys, "verify", source, tmp_path / "copy", "--json")
    result = json.loads(out)
    assert code == 1 and result["weights_equal"] and not result["logits"]["ok"]
    assert [fact["fact"] for fact in result["facts_that_differ"]] == ["rope_theta"]


def test_verify_after_a_cast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_hf(tmp_path / "hf", dtype=torch.float32, scale=0.1)
    command(capsys, source, tmp_path / "half", "--to", "legacy", "--tp", 2, "--dtype", "bfloat16")
    code, out, _ = command(capsys, "verify", source, tmp_path / "half", "--tolerance", 0.1, "--json")
    result = json.loads(out)
    assert code == 0 and result["tensors_equal_after_cast"] == result["tensors"]
    assert result["logits"]["max_difference"] > 0
    code, _, _ = command(capsys, "verify", source, tmp_path / "half", "--tolerance", 1e-9)
    assert code == 1


def test_verify_compares_logits_block_by_block_after_a_cast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary's blocks must be the same rows on both sides, though one side's rows are twice as large."""
    monkeypatch.setattr(forward, "BLOCK_BYTES", 1000)
    source = write_hf(tmp_path / "hf")
    command(capsys, source, tmp_path / "wide", "--to", "hf", "--dtype", "float32")
    code, out, _ = command(capsys, "verify", source, tmp_path / "wide", "--json")
    assert code == 0 and json.loads(out)["logits"]["max_difference"] == 0.0


def test_dry_run_writes_nothing_and_needs_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_hf(tmp_path / "hf")
    (source / "model.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    args = (source, tmp_path / "out", "--to", "torch_dist", "--tp", 4, "--dry-run")
    code, out, _ = command(capsys, *args, "--json")
    report = json.loads(out)
    assert code == 0 and sorted(tmp_path.rglob("*")) == before
    assert len(report["mapping"]) == 3 + 4 * 7
    assert report["padding_rows_added"] == 512 - 77
    assert report["target_bytes"] > report["source_bytes"] == 2 * report["parameters"]
    code, out, _ = command(capsys, *args)
    assert code == 0 and "dry run: nothing was written" in out and "512x32" not in out.splitlines()[0]
    code, _, err = command(capsys, source, tmp_path / "out", "--to", "torch_dist")
    assert code == 2 and "hint:" in err


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_hf(tmp_path / "hf")
    change_tensors(source, model__norm__weight=None)
    code, out, err = command(capsys, source, tmp_path / "out", "--to", "hf")
    assert (code, out) == (1, "") and "missing: model.norm.weight" in err and "hint:" in err
    code, _, err = command(capsys, tmp_path / "nowhere", tmp_path / "out", "--to", "hf")
    assert code == 2 and "does not exist" in err
    code, _, err = command(capsys, source, tmp_path / "out", "--to", "gguf")
    assert code == 2 and "gguf" in err
    code, _, err = command(capsys, source, tmp_path / "out", "--to", "hf", "--max-shard-size", "big")
    assert code == 2 and "is not a size" in err


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("2GiB", 2**31), ("1.5 MB", 1_500_000), ("1000", 1000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "GB", "5XB", "-1GB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConversionError):
        parse_size(text)


def test_conversion_needs_no_megatron_and_no_process_group(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    code = f"""
import sys
sys.modules["megatron"] = None
sys.argv = ["x", {str(source)!r}, {str(tmp_path / "td")!r}, "--to", "torch_dist", "--tp", "2"]
import runpy
try:
    runpy.run_module("checkpoint_convert", run_name="__main__")
except SystemExit as stopped:
    assert not stopped.code, stopped.code
import torch.distributed
assert not torch.distributed.is_initialized()
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_help_and_tables_need_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = sys.modules["megatron"] = None
import megatron_cpt.architecture.families, megatron_cpt.architecture.tensors, megatron_cpt.commands.convert
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
