"""Look at a .bin/.idx dataset: python tools/inspect_dataset.py PREFIX [--tokenizer T] [--documents N] [--json]."""

from __future__ import annotations

from megatron_cpt.cli import run
from megatron_cpt.commands.dataset import inspect

if __name__ == "__main__":
    run(inspect)
