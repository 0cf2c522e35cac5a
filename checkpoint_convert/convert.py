"""One conversion: index the source, plan the target, stream, prove, write the receipt, rename.

Peak memory is about workers x (2 to 3) x stream.BLOCK_BYTES above the imports, whatever the model's size.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import resource
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import megatron_cpt
from checkpoint_convert.checkpoint import (
    Extent,
    Format,
    IndexedCheckpoint,
    MismatchError,
    Weights,
    clear_os_errors,
    gammas_less_one,
)
from checkpoint_convert.hf import plan_hf, read_hf, read_safetensors
from checkpoint_convert.legacy import read_legacy
from checkpoint_convert.peft import ADAPTER_WEIGHTS, plan_peft
from checkpoint_convert.receipt import (
    RECEIPT,
    check_against_receipt,
    fingerprint,
    integrity,
    near_zero,
    shifted_gammas,
)
from checkpoint_convert.resume import PartialFolder, partial_path
from checkpoint_convert.rows import Files
from checkpoint_convert.side_files import has_tokenizer, model_card, write_side_files
from checkpoint_convert.stream import Copier, TensorRecord, compare_copies, run_parallel
from checkpoint_convert.target import Target
from checkpoint_convert.torch_dist import read_torch_dist
from checkpoint_convert.torch_dist_writer import plan_torch_dist
from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.tensors import check_ranks
from megatron_cpt.console import ProgressBar
from megatron_cpt.errors import ConversionError

log = logging.getLogger(__name__)
SPARE_BYTES = 64 * 2**20  # for the file system's own needs and the small files


@dataclass(frozen=True)
class Options:
    """How to write. `tp`, `pp`, `vpp` cut legacy files; for torch_dist `tp` pads the vocabulary and cuts chunks."""

    to: Format
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    dtype: str | None = None  # None keeps each tensor's own
    max_shard_bytes: int = 5 * 10**9
    workers: int = min(8, os.cpu_count() or 1)
    vocab_multiple: int = 128  # legacy: Megatron-LM's --make-vocab-size-divisible-by
    local_names: bool = False  # legacy: layer norms by the names of the local layer spec
    gammas_less_one: bool = False  # torch_dist, legacy: as Megatron-LM's --apply-layernorm-1p stores them
    allow_nonfinite: bool = False
    read_back: bool = False
    overwrite: bool = False

    def padded_vocab_size(self, arch: Architecture) -> int:
        """Rows of the written embedding.

        Legacy files hold what Megatron-LM's model has, which pads always; torch_dist loads under any padding.
        """
        if self.to in ("hf", "peft"):
            return arch.vocab_size
        if self.to == "torch_dist":
            return arch.padded_vocab_size(self.tp)
        step = self.vocab_multiple * self.tp
        return -(-arch.vocab_size // step) * step


def plan(source: IndexedCheckpoint, folder: Path, options: Options) -> Target:
    """Every file, byte range and tensor of the output, without writing anything."""
    target = _plan(source, folder, options)
    if options.gammas_less_one:
        target.tensors = gammas_less_one(target.tensors)
    return target


def _plan(source: IndexedCheckpoint, folder: Path, options: Options) -> Target:
    dtypes = {name: options.dtype or tensor.dtype for name, tensor in source.weights.tensors.items()}
    iteration = source.iteration or 1  # Megatron-LM refuses iteration 0
    _check_kind(source, options)
    if options.to == "peft":
        return plan_peft(folder, source, dtypes)
    if options.to == "hf":
        if options.tp > 1 or options.pp > 1 or options.vpp:
            raise ConversionError("a Hugging Face folder has no --tp, --pp or --vpp", hint="leave them out")
        if options.gammas_less_one:
            raise ConversionError("--apply-layernorm-1p is Megatron's way to store norms", hint="leave it out")
        return plan_hf(folder, source.arch, dtypes, options.max_shard_bytes)
    if options.to == "torch_dist":
        if options.vpp:
            raise ConversionError("torch_dist has no --vpp", hint="it loads under any pipeline layout; leave it out")
        _warn_of_grid(source.arch, options.tp)
        limit = options.max_shard_bytes
        less_one = options.gammas_less_one
        return plan_torch_dist(
            folder, source.arch, dtypes, limit, options.tp, options.pp, iteration, gammas_less_one=less_one
        )
    from checkpoint_convert.legacy_writer import plan_legacy  # torch, which the other formats do without

    return plan_legacy(
        folder,
        source.arch,
        dtypes,
        tp=options.tp,
        pp=options.pp,
        vpp=options.vpp,
        iteration=iteration,
        padded=options.padded_vocab_size(source.arch),
        local_names=options.local_names,
        gammas_less_one=options.gammas_less_one,
    )


def _check_kind(source: IndexedCheckpoint, options: Options) -> None:
    """Adapters become peft's folder, and nothing else does."""
    if source.lora is None and options.to == "peft":
        raise ConversionError(
            f"{source.path} holds a whole model, and peft's folder holds adapters", hint="--to hf writes the model"
        )
    if source.lora is not None and options.to != "peft":
        raise ConversionError(
            f"{source.path} holds adapters of rank {source.lora.rank} alone, which are no model",
            hint="--to peft writes them for peft, vLLM and others; `megatron-cpt merge-lora` adds them to their base",
        )
    if options.to == "peft" and (options.tp > 1 or options.pp > 1 or options.vpp or options.gammas_less_one):
        raise ConversionError("peft's folder has no --tp, --pp, --vpp or --apply-layernorm-1p", hint="leave them out")


def _warn_of_grid(arch: Architecture, tp: int) -> None:
    try:
        check_ranks(arch, tp)
    except ConversionError as error:
        log.warning(
            "%s: --tp %d only cuts the chunks of this checkpoint, which loads under any layout; a training job needs "
            "a tensor parallel size that divides the heads",
            error.message,
            tp,
        )


def convert(source: IndexedCheckpoint, final: Path, options: Options) -> dict[str, Any]:
    """Write the checkpoint to the folder `final` and return its receipt. Nothing appears there before the end.

    Raises MismatchError (exit 1) when weights do not match, ConversionError for everything else that a user can fix.
    """
    with clear_os_errors(f"cannot write {final}"):
        return _convert(source, final, options)


def _convert(source: IndexedCheckpoint, final: Path, options: Options) -> dict[str, Any]:
    started = time.time()
    _check_places(source, final, options)
    if source.unknown_fields:
        shown = ", ".join(source.unknown_fields[:8]) + (", ..." if len(source.unknown_fields) > 8 else "")
        log.warning("fields of Megatron that this version does not know, all named in the receipt: %s", shown)
    target = plan(source, partial_path(final), options)
    with PartialFolder(final, _plan_id(source, target, options)) as partial:
        old = partial.finished_records()
        _check_space(target, partial.path)
        target.allocate()
        records, resumed = _stream(source, target, partial, old, options)
        known = check_against_receipt(source, records)
        if source.merge is not None and source.merge.other is not None:
            check_against_receipt(
                source.merge.other, {n: replace(r, sha256=r.other_sha256) for n, r in records.items()}
            )
        _check_values(records, options)
        side_files = _write_small_files(source, target, options)
        _check_readable(source.arch, target, options)
        if options.read_back:
            _read_back(target, records, options.workers)
        receipt = _receipt(source, final, target, records, options, started)
        receipt["source"]["integrity"] = integrity(source, known)
        receipt["side_files"] = side_files
        receipt["resumed_tensors"] = resumed
        (partial.path / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
        partial.publish(overwrite=options.overwrite)
    return receipt


def _check_places(source: IndexedCheckpoint, final: Path, options: Options) -> None:
    if final.exists() and not options.overwrite and not (final.is_dir() and not any(final.iterdir())):
        raise ConversionError(f"{final} exists", hint="name another folder, or give --overwrite")
    if final.exists() and not final.is_dir():
        raise ConversionError(f"{final} is not a folder", hint="name another folder")
    here, there = source.path.resolve(), final.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ConversionError(
            f"source {source.path} and target {final} lie within each other", hint="name another folder"
        )


def _plan_id(source: IndexedCheckpoint, target: Target, options: Options) -> str:
    """Return a hash of the source files and the planned bytes: the same plan may continue a killed conversion."""
    digest = hashlib.sha256(megatron_cpt.__version__.encode())
    digest.update(repr({k: v for k, v in asdict(options).items() if k not in ("workers", "read_back")}).encode())
    updates = [] if source.merge is None else list(source.merge.updates.values())
    digest.update(repr(updates).encode())
    added = [tensor for update in updates for tensor in update.tensors]
    for path in sorted({e.path for t in (*source.weights.tensors.values(), *added) for e in t.extents}):
        stat = path.stat()
        digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    for tensor in [*source.weights.tensors.values(), *target.tensors.values()]:
        digest.update(repr(tensor).encode())
    return digest.hexdigest()


def _check_space(target: Target, folder: Path) -> None:
    """Refuse before the first byte when the output does not fit beside what is on the disk."""
    have = sum(path.stat().st_blocks * 512 for path in target.file_bytes if path.is_file())
    need = target.nbytes - have + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ConversionError(
            f"{folder.parent} has {free / 2**30:.2f} GiB free, the output needs {need / 2**30:.2f} GiB",
            hint="free some space, or name a folder on another disk",
        )


def _stream(
    source: IndexedCheckpoint, target: Target, partial: PartialFolder, old: dict[str, TensorRecord], options: Options
) -> tuple[dict[str, TensorRecord], int]:
    """Copy every tensor not already proven complete by an earlier run. Return all records and the number skipped."""
    weights = source.weights
    merge = source.merge
    other = merge.other.weights if merge is not None and merge.other is not None else None
    copied_bytes = sum(tensor.nbytes for w in (weights, other) if w is not None for tensor in w.copies) * 2
    with (
        Files() as sources,
        Files(write=True) as targets,
        ProgressBar("convert", weights.nbytes + copied_bytes, "bytes") as progress,
    ):
        proven = _prove(Copier(targets, None, progress.advance), target, old, options.workers)
        if old:
            log.info("continuing: %d of %d tensors are in place", len(proven), len(weights.tensors))
        partial.start_journal(proven)
        copier = Copier(sources, targets, progress.advance)
        updates = {} if merge is None else merge.updates
        compare_copies(copier, weights.tensors, weights.copies)
        if other is not None:
            compare_copies(copier, other.tensors, other.copies)

        def one(name: str) -> TensorRecord:
            record = copier.copy(weights.tensors[name], target.tensors[name], updates.get(name))
            partial.finished(record)
            return record

        names = [name for name in weights.tensors if name not in proven]
        records = run_parallel([functools.partial(one, name) for name in names], options.workers)
    found = proven | {record.name: record for record in records}
    return {name: found[name] for name in weights.tensors}, len(proven)


def _prove(copier: Copier, target: Target, records: dict[str, TensorRecord], workers: int) -> dict[str, TensorRecord]:
    """Those records whose tensor, read back from the target, has the recorded hash."""
    names = list(records)
    hashes = run_parallel([functools.partial(copier.sha256, target.tensors[name]) for name in names], workers)
    return {name: records[name] for name, sha in zip(names, hashes, strict=True) if sha == records[name].target_sha256}


def _check_values(records: dict[str, TensorRecord], options: Options) -> None:
    if shifted := shifted_gammas(records):
        log.warning("gammas of norms: %s", ", ".join(f"{name} {value}" for name, value in shifted.items()))
    zero = near_zero(records)
    if zero:
        most = sorted(zero, key=lambda name: -zero[name])[:3]
        shown = ", ".join(f"{name} ({zero[name]} of {_rows(records[name])})" for name in most)
        log.warning("%d near-zero rows in %d tensors, most in %s", sum(zero.values()), len(zero), shown)
    bad = {name: record.nonfinite_rows for name, record in records.items() if record.nonfinite_rows}
    if bad and not options.allow_nonfinite:
        lines = "\n  ".join(f"{name}: {count} rows" for name, count in list(bad.items())[:40])
        hint = "look at the source; --dtype float16 overflows above 65504; --allow-nonfinite writes them anyway"
        raise MismatchError(f"NaN or infinity in {len(bad)} tensors\n  {lines}", hint=hint)


def _rows(record: TensorRecord) -> int:
    return record.shape[0] if len(record.shape) > 1 else 1


def _write_small_files(source: IndexedCheckpoint, target: Target, options: Options) -> list[str]:
    for path, data in target.small_files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    if options.to == "peft":
        _write_card(source, target.folder)
        return sorted([*(path.name for path in target.small_files), "README.md"])
    folder = side_folder(target.folder, options.to)
    written = options.dtype or source.arch.dtype
    names = write_side_files(source, folder, written)
    if options.to == "hf":
        _write_card(source, folder)
        names.append("README.md")
    if not has_tokenizer(names):
        log.warning("no tokenizer in %s: the output has none either", source.side_dir)
    return names


def _write_card(source: IndexedCheckpoint, folder: Path) -> None:
    card = model_card(source, f"megatron-cpt {megatron_cpt.__version__}")
    (folder / "README.md").write_text(card, encoding="utf-8")


def side_folder(folder: Path, to: Format) -> Path:
    return folder if to == "hf" else folder / "hf"


def _check_readable(arch: Architecture, target: Target, options: Options) -> None:
    """Open the output with the reader: it must find each tensor exactly where the writer put it."""
    folder = target.folder
    if options.to == "legacy":
        (folder,) = folder.glob("iter_*")
    if options.to == "peft":
        weights = Weights(read_safetensors(folder / ADAPTER_WEIGHTS))
    else:
        weights = read_weights(options.to, folder, arch)
    found: dict[str, set[Extent]] = {name: set(tensor.extents) for name, tensor in weights.tensors.items()}
    for copy in weights.copies:
        found[copy.name] |= set(copy.extents)
    wrong = [name for name, tensor in target.tensors.items() if found.get(name) != set(tensor.extents)]
    if wrong or found.keys() != target.tensors.keys():
        raise AssertionError(f"the written checkpoint does not read as planned: {wrong[:5]}")


def read_weights(kind: Format, folder: Path, arch: Architecture) -> Weights:
    readers = {"hf": read_hf, "torch_dist": read_torch_dist, "legacy": read_legacy}
    return readers[kind](folder, arch)


def _read_back(target: Target, records: dict[str, TensorRecord], workers: int) -> None:
    """Hash the whole output from disk."""
    total = sum(tensor.nbytes for tensor in target.tensors.values())
    with Files() as files, ProgressBar("read back", total, "bytes") as progress:
        proven = _prove(Copier(files, None, progress.advance), target, records, workers)
    lost = sorted(records.keys() - proven.keys())
    if lost:
        raise MismatchError(f"{len(lost)} tensors do not read back as written: {lost[0]}", hint="a failing disk?")


def _receipt(
    source: IndexedCheckpoint,
    final: Path,
    target: Target,
    records: dict[str, TensorRecord],
    options: Options,
    started: float,
) -> dict[str, Any]:
    weights, arch = source.weights, source.arch
    lora = source.lora if source.merge is None else source.merge.lora
    padded = options.padded_vocab_size(arch)
    seconds = time.time() - started
    layout = {"tp": options.tp, "pp": options.pp, "vpp": options.vpp} if options.to not in ("hf", "peft") else {}
    return {
        "tool": "megatron-cpt",
        "version": megatron_cpt.__version__,
        "source": {
            "path": str(source.path),
            "format": source.format,
            "iteration": source.iteration,
            "bytes": weights.nbytes,
            "fingerprint": fingerprint([(weights.tensors[n], r.sha256) for n, r in records.items()]),
            "ignored": weights.ignored,
            "unknown_megatron_fields": list(source.unknown_fields),
        },
        "target": {
            "path": str(final),
            "format": options.to,
            **layout,
            "bytes": target.nbytes,
            "files": len(target.file_bytes),
            "fingerprint": fingerprint([(target.tensors[n], r.target_sha256) for n, r in records.items()]),
        },
        "family": arch.family,
        "adapters": None if lora is None else lora.model_dump(mode="json"),
        "merged_from": None if source.merge is None else str(source.merge.path),
        "share": None if source.merge is None or source.merge.other is None else source.merge.share,
        "parameters": arch.num_parameters,
        "tie_word_embeddings": arch.tie_word_embeddings,
        "tied_or_replicated_copies_compared": len(weights.copies),
        "vocab_size": arch.vocab_size,
        "padding_rows_removed": weights.padding_rows,
        "padding_rows_added": padded - arch.vocab_size,
        "casts": sum(r.dtype != r.target_dtype for r in records.values()),
        "gammas": {"source_less_one": source.gammas_less_one, "target_less_one": options.gammas_less_one}
        | shifted_gammas(records),
        "near_zero_rows": sum(near_zero(records).values()),
        "nonfinite_rows": sum(r.nonfinite_rows for r in records.values()),
        "read_back": options.read_back,
        "workers": options.workers,
        "seconds": round(seconds, 3),
        "gb_per_second": round(weights.nbytes / 1e9 / max(seconds, 1e-9), 3),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "tensors": [record.as_json() for record in records.values()],
    }
