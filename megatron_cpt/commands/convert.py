"""`megatron-cpt convert SRC DST --to FORMAT`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from megatron_cpt.commands.compare import compare
from megatron_cpt.console import print_summary
from megatron_cpt.errors import ConversionError

FORMATS = ("hf", "torch_dist", "legacy", "peft")
_FOLDER = click.Path(path_type=Path)


class ConvertCommand(click.Command):
    """`convert`, whose first argument `verify` means `compare`: the spelling of earlier versions, kept for scripts."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and args[0] == "verify":
            return compare.make_context(f"{info_name} verify", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB`, `1000`; ConversionError otherwise."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|[KMGT]i?B)\s*", text, re.IGNORECASE)
    unit = found.group(2).upper() if found else ""
    power = "KMGT".find(unit[0]) + 1 if unit else 0
    size = int(float(found.group(1)) * (1024 if "I" in unit else 1000) ** power) if found else 0
    if size <= 0:
        raise ConversionError(f"--max-shard-size {text!r} is not a size", hint="write it as 5GB, 500MB or 2GiB")
    return size


@click.command(cls=ConvertCommand)
@click.argument("src", type=_FOLDER)
@click.argument("dst", type=_FOLDER)
@click.option("--to", "to", type=click.Choice(FORMATS), required=True, help="Format to write.")
@click.option("--tp", default=1, type=click.IntRange(1), show_default=True, help="Tensor-parallel ranks to cut for.")
@click.option("--pp", default=1, type=click.IntRange(1), show_default=True, help="Pipeline stages to cut for (legacy).")
@click.option("--vpp", type=click.IntRange(2), help="Virtual pipeline chunks per stage (legacy).")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Cast; default: as stored.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weight file (hf, torch_dist).")
@click.option("--workers", type=click.IntRange(1, 64), help="Threads; default: one per core, at most 8.")
@click.option(
    "--make-vocab-size-divisible-by",
    "vocab_multiple",
    default=128,
    type=click.IntRange(1),
    show_default=True,
    help="Rows of vocabulary per rank are a multiple of this, as of Megatron-LM's flag (legacy).",
)
@click.option("--spec", type=click.Choice(["te", "local"]), default="te", help="Layer-norm names of legacy output.")
@click.option(
    "--apply-layernorm-1p",
    "gammas_less_one",
    is_flag=True,
    help="Store gammas of norms minus 1, for a job with Megatron-LM's flag (torch_dist, legacy).",
)
@click.option("--hf-config", type=_FOLDER, help="Folder with config.json and tokenizer, if SRC carries none.")
@click.option("--best", is_flag=True, help="From a run folder: the best checkpoint, not the latest.")
@click.option("--dry-run", is_flag=True, help="Print the mapping, sizes and files; write nothing.")
@click.option("--read-back", is_flag=True, help="Hash the whole output from disk before giving it its name.")
@click.option("--allow-nonfinite", is_flag=True, help="Write weights that hold NaN or infinity.")
@click.option("--trust-pickle", is_flag=True, help="Unpickle .pt/.bin files without the allow-list: runs their code.")
@click.option("--overwrite", is_flag=True, help="Replace DST once the new one is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the receipt, or the plan.")
def convert(src: Path, dst: Path, to: str, as_json: bool, dry_run: bool, **given: Any) -> None:
    """Convert SRC to DST: checkpoints of Hugging Face and Megatron, exactly, in little memory, on any machine.

    SRC: a Hugging Face folder, a Megatron checkpoint (torch_dist or legacy mp_rank_XX), a folder of iterations,
    or a run folder; of a run with `lora`, --to peft writes the adapters.
    `megatron-cpt compare SRC DST` proves afterwards that both are the same model.
    """
    from checkpoint_convert import convert as engine
    from checkpoint_convert.open import open_checkpoint
    from checkpoint_convert.plan_text import plan_lines, plan_report

    defaults = engine.Options(to="hf")
    options = engine.Options(
        to=to,  # type: ignore[arg-type]
        tp=given["tp"],
        pp=given["pp"],
        vpp=given["vpp"],
        dtype=given["dtype"],
        max_shard_bytes=parse_size(given["max_shard_size"]),
        workers=given["workers"] or defaults.workers,
        vocab_multiple=given["vocab_multiple"],
        local_names=given["spec"] == "local",
        gammas_less_one=given["gammas_less_one"],
        allow_nonfinite=given["allow_nonfinite"],
        read_back=given["read_back"],
        overwrite=given["overwrite"],
    )
    source = open_checkpoint(
        src,
        hf_config=given["hf_config"],
        best=given["best"],
        trust_pickle=given["trust_pickle"],
        shapes_only=dry_run,
        adapters=True,
    )
    if dry_run:
        report = plan_report(source, engine.plan(source, dst, options), dst, options)
        click.echo(json.dumps(report) if as_json else "\n".join(plan_lines(report)))
        return
    receipt = engine.convert(source, dst, options)
    print_summary(json.dumps(receipt) if as_json else _summary(dst, to, receipt))


def _summary(dst: Path, to: str, receipt: dict[str, Any]) -> str:
    ignored = ", ".join(f"{count} {what}" for what, count in receipt["source"]["ignored"].items())
    return (
        f"{dst}: {len(receipt['tensors'])} tensors, {receipt['target']['bytes'] / 1e9:.2f} GB as {to} "
        f"in {receipt['seconds']:.1f} s, peak memory {receipt['peak_rss_bytes'] / 2**30:.2f} GiB"
        + (f"; left out: {ignored}" if ignored else "")
    )
