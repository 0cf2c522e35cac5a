"""What users bring: each case is one clear error, and nothing appears under the final name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_convert import convert as engine
from checkpoint_convert import rows, stream
from checkpoint_convert.checkpoint import Format
from checkpoint_convert.convert import Options, convert
from checkpoint_convert.open import open_checkpoint
from megatron_cpt.errors import ConversionError
from tests.unit.convert.tiny_checkpoints import change_tensors, hf_tensors, write_hf


def attempt(source: Path, fmt: Format = "torch_dist", **options: object) -> None:
    convert(open_checkpoint(source), source.parent / "out", Options(to=fmt, workers=2, **options))  # type: ignore[arg-type]


def refused(source: Path, words: str, fmt: Format = "torch_dist", **options: object) -> ConversionError:
    with pytest.raises(ConversionError, match=words) as caught:
        attempt(source, fmt, **options)
    assert not (source.parent / "out").exists()
    return caught.value


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def truncate_header(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 40)


def lengthen(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"abc")


def garble_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:20] = b"\xff" * 12
    path.write_bytes(bytes(data))


def name_a_lost_shard(folder: Path) -> None:
    tensors = hf_tensors(folder)
    names = dict.fromkeys(tensors, "model.safetensors") | {"model.norm.weight": "model-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def lose_the_index(folder: Path) -> None:
    tensors = hf_tensors(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[::2]}, folder / "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in names[1::2]}, folder / "model-00002-of-00002.safetensors")


def store_twice(folder: Path) -> None:
    save_file({"model.norm.weight": torch.ones(32)}, folder / "again.safetensors")


def add_a_tensor(folder: Path) -> None:
    change_tensors(folder, model__layers__0__mlp__router__weight=torch.ones(2, 2))


def lose_a_tensor(folder: Path) -> None:
    change_tensors(folder, model__layers__2__mlp__up_proj__weight=None)


def bend_a_tensor(folder: Path) -> None:
    change_tensors(folder, model__layers__2__mlp__up_proj__weight=torch.ones(32, 48).bfloat16())


def write_a_list_as_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"[[1, 2]]")


def name_a_number_as_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": 3}}')


def use_another_dtype(folder: Path) -> None:
    change_tensors(folder, model__norm__weight=torch.ones(32, dtype=torch.float64))


def mix_dtypes(folder: Path) -> None:
    change_tensors(folder, model__layers__2__self_attn__q_proj__weight=torch.ones(32, 32))


def mix_dtypes_of_layers(folder: Path) -> None:
    change_tensors(folder, model__layers__2__input_layernorm__weight=torch.ones(32))


def poison(folder: Path) -> None:
    weight = hf_tensors(folder)["model.layers.1.mlp.down_proj.weight"].clone()
    weight[5, 3] = float("nan")
    weight[7, 0] = float("-inf")
    change_tensors(folder, model__layers__1__mlp__down_proj__weight=weight)


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


HF_CASES = [
    (truncate, "is truncated"),
    (truncate_header, "truncated within its header"),
    (lengthen, "longer than its header"),
    (garble_header, "damaged header"),
    (write_a_list_as_header, "damaged header"),
    (name_a_number_as_shard, "must map tensor names to file names"),
    (name_a_lost_shard, "files that are not there: model-00002.safetensors"),
    (lose_the_index, "no model.safetensors.index.json"),
    (store_twice, "stored twice"),
    (add_a_tensor, "not mapped: model.layers.0.mlp.router.weight"),
    (lose_a_tensor, "missing: model.layers.2.mlp.up_proj.weight"),
    (bend_a_tensor, r"shape \(32, 48\), config.json asks for \(48, 32\)"),
    (use_another_dtype, "float64|F64"),
    (mix_dtypes, "different dtypes"),
    (mix_dtypes_of_layers, "different dtypes"),
    (poison, r"NaN or infinity in 1 tensors\n  model.layers.1.mlp.down_proj.weight: 2 rows"),
    (edit_config(tie_word_embeddings=True), "two|stored twice with different values"),
    (edit_config(num_hidden_layers=3), "not mapped: model.layers.3"),
    (edit_config(num_hidden_layers=5), "missing: model.layers.4"),
    (edit_config(vocab_size=80), "model.embed_tokens.weight has shape"),
    (edit_config(intermediate_size=64), "gate_proj.weight has shape"),
    (edit_config(num_key_value_heads=4), "k_proj.weight has shape"),
    (edit_config(model_type="llama", architectures=["LlamaForCausalLM"]), "not mapped: .*bias"),
]


@pytest.mark.parametrize(("spoil", "words"), HF_CASES, ids=lambda case: getattr(case, "__name__", str(case))[:40])
def test_bad_hugging_face_folders(tmp_path: Path, spoil: Callable[[Path], None], words: str) -> None:
    source = write_hf(tmp_path / "hf")
    spoil(source)
    refused(source, words)


def test_there_are_all_the_cases_of_the_readme() -> None:
    assert len(HF_CASES) >= 20


def test_offenders_exit_1_and_mistakes_exit_2(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    lose_a_tensor(source)
    assert refused(source, "missing").exit_code == 1
    truncate(source)
    assert refused(source, "truncated").exit_code == 2


def test_nonfinite_rows_pass_when_allowed(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    poison(source)
    attempt(source, allow_nonfinite=True)
    receipt = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert receipt["nonfinite_rows"] == 2


def test_a_cast_that_overflows_is_an_error(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    change_tensors(source, model__norm__weight=torch.full((32,), 1e6, dtype=torch.bfloat16))
    refused(source, "NaN or infinity", dtype="float16")


def test_near_zero_rows_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_hf(tmp_path / "hf")
    embedding = hf_tensors(source)["model.embed_tokens.weight"].clone()
    embedding[70:] = 0
    embedding[3] = 1e-20
    change_tensors(source, model__embed_tokens__weight=embedding)
    attempt(source)
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["near_zero_rows"] == 8
    assert "8 near-zero rows in 1 tensors, most in model.embed_tokens.weight (8 of 77)" in caplog.text


def test_a_zero_bias_is_no_news_but_a_zero_norm_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_hf(tmp_path / "hf")
    names = [name for name in hf_tensors(source) if name.endswith("bias")]
    zeros = {name.replace(".", "__"): torch.zeros(32, dtype=torch.bfloat16) for name in names}
    change_tensors(source, **zeros)
    attempt(source)
    assert len(names) == 12 and "near-zero" not in caplog.text
    change_tensors(source, model__norm__weight=torch.zeros(32, dtype=torch.bfloat16))
    attempt(source, overwrite=True)
    assert "1 near-zero rows in 1 tensors, most in model.norm.weight (1 of 1)" in caplog.text


# ---------------------------------------------------------------- Megatron checkpoints


def megatron(tmp_path: Path, fmt: Format, **options: object) -> Path:
    source = write_hf(tmp_path / "hf")
    convert(open_checkpoint(source), tmp_path / "ckpt", Options(to=fmt, workers=2, **options))  # type: ignore[arg-type]
    return tmp_path / "ckpt"


def test_legacy_with_a_missing_rank(tmp_path: Path) -> None:
    ckpt = megatron(tmp_path, "legacy", tp=2, pp=2)
    shutil.rmtree(ckpt / "iter_0000001" / "mp_rank_01_000")
    refused(ckpt, "lacks ranks of TP2 x PP2: mp_rank_01_000", "hf")


def test_legacy_with_a_missing_stage(tmp_path: Path) -> None:
    ckpt = megatron(tmp_path, "legacy", tp=2, pp=2)
    for rank in (0, 1):
        shutil.rmtree(ckpt / "iter_0000001" / f"mp_rank_0{rank}_001")
    refused(ckpt, "holds one pipeline stage, and its folders are named for several", "hf")


def test_legacy_with_a_truncated_rank(tmp_path: Path) -> None:
    ckpt = megatron(tmp_path, "legacy", tp=2)
    os.truncate(ckpt / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt", 5000)
    refused(ckpt, "cannot be read", "hf")


def test_legacy_tracker_that_names_nothing(tmp_path: Path) -> None:
    ckpt = megatron(tmp_path, "legacy")
    (ckpt / "latest_checkpointed_iteration.txt").write_text("900")
    refused(ckpt, "iter_0000900, which is not in", "hf")


def test_replicated_norm_that_differs_between_ranks(tmp_path: Path) -> None:
    ckpt = megatron(tmp_path, "legacy", tp=2)
    path = ckpt / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    state["model"]["decoder.final_layernorm.weight"] += 1
    torch.save(state, path)
    refused(ckpt, "model.norm.weight: .* differ", "hf")


def corrupt_chunk(ckpt: Path) -> None:
    path = ckpt / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[:4] = b"XXXX"
    data[200:300] = b"\x00" * 100
    path.write_bytes(bytes(data))


def lose_distcp(ckpt: Path) -> None:
    (ckpt / "__0_0.distcp").unlink()


def truncate_distcp(ckpt: Path) -> None:
    os.truncate(ckpt / "__0_0.distcp", 20_000)


def truncate_metadata(ckpt: Path) -> None:
    os.truncate(ckpt / ".metadata", 900)


def lose_metadata(ckpt: Path) -> None:
    (ckpt / ".metadata").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (corrupt_chunk, "damaged chunk"),
        (lose_distcp, "__0_0.distcp is missing"),
        (truncate_distcp, "ends too early"),
        (truncate_metadata, "is damaged|asks for a type"),
        (lose_metadata, "no .metadata"),
        (lambda ckpt: edit_config(num_hidden_layers=5)(ckpt / "hf"), "has 4 layers, config.json says 5"),
        (lambda ckpt: edit_config(vocab_size=300)(ckpt / "hf"), "config.json asks for"),
        (lambda ckpt: edit_config(hidden_size=64)(ckpt / "hf"), "config.json asks for"),
        (lambda ckpt: edit_config(model_type="qwen3", architectures=None)(ckpt / "hf"), "q_layernorm"),
    ],
)
def test_bad_torch_dist_folders(tmp_path: Path, spoil: Callable[[Path], None], words: str) -> None:
    ckpt = megatron(tmp_path, "torch_dist", tp=2)
    spoil(ckpt)
    refused(ckpt, words, "hf")


@pytest.mark.parametrize("fmt", ["hf", "torch_dist", "legacy"])
def test_one_flipped_bit_is_found_by_the_receipt(tmp_path: Path, fmt: Format) -> None:
    ckpt = megatron(tmp_path, fmt)
    extent = open_checkpoint(ckpt).weights.tensors["model.layers.3.mlp.down_proj.weight"].extents[0]
    data = bytearray(extent.path.read_bytes())
    data[extent.offset + 9] ^= 1
    extent.path.write_bytes(bytes(data))
    refused(ckpt, "1 tensors are not what .*conversion.json says", "hf")


# ---------------------------------------------------------------- places and disks


def test_places_that_are_refused(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    with pytest.raises(ConversionError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ConversionError, match="not a folder"):
        open_checkpoint(source / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="no checkpoint that we know"):
        open_checkpoint(tmp_path / "empty")
    opened = open_checkpoint(source)
    with pytest.raises(ConversionError, match="within each other"):
        convert(opened, source / "out", Options(to="hf"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").write_text("x")
    with pytest.raises(ConversionError, match="exists"):
        convert(opened, tmp_path / "taken", Options(to="hf"))
    assert (tmp_path / "taken" / "precious.txt").read_text() == "x"
    convert(opened, tmp_path / "taken", Options(to="hf", overwrite=True))
    assert not (tmp_path / "taken" / "precious.txt").exists()
    assert (tmp_path / "taken" / "model.safetensors").is_file()


@pytest.mark.parametrize("place", ["/proc/nowhere/out", "/dev/full/out"])
def test_places_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    opened = open_checkpoint(write_hf(tmp_path / "hf"))
    with pytest.raises(ConversionError, match=f"cannot write {place}: "):
        convert(opened, Path(place), Options(to="hf"))


def test_too_little_space_is_found_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_hf(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(engine.shutil, "disk_usage", lambda path: usage)
    refused(source, "GiB free, the output needs")
    assert not list((tmp_path / "out.partial").glob("*.distcp"))


def test_disk_full_half_way_then_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_hf(tmp_path / "hf")
    written = 0

    def full(fd: int, data: object, offset: int) -> None:
        nonlocal written
        written += 1
        if written > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(fd, data, offset)  # type: ignore[arg-type]

    original = rows._write
    monkeypatch.setattr(rows, "_write", full)
    refused(source, "the disk is full", "hf")
    monkeypatch.setattr(rows, "_write", original)
    attempt(source, "hf")
    receipt = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert 10 <= receipt["resumed_tensors"] <= 20
    assert not (tmp_path / "out.partial").exists()


def test_blocks_smaller_than_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of many blocks: rows that straddle groups, slices and chunks."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 200)
    source = write_hf(tmp_path / "hf")
    ckpt = tmp_path / "ckpt"
    convert(open_checkpoint(source), ckpt, Options(to="torch_dist", tp=4, workers=3))
    attempt(ckpt, "hf")
    assert all(torch.equal(t, hf_tensors(tmp_path / "out")[n]) for n, t in hf_tensors(source).items())
