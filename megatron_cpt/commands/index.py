"""`megatron-cpt index`: build the data indices of a run before its job starts."""

from __future__ import annotations

from pathlib import Path

import click

from megatron_cpt.config.load import load_config
from megatron_cpt.console import print_summary
from megatron_cpt.launch.preflight import index_cache_dir
from megatron_cpt.launch.start import load_run
from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu


@click.command()
@click.argument("config_path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
def index(config_path: Path, overrides: tuple[str, ...]) -> None:
    """Build what CONFIG's data needs of shuffling indices, on a login or CPU node.

    `train` builds what is missing itself, before its ranks connect; for large data it is cheaper to do it here, once.
    The indices lie in data.cache_dir and are keyed by the datasets' content.
    """
    run = load_run(load_config(config_path, overrides), str(config_path))
    config = run.checked.config
    adapt_megatron_core_to_cpu()
    from megatron_cpt.data.batches import open_batches

    cache_dir = index_cache_dir(config)
    open_batches(config, run.checked.datasets, run.ledger, run.plans, cache_dir)
    for plan in run.plans:
        click.echo(
            f"{plan.name}: {plan.needed_tokens:,} of {plan.available_tokens:,} tokens needed, "
            f"{plan.epochs_at_end:.2f} epochs at the end"
        )
    print_summary(f"indices are ready in {cache_dir}")
