"""`megatron-cpt merge-lora`: a whole model of low-rank adapters and the base that they were trained on."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from megatron_cpt.architecture.families import architecture_from_config
from megatron_cpt.architecture.rope import with_rope
from megatron_cpt.commands.base_model import check_base, place_of_base
from megatron_cpt.console import print_summary
from megatron_cpt.errors import ConversionError

if TYPE_CHECKING:
    from checkpoint_convert.checkpoint import IndexedCheckpoint

_FOLDER = click.Path(path_type=Path)


@click.command("merge-lora")
@click.argument("src", type=_FOLDER)
@click.argument("dst", type=_FOLDER)
@click.option("--base-model", type=_FOLDER, help="Where the base lies now; default: where SRC says.")
@click.option("--best", is_flag=True, help="From a run folder: the best checkpoint, not the latest.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Cast; default: as of the base.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file.")
@click.option("--workers", type=click.IntRange(1, 64), help="Threads; default: one per core, at most 8.")
@click.option("--read-back", is_flag=True, help="Hash the whole output from disk before giving it its name.")
@click.option("--overwrite", is_flag=True, help="Replace DST once the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the receipt.")
def merge_lora(src: Path, dst: Path, base_model: Path | None, best: bool, as_json: bool, **given: Any) -> None:
    """Add the adapters in SRC to their base model, and write DST: a Hugging Face model that needs no peft.

    SRC: a run with `lora` or a checkpoint of one, or a folder that peft wrote. The base is streamed, so memory does not
    grow with the model; sums are made in fp32 and rounded once. `convert RUN OUT --to peft` writes adapters alone.
    """
    from checkpoint_convert.convert import Options, convert
    from megatron_cpt.commands.convert import parse_size

    options = Options(
        to="hf",
        dtype=given["dtype"],
        max_shard_bytes=parse_size(given["max_shard_size"]),
        workers=given["workers"] or min(8, os.cpu_count() or 1),
        read_back=given["read_back"],
        overwrite=given["overwrite"],
    )
    receipt = convert(_with_adapters(src, base_model, best), dst, options)
    count = sum(bool(tensor["adapter_rank"]) for tensor in receipt["tensors"])
    print_summary(
        json.dumps(receipt)
        if as_json
        else f"{dst}: {count} of {len(receipt['tensors'])} tensors with adapters of rank {receipt['adapters']['rank']} "
        f"added, {receipt['target']['bytes'] / 1e9:.2f} GB in {receipt['seconds']:.1f} s, "
        f"peak memory {receipt['peak_rss_bytes'] / 2**30:.2f} GiB"
    )


def _with_adapters(src: Path, base_model: Path | None, best: bool) -> IndexedCheckpoint:
    """Open the base of the adapters in SRC, and say what is added to it."""
    from checkpoint_convert.open import open_checkpoint
    from checkpoint_convert.peft import base_of, is_peft, merged, read_peft, rope_of

    if is_peft(src):
        peft = read_peft(src)
        base = open_checkpoint(place_of_base(src, peft.base, base_model))
        peft.check(base.arch)
        return replace(base, merge=merged(base, src, peft.lora, peft.tensors))
    source = open_checkpoint(src, best=best, adapters=True)
    if source.lora is None:
        raise ConversionError(
            f"{src} holds a whole model, and no adapters", hint="name a run with `lora`, or a folder that peft wrote"
        )
    base, rope = open_checkpoint(place_of_base(src, base_of(source), base_model)), rope_of(source)
    check_base(source, base)
    config = with_rope(base.config, rope)
    base = replace(base, config=config, arch=replace(architecture_from_config(config), dtype=base.arch.dtype))
    merge = merged(base, source.path, source.lora, source.weights.tensors)
    return replace(base, merge=merge, run_config=source.run_config, iteration=source.iteration)
