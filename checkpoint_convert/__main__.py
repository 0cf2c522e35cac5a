"""`python -m checkpoint_convert` is `megatron-cpt convert`."""

from __future__ import annotations

from megatron_cpt.cli import log_to_console, run
from megatron_cpt.commands.convert import convert

if __name__ == "__main__":
    log_to_console()
    run(convert, prog="python -m checkpoint_convert")
