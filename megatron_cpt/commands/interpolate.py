"""`megatron-cpt interpolate`: a model between a trained one and its base."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from megatron_cpt.commands.base_model import check_base, place_of_base
from megatron_cpt.console import print_summary

_FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("src", type=_FOLDER)
@click.argument("dst", type=_FOLDER)
@click.option("--ratio", type=click.FloatRange(0, 1), required=True, help="Share of SRC: 1 is SRC, 0 is its base.")
@click.option("--base-model", type=_FOLDER, help="Where the base lies; default: where the run of SRC says.")
@click.option("--best", is_flag=True, help="From a run folder: the best checkpoint, not the latest.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Cast; default: as of SRC.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file.")
@click.option("--workers", type=click.IntRange(1, 64), help="Threads; default: one per core, at most 8.")
@click.option("--read-back", is_flag=True, help="Hash the whole output from disk before giving it its name.")
@click.option("--overwrite", is_flag=True, help="Replace DST once the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the receipt.")
def interpolate(
    src: Path, dst: Path, ratio: float, base_model: Path | None, best: bool, as_json: bool, **given: Any
) -> None:
    """Write DST, a Hugging Face model whose every weight is RATIO of SRC's and the rest of the base's.

    The cheapest remedy against forgetting: nothing is trained, and the ratio is chosen afterwards.

    \b
      megatron-cpt interpolate runs/medical export/half --ratio 0.5
      megatron-cpt eval perplexity export/half --data data/general --data data/medical
    SRC: a run, its checkpoint, or a Hugging Face folder. Both models are streamed, so memory does not grow with them;
    sums are made in fp32 and rounded once, and at 0 and 1 the model is the base or SRC, bit for bit.
    """
    from checkpoint_convert.convert import Options, convert
    from checkpoint_convert.interpolate import interpolated
    from checkpoint_convert.open import open_checkpoint
    from checkpoint_convert.peft import base_of
    from megatron_cpt.commands.convert import parse_size

    options = Options(
        to="hf",
        dtype=given["dtype"],
        max_shard_bytes=parse_size(given["max_shard_size"]),
        workers=given["workers"] or min(8, os.cpu_count() or 1),
        read_back=given["read_back"],
        overwrite=given["overwrite"],
    )
    source = open_checkpoint(src, best=best)
    base = open_checkpoint(place_of_base(src, base_of(source), base_model))
    check_base(source, base)
    receipt = convert(interpolated(source, base, ratio), dst, options)
    print_summary(
        json.dumps(receipt)
        if as_json
        else f"{dst}: {ratio:g} of {source.path} and {1 - ratio:g} of {base.path}, "
        f"{receipt['target']['bytes'] / 1e9:.2f} GB in {receipt['seconds']:.1f} s, "
        f"peak memory {receipt['peak_rss_bytes'] / 2**30:.2f} GiB"
    )
