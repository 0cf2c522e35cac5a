"""`megatron-cpt compare A B`: prove that two checkpoints, of any formats, are the same model."""

from __future__ import annotations

import json
from pathlib import Path

import click

_FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("a", type=_FOLDER)
@click.argument("b", type=_FOLDER)
@click.option("--logits/--no-logits", default=True, help="Also compare logits and perplexity on a fixed text.")
@click.option("--tolerance", type=float, help="Relative bound for logits, perplexity.  [default: 1e-5; 0.02 if cast]")
@click.option("--hf-config", type=_FOLDER, help="Folder with config.json, for a checkpoint that carries none.")
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Threads.")
@click.option("--trust-pickle", is_flag=True, help="Unpickle .pt/.bin files without the allow-list: runs their code.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def compare(
    a: Path,
    b: Path,
    logits: bool,
    tolerance: float | None,
    hf_config: Path | None,
    workers: int,
    trust_pickle: bool,
    as_json: bool,
) -> int:
    """Prove that A and B, in any formats, are the same model. Exit 1 when they are not.

    `megatron-cpt convert verify A B` is the same command.
    """
    from checkpoint_convert.open import open_checkpoint
    from checkpoint_convert.plan_text import verify_lines
    from checkpoint_convert.verify import verify

    opened = [open_checkpoint(path, hf_config=hf_config, trust_pickle=trust_pickle) for path in (a, b)]
    result = verify(opened[0], opened[1], logits=logits, tolerance=tolerance, workers=workers)
    click.echo(json.dumps(result) if as_json else "\n".join(verify_lines(result)))
    return 0 if result["ok"] else 1
