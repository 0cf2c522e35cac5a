"""Megatron-Core and the converter read each other's checkpoints, in one launch for all layouts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from convert_rows import OTHER_PADDING, RANKS, ROWS, SWAPPED
from tiny_models import save_tiny_model

from checkpoint_convert import convert as convert_module
from checkpoint_convert import torch_dist_writer
from checkpoint_convert.convert import Options, convert
from checkpoint_convert.open import open_checkpoint
from megatron_cpt.architecture.tensors import MegatronTensor, RowSpan, row_spans

RIGHT = [row for row in ROWS if row[0] != SWAPPED]


@contextlib.contextmanager
def swapped_gate() -> Iterator[None]:
    def wrong(m: MegatronTensor, *args: Any, **kwargs: Any) -> list[RowSpan]:
        found = row_spans(m, *args, **kwargs)
        return (
            [dataclasses.replace(s, hf_name=n) for s, n in zip(found, m.hf[::-1], strict=True)]
            if m.kind == "gated"
            else found
        )

    with mock.patch.object(torch_dist_writer, "row_spans", wrong), mock.patch.object(convert_module, "_check_readable"):
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, their conversions, and the worker's results and saves."""
    work = tmp_path_factory.mktemp("convert")
    for model in sorted({row[1] for row in ROWS}):
        save_tiny_model(model, work / "models")
    for name, model, tp, pp, vpp in ROWS:
        source = open_checkpoint(work / "models" / model)
        with swapped_gate() if name == SWAPPED else contextlib.nullcontext():
            convert(source, work / name / "torch_dist", Options(to="torch_dist", tp=1 if name == OTHER_PADDING else tp))
        convert(source, work / name / "legacy", Options(to="legacy", tp=tp, pp=pp, vpp=vpp, local_names=True))
    worker = str(Path(__file__).with_name("convert_worker.py"))
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", str(RANKS), worker, str(work)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert (work / "results.json").is_file(), done.stderr[-3000:]
    return work


@pytest.fixture(scope="module")
def results(work: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((work / "results.json").read_text())
    return found


@pytest.mark.parametrize("row", RIGHT, ids=lambda row: row[0])
def test_megatron_loads_what_we_write(results: dict[str, Any], row: tuple[Any, ...]) -> None:
    assert results[row[0]] == {"torch_dist": [], "legacy": []}


@pytest.mark.parametrize("kind", ["saved", "saved_legacy"])
@pytest.mark.parametrize("row", RIGHT, ids=lambda row: row[0])
def test_we_read_what_megatron_writes(
    work: Path, results: dict[str, Any], row: tuple[Any, ...], kind: str, tmp_path: Path
) -> None:
    name, model, *_ = row
    assert "error" not in results[name]
    hf = work / "models" / model
    path = work / name / kind
    if kind == "saved_legacy":
        path /= "iter_0000001"
    convert(open_checkpoint(path, hf_config=hf), tmp_path / "hf", Options(to="hf"))
    want, got = load_file(hf / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert want.keys() == got.keys()
    assert [n for n in want if not want[n].equal(got[n])] == []


def test_a_swapped_gate_is_noticed(results: dict[str, Any]) -> None:
    assert results[SWAPPED]["legacy"] == []
    assert results[SWAPPED]["torch_dist"] != []
    assert all(name.endswith("mlp.linear_fc1.weight") for name in results[SWAPPED]["torch_dist"])
