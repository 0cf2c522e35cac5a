"""Archives and indices made without torch against torch's own, both ways; and stored checksums."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from checkpoint_convert.archive import hollow_tensor, locate_tensor, saved_object
from checkpoint_convert.convert import Options, convert
from checkpoint_convert.dcp_index import index_bytes, read_index
from checkpoint_convert.open import open_checkpoint
from megatron_cpt.errors import ConversionError
from tests.unit.convert.test_foreign import global_tensors, stacked, write_legacy
from tests.unit.convert.tiny_checkpoints import assert_same_weights, write_hf

SHAPES = [(1,), (300,), (70_000,), (3, 5), (1, 4, 2), (256, 255)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_reads_our_archives(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    before, count, after = hollow_tensor(shape, dtype)
    tensor = torch.randn(shape).to(getattr(torch, dtype))
    assert count == tensor.nbytes and len(before) % 64 == 0
    path = tmp_path / "one.pt"
    path.write_bytes(before + tensor.view(torch.uint8).numpy().tobytes() + after)
    for mmap in (False, True):
        assert torch.equal(torch.load(path, weights_only=True, mmap=mmap), tensor)


def test_torch_reads_an_archive_above_4_gib(tmp_path: Path) -> None:
    """Sparse: sizes and offsets of 64 bits."""
    before, count, after = hollow_tensor((2**31 + 5,), "bfloat16")
    path = tmp_path / "large.pt"
    with path.open("wb") as file:
        file.write(before)
        file.seek(count - 2, os.SEEK_CUR)
        file.write(torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes() + after)
        assert count > 2**32
    with path.open("rb") as file:
        found = locate_tensor(file.fileno(), 0, path.stat().st_size, "here")
    assert (found.shape, found.dtype, found.offset) == ((2**31 + 5,), "bfloat16", len(before))
    assert torch.load(path, weights_only=True, mmap=True)[-1] == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_we_read_torchs_archives(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensor = torch.nn.Parameter(torch.randn(shape)) if shape == (3, 5) else torch.randn(shape)
    path = tmp_path / "one.distcp"
    with path.open("wb") as file:
        file.write(b"before")
        start = file.tell()
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        file.write(buffer.getvalue())
    with path.open("rb") as file:
        found = locate_tensor(file.fileno(), start, len(buffer.getvalue()), "here")
    assert (found.shape, found.dtype) == (shape, "float32")
    data = path.read_bytes()[found.offset : found.offset + tensor.nbytes]
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape), tensor)


def test_objects_are_what_torch_loads() -> None:
    value = {"iteration": 3, "checkpoint_version": 3.0, "list": [None, "é"]}
    assert torch.load(io.BytesIO(saved_object(value)), weights_only=True) == value


def test_the_index_is_pytorchs(tmp_path: Path) -> None:
    """What PyTorch wrote, read and written here, is equal for PyTorch."""
    state = {"a": torch.randn(4, 3).bfloat16(), "b": torch.zeros(5), "c": "bytes"}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    theirs = pickle.loads((tmp_path / ".metadata").read_bytes())
    ours = pickle.loads(index_bytes(dataclasses.replace(read_index(tmp_path), storage_meta=None)))
    assert isinstance(ours, Metadata) and type(ours.state_dict_metadata["a"].size) is torch.Size
    for field in ("state_dict_metadata", "storage_data", "planner_data"):
        assert getattr(ours, field) == getattr(theirs, field)
    convert(open_checkpoint(write_hf(tmp_path / "hf")), tmp_path / "ckpt", Options(to="torch_dist", tp=2))
    written = dcp.FileSystemReader(tmp_path / "ckpt").read_metadata()
    weight = written.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"]
    assert weight.properties.dtype == torch.bfloat16 and weight.size == torch.Size([4, 96, 32])
    target = {"decoder.final_layernorm.weight": torch.zeros(32, dtype=torch.bfloat16)}
    dcp.load(target, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    assert target["decoder.final_layernorm.weight"].abs().sum() > 0


def foreign(tmp_path: Path, kind: str, *, checksums: bool = True) -> tuple[Path, Path]:
    """A checkpoint as other tools write it: no receipt, checksums as torch makes them."""
    hf = write_hf(tmp_path / "hf")
    torch.serialization.set_crc32_options(checksums)
    try:
        if kind == "torch_dist":
            dcp.save(dict(stacked(global_tensors(hf))), checkpoint_id=tmp_path / "ckpt", no_dist=True)
        else:
            write_legacy(hf, tmp_path / "ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    return hf, tmp_path / "ckpt"


def flip_a_bit(ckpt: Path, hf: Path, name: str) -> Path:
    extent = open_checkpoint(ckpt, hf_config=hf).weights.tensors[name].extents[0]
    data = bytearray(extent.path.read_bytes())
    data[extent.offset + 9] ^= 1
    extent.path.write_bytes(bytes(data))
    return extent.path


@pytest.mark.parametrize("kind", ["torch_dist", "legacy"])
def test_one_flipped_bit_is_found_by_the_stored_checksum(tmp_path: Path, kind: str) -> None:
    hf, ckpt = foreign(tmp_path, kind)
    receipt = convert(open_checkpoint(ckpt, hf_config=hf), tmp_path / "good", Options(to="hf"))
    assert_same_weights(hf, tmp_path / "good")
    assert receipt["source"]["integrity"] == f"crc32 of {len(receipt['tensors'])} of {len(receipt['tensors'])} tensors"
    path = flip_a_bit(ckpt, hf, "model.layers.3.mlp.down_proj.weight")
    with pytest.raises(ConversionError, match=rf"{path}: the checksum of bytes \d+ to \d+ .*down_proj.weight"):
        convert(open_checkpoint(ckpt, hf_config=hf), tmp_path / "out", Options(to="hf", workers=3))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["torch_dist", "legacy"])
def test_without_a_checksum_the_receipt_says_so(tmp_path: Path, kind: str) -> None:
    hf, ckpt = foreign(tmp_path, kind, checksums=False)
    flip_a_bit(ckpt, hf, "model.layers.3.mlp.down_proj.weight")
    receipt = convert(open_checkpoint(ckpt, hf_config=hf), tmp_path / "out", Options(to="hf"))
    assert receipt["source"]["integrity"].startswith("not checked")


def test_hugging_face_to_torch_dist_and_back_never_imports_torch(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf")
    code = """
import sys
from pathlib import Path
from checkpoint_convert.convert import Options, convert
from checkpoint_convert.open import open_checkpoint
sys.modules["torch"] = None
hf, there, back = map(Path, sys.argv[1:])
convert(open_checkpoint(hf), there, Options(to="torch_dist", tp=2))
convert(open_checkpoint(there), back, Options(to="hf"))
"""
    folders = [str(tmp_path / name) for name in ("hf", "there", "back")]
    subprocess.run([sys.executable, "-c", code, *folders], check=True, timeout=120)
    assert_same_weights(hf, tmp_path / "back")
