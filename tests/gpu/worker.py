"""Trains rows on one device, in one process: `worker.py cpu|cuda MODELS_DIR OUT.json`.

A row that fails leaves its error in the results, and the next one goes on. Without a GPU the rows of `cuda` run on
the CPU: a rehearsal of everything but the kernels.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tests.parity.worker as parity  # adapts Megatron-Core to the CPU where there is no GPU
from megatron_cpt.runtime import adamw
from megatron_cpt.runtime.distributed import init_runtime, shutdown_runtime
from tests.gpu.rows import BASELINES, LOGITS, ROWS, GpuRow

_ADAM_MODULES = {
    "te": ("transformer_engine.pytorch.optimizers", "transformer_engine"),
    "apex": ("apex.optimizers", "apex"),
}


@contextlib.contextmanager
def adam(name: str | None) -> Iterator[None]:
    """Within it, the optimizer's kernel is that of `name`, whatever else is installed."""
    if name is None:
        yield
        return
    import megatron.core.optimizer as engine
    from megatron.core.optimizer import distrib_optimizer

    hidden = {module for other, (_, module) in _ADAM_MODULES.items() if other != name}
    find = importlib.util.find_spec
    kernel = importlib.import_module(_ADAM_MODULES[name][0]).FusedAdam if name in _ADAM_MODULES else None
    saved = engine.Adam, distrib_optimizer.Adam
    try:
        if kernel is not None:
            engine.Adam = distrib_optimizer.Adam = kernel
        with mock.patch.object(
            adamw.importlib.util, "find_spec", lambda module, *rest: None if module in hidden else find(module, *rest)
        ):
            yield
    finally:
        engine.Adam, distrib_optimizer.Adam = saved


def run_row(row: GpuRow, models_dir: Path) -> dict[str, Any]:
    absent = [module for module in row.needs if importlib.util.find_spec(module) is None]
    if absent:
        return {"refused": f"{', '.join(absent)} is not installed"}
    try:
        with adam(row.adam):
            return parity.run_train(row.row, models_dir)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def main() -> None:
    device, models_dir, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    rows = [GpuRow(row) for row in BASELINES] if device == "cpu" else list(ROWS)
    init_runtime(parity.config_of(rows[0].row, models_dir))
    results: dict[str, Any] = {row.name: run_row(row, models_dir) for row in rows}
    for logits in LOGITS if device == "cuda" else ():
        results[logits.name] = parity.run_logits(logits, models_dir)
    out.write_text(json.dumps(results))
    shutdown_runtime()


if __name__ == "__main__":
    main()
