"""Plans and comparisons as plain data for `--json`, and as lines for people."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from checkpoint_convert.checkpoint import IndexedCheckpoint
from checkpoint_convert.convert import Options
from checkpoint_convert.stream import BLOCK_BYTES
from checkpoint_convert.target import Target
from megatron_cpt.architecture.tensors import megatron_tensors, slice_shape

GIB = 2**30


def plan_report(source: IndexedCheckpoint, target: Target, final: Path, options: Options) -> dict[str, Any]:
    """What `convert --dry-run` tells: nothing was written and no weight was read."""
    arch = source.arch
    padded = options.padded_vocab_size(arch)
    place = next(parent for parent in (final, *final.resolve().parents) if parent.is_dir())
    return {
        "source": {"path": str(source.path), "format": source.format, "ignored": source.weights.ignored},
        "target": {"path": str(final), "format": options.to, "tp": options.tp, "pp": options.pp, "vpp": options.vpp},
        "family": arch.family,
        "parameters": arch.num_parameters,
        "tie_word_embeddings": arch.tie_word_embeddings,
        "vocab_size": arch.vocab_size,
        "padding_rows_removed": source.weights.padding_rows,
        "padding_rows_added": padded - arch.vocab_size,
        "gammas": {"source_less_one": source.gammas_less_one, "target_less_one": options.gammas_less_one},
        "source_bytes": source.weights.nbytes,
        "target_bytes": target.nbytes,
        "free_bytes": shutil.disk_usage(place).free,
        "largest_tensor_bytes": max(tensor.nbytes for tensor in target.tensors.values()),
        "buffer_bytes": 3 * BLOCK_BYTES * options.workers,
        "workers": options.workers,
        "files": [{"name": str(p.relative_to(target.folder)), "bytes": n} for p, n in target.file_bytes.items()],
        "mapping": [
            {
                "megatron": tensor.megatron,
                "kind": tensor.kind,
                "hf": list(tensor.hf),
                "shape": list(tensor.shape),
                "slice_shape": list(slice_shape(tensor, arch, options.tp, padded, by_heads=options.to == "legacy")),
                "dtype": target.tensors[tensor.hf[0]].dtype,
            }
            for tensor in (megatron_tensors(arch) if options.to != "peft" else ())
        ],
    }


def plan_lines(report: dict[str, Any]) -> list[str]:
    lines = []
    for row in report["mapping"]:
        shape = "x".join(map(str, row["shape"]))
        slices = "x".join(map(str, row["slice_shape"]))
        cut = "" if slices == shape else f" -> {slices}"
        lines.append(f"{row['megatron']:<62} {row['dtype']} {shape}{cut}  <- {row['kind']} {', '.join(row['hf'])}")
    lines += [f"{file['name']:<62} {file['bytes'] / 1e9:.3f} GB" for file in report["files"]]
    lines += [
        f"{report['family']}, {report['parameters']:,} parameters, "
        + ("tied" if report["tie_word_embeddings"] else "untied")
        + f" embeddings, vocabulary {report['vocab_size']:,}"
        f" (+{report['padding_rows_added']} padding rows, -{report['padding_rows_removed']})",
        f"read {report['source_bytes'] / 1e9:.2f} GB of {report['source']['format']}, write "
        f"{report['target_bytes'] / 1e9:.2f} GB of {report['target']['format']} in {len(report['files'])} files; "
        f"{report['free_bytes'] / 1e9:.2f} GB are free",
        f"memory: {report['buffer_bytes'] / GIB:.2f} GiB of buffers for {report['workers']} workers; "
        f"the largest tensor has {report['largest_tensor_bytes'] / GIB:.2f} GiB",
    ]
    if report["gammas"]["source_less_one"] != report["gammas"]["target_less_one"]:
        sign = "1 + stored" if report["gammas"]["source_less_one"] else "stored - 1"
        lines.append(f"gammas of norms: {sign} in fp32, rounded to the dtype written")
    lines += [f"left out: {count} {what}" for what, count in report["source"]["ignored"].items()]
    return [*lines, "dry run: nothing was written"]


def verify_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"differs: {fact['fact']} = {fact['a']} and {fact['b']}" for fact in result["facts_that_differ"]]
    lines += [f"differs: {name}" for name in result["tensors_that_differ"][:40]]
    differ, cast = len(result["tensors_that_differ"]), result["tensors_equal_after_cast"]
    lines.append(
        f"weights: {result['tensors'] - differ} of {result['tensors']} tensors equal, {cast} of them after a cast"
    )
    if "logits" in result:
        found = result["logits"]
        lines.append(
            f"logits on {found['tokens']} tokens: largest difference {found['max_difference']:.3g} "
            f"(relative {found['max_relative_difference']:.3g}, tolerance {found['tolerance']:g}); "
            f"perplexity {found['perplexity_a']:.6g} and {found['perplexity_b']:.6g}"
        )
    return [*lines, "the same model" if result["ok"] else "NOT the same model"]
