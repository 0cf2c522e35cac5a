"""Checkpoints as other tools write them: per-layer keys, prefixes, optimizer state, odd chunks, odd pickles."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from checkpoint_convert.checkpoint import MismatchError
from checkpoint_convert.convert import Options, convert
from checkpoint_convert.dcp_index import TensorStorageMetadata, index_bytes, read_index
from checkpoint_convert.open import open_checkpoint
from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.architecture.tensors import LAYER_PREFIX, LOCAL_TO_TE, megatron_tensors, row_spans, slice_shape
from megatron_cpt.errors import ConversionError
from tests.unit.convert.tiny_checkpoints import assert_same_weights, hf_tensors, mark_complete, write_hf


def global_tensors(hf: Path) -> dict[str, torch.Tensor]:
    """Global Megatron tensors by per-layer names, built here apart from the writers under test."""
    arch, tensors = read_architecture(hf), hf_tensors(hf)
    out = {}
    for m in megatron_tensors(arch):
        out[m.megatron] = torch.zeros(slice_shape(m, arch), dtype=torch.bfloat16)
        for s in row_spans(m, arch):
            out[m.megatron][s.row : s.row + s.rows] = tensors[s.hf_name][s.hf_row : s.hf_row + s.rows]
    return out


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {name: t for name, t in tensors.items() if not name.startswith(LAYER_PREFIX)}
    names = {name.split(".", 3)[3] for name in tensors if name.startswith(LAYER_PREFIX)}
    for name in names:
        out[LAYER_PREFIX + name] = torch.stack([tensors[f"{LAYER_PREFIX}{i}.{name}"] for i in range(4)])
    return out


def to_hf(source: Path, **kwargs: Any) -> Path:
    out = source.parent / "back"
    convert(open_checkpoint(source, **kwargs), out, Options(to="hf", workers=2))
    return out


@pytest.mark.parametrize("layout", ["stacked", "per layer"])
@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_torch_dist_written_by_stock_pytorch(tmp_path: Path, layout: str, prefix: str) -> None:
    hf = write_hf(tmp_path / "hf")
    tensors = global_tensors(hf)
    tensors = stacked(tensors) if layout == "stacked" else tensors
    state: dict[str, Any] = {prefix + name: t for name, t in tensors.items()}
    state |= {f"optimizer.state.exp_avg.{name}": t.float() for name, t in tensors.items()}
    state |= {"rng_state/shard_0_1": {"seed": 1}, f"{prefix}decoder.layers.mlp.linear_fc1._extra_state/shard_0_4": b""}
    dcp.save(state, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    opened = open_checkpoint(tmp_path / "ckpt", hf_config=hf)
    assert opened.weights.ignored["optimizer state"] == len(tensors)
    assert opened.weights.ignored["TransformerEngine extra state"] == 1
    assert_same_weights(hf, to_hf(tmp_path / "ckpt", hf_config=hf))


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    tensors = stacked(global_tensors(hf)) | {"decoder.layers.mlp.router.weight": torch.ones(4, 2, 2)}
    dcp.save(tensors, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    with pytest.raises(MismatchError, match=r"not mapped: decoder.layers.mlp.router.weight"):
        open_checkpoint(tmp_path / "ckpt", hf_config=hf)


@pytest.mark.parametrize("damage", ["hole", "overlap"])
def test_holes_and_overlaps_are_found(tmp_path: Path, damage: str) -> None:
    """PyTorch and Megatron-Core load such a checkpoint without a word."""
    hf = write_hf(tmp_path / "hf")
    convert(open_checkpoint(hf), tmp_path / "ckpt", Options(to="torch_dist", tp=2))
    metadata = read_index(tmp_path / "ckpt")
    entry = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    assert isinstance(entry, TensorStorageMetadata)
    chunks = entry.chunks
    chunks.pop(3) if damage == "hole" else chunks.append(chunks[3])
    (tmp_path / "ckpt" / ".metadata").write_bytes(index_bytes(metadata))
    with pytest.raises(MismatchError, match="elements" if damage == "hole" else "overlap"):
        open_checkpoint(tmp_path / "ckpt")


PICKLED_CALLS = {
    "directly": (b"cposix\nsystem\n", "posix.system"),
    # `os` as an attribute of a module on the list: protocol 4 looks names up along dots
    "through an allowed module": (
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93",
        "torch.distributed.checkpoint.metadata.os.system",
    ),
}


@pytest.mark.parametrize("how", PICKLED_CALLS)
def test_an_index_that_runs_code_is_refused(tmp_path: Path, how: str) -> None:
    lookup, name = PICKLED_CALLS[how]
    command = f"touch {tmp_path / 'pwned'}".encode()
    payload = lookup + b"(X" + len(command).to_bytes(4, "little") + command + b"tR."
    hf = write_hf(tmp_path / "hf")
    convert(open_checkpoint(hf), tmp_path / "ckpt", Options(to="torch_dist"))
    (tmp_path / "ckpt" / ".metadata").write_bytes(payload)
    with pytest.raises(ConversionError, match=f"outside the allow-list: {re.escape(name)}"):
        open_checkpoint(tmp_path / "ckpt")
    assert not (tmp_path / "pwned").exists()
    pickle.loads(payload)  # the payload does work where nobody looks
    assert (tmp_path / "pwned").exists()


def write_legacy(hf: Path, folder: Path, extra: dict[str, Any] | None = None, *, local: bool = False) -> Path:
    """A legacy checkpoint of one rank, as Megatron-LM's torch.save would write it."""
    te_to_local = {te: name for name, te in LOCAL_TO_TE.items()}
    model: dict[str, Any] = {}
    for name, tensor in global_tensors(hf).items():
        rest = name.split(".", 3)[-1]
        if local and rest in te_to_local:
            name = name.removesuffix(rest) + te_to_local[rest]
        model[name] = tensor
        if name.endswith("linear_fc1.weight"):
            model[name.removesuffix("weight") + "_extra_state"] = None
    rng = [{"random_rng_state": (3, (1, 2), None), "np_rng_state": np.random.RandomState(0).get_state()}]
    rng[0]["torch_rng_state"] = torch.get_rng_state()
    state = {"args": argparse.Namespace(num_layers=4), "checkpoint_version": 3.0, "iteration": 7, "model": model}
    state |= {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "rng_state": rng, **(extra or {})}
    path = folder / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    (folder / "latest_checkpointed_iteration.txt").write_text("7\n")
    return folder


@pytest.mark.parametrize("local", [False, True])
def test_legacy_written_by_torch_save(tmp_path: Path, local: bool) -> None:
    hf = write_hf(tmp_path / "hf", "qwen3")
    ckpt = write_legacy(hf, tmp_path / "ckpt", local=local)
    opened = open_checkpoint(ckpt, hf_config=hf)
    assert opened.iteration == 7
    assert opened.weights.ignored == {
        "optimizer of a rank": 1,
        "rng_state of a rank": 1,
        "TransformerEngine extra state": 4,
    }
    assert_same_weights(hf, to_hf(ckpt, hf_config=hf))


class Surprise:
    """Stands for a class that nobody allowed."""


def test_a_pickle_off_the_allow_list_needs_trust(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    ckpt = write_legacy(hf, tmp_path / "ckpt", {"surprise": Surprise()})
    with pytest.raises(ConversionError, match="Surprise") as caught:
        open_checkpoint(ckpt, hf_config=hf)
    assert "--trust-pickle" in str(caught.value.hint)
    assert_same_weights(hf, to_hf(ckpt, hf_config=hf, trust_pickle=True))


def test_parameters_that_share_one_buffer(tmp_path: Path) -> None:
    """Megatron's DDP keeps parameters as views into a flat buffer; torch.save writes the buffer once."""
    hf = write_hf(tmp_path / "hf")
    ckpt = write_legacy(hf, tmp_path / "ckpt")
    path = ckpt / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    tensors = {name: t for name, t in state["model"].items() if t is not None}
    flat = torch.cat([t.flatten() for t in tensors.values()])
    offset = 0
    for name, tensor in tensors.items():
        state["model"][name] = flat[offset : offset + tensor.numel()].view(tensor.shape)
        offset += tensor.numel()
    torch.save(state, path)
    assert_same_weights(hf, to_hf(ckpt, hf_config=hf))


def test_a_series_of_megatron_lm_has_no_markers_and_goes_by_its_tracker(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    for iteration in (5, 7):
        convert(open_checkpoint(hf), tmp_path / "series" / f"iter_{iteration:07d}", Options(to="torch_dist"))
    with pytest.raises(ConversionError, match="latest_checkpointed_iteration") as caught:
        open_checkpoint(tmp_path / "series")
    assert "name the iteration" in str(caught.value.hint)
    (tmp_path / "series" / "latest_checkpointed_iteration.txt").write_text("5\n")
    assert open_checkpoint(tmp_path / "series").iteration == 5


def test_run_folder_latest_best_and_incomplete(tmp_path: Path) -> None:
    """RUN/checkpoints/iter_XXXXXXX with RUN/hf and RUN/resolved.yaml, as the trainer writes them."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    resolved = {
        "job_name": "demo",
        "model": {"init_from": "base/model"},
        "budget": {"train_tokens": 1_638_400},
        "data": {"train": [{"name": "medical", "weight": 3.0}, {"name": "general", "weight": 1.0}]},
    }
    (run / "resolved.yaml").write_text(json.dumps(resolved))
    sources = {}
    for iteration, theta in ((50, 1e4), (100, 2e4)):
        sources[iteration] = write_hf(tmp_path / f"hf{iteration}", rope_theta=theta, vocab_size=76 + iteration)
        final = run / "checkpoints" / f"iter_{iteration:07d}"
        convert(open_checkpoint(sources[iteration]), final, Options(to="torch_dist"))
    series = run / "checkpoints"
    tracker = series / "latest_checkpointed_iteration.txt"
    tracker.write_text("100")
    with pytest.raises(ConversionError, match="no finished checkpoint yet"):
        open_checkpoint(run)
    with pytest.raises(ConversionError, match="was not saved to its end"):
        open_checkpoint(series / "iter_0000100")
    mark_complete(series, 50)
    for folder in (run, series):  # the newest that is complete, whatever the tracker says, or none is there
        assert open_checkpoint(folder).iteration == 50
    tracker.unlink()
    assert open_checkpoint(run).iteration == open_checkpoint(series).iteration == 50
    mark_complete(series, 100)
    tracker.write_text("50")  # killed between the marker and the tracker
    assert open_checkpoint(run).iteration == open_checkpoint(series).iteration == 100
    with pytest.raises(ConversionError, match=r"no .*best\.json") as caught:
        open_checkpoint(run, best=True)
    assert "has not evaluated yet" in str(caught.value.hint)
    for record, words in (("{", "names no iteration"), ('{"iteration": 70, "name": "v", "value": 1}', "iter_0000070")):
        (series / "best.json").write_text(record)
        with pytest.raises(ConversionError, match=words):
            open_checkpoint(run, best=True)
    (series / "best.json").write_text('{"iteration": 50, "name": "v", "value": 1}')
    best = open_checkpoint(run, best=True)
    assert best.iteration == 50
    convert(best, run / "export" / "hf", Options(to="hf"))
    assert_same_weights(sources[50], run / "export" / "hf")
    card = (run / "export" / "hf" / "README.md").read_text()
    for words in ("base/model", "| medical | 75.0% |", "1,638,400", "iteration 50"):
        assert words in card
