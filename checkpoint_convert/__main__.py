"""`python -m checkpoint_convert` is `megatron-cpt convert`."""

from __future__ import annotations

import logging
import sys

from megatron_cpt.cli import run
from megatron_cpt.commands.convert import convert

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    run(convert, prog="python -m checkpoint_convert")
