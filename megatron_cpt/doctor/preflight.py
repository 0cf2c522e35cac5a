"""`--preflight`: the ranks join as for training, measure their all-reduce, and run the first samples through the model.

This is the part that imports torch and Megatron-Core and that allocates memory on the devices. Nothing is written to
the run folder.
"""

from __future__ import annotations

import socket
import tempfile
import time
from pathlib import Path

from megatron_cpt.config.phases import phase_at
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.doctor.check import Check
from megatron_cpt.errors import CptError
from megatron_cpt.launch.start import PreparedRun, load_run

COLLECTIVE_MINUTES = 5.0  # a collective that takes longer is an error
REDUCED_BYTES = 64 << 20
ROUNDS = 5
SLOWEST_FRACTION = 0.5  # of the fastest machine's bandwidth; a machine below has a fault of its own


def check_start_of_training(config: RunConfig, named: str) -> list[Check]:
    """Check what needs all ranks of the layout; every rank calls it, and each returns the same."""
    from megatron_cpt.runtime.cpu import adapt_megatron_core_to_cpu

    adapt_megatron_core_to_cpu()
    from megatron_cpt.runtime.distributed import init_runtime, shutdown_runtime

    found: list[Check] = []
    try:
        run = load_run(config, named)
        init_runtime(config, timeout_minutes=COLLECTIVE_MINUTES)
        found.append(_bandwidth())
        found.append(_first_loss(run))
    except CptError as error:
        found.append(
            Check("start of training", "the ranks, model and first samples", "error", error.message, error.hint)
        )
    except RuntimeError as error:  # torch: a collective that failed or timed out, no memory left on a device
        detail = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        hint = "a rank that died says why in its log; out of memory: see docs/layouts.md"
        found.append(Check("start of training", "the ranks, model and first samples", "error", detail, hint))
    finally:
        shutdown_runtime()
    return found


def _bandwidth() -> Check:
    """All-reduce of REDUCED_BYTES within each machine, and between the first ranks of all machines."""
    import torch.distributed as dist

    world_size, backend = dist.get_world_size(), dist.get_backend()
    looked_at = f"all-reduce of {REDUCED_BYTES >> 20} MiB by {backend}, {ROUNDS} times"
    if world_size == 1:
        return Check("bandwidth", looked_at, "not checked", "there is one rank")
    hosts: list[str] = [""] * world_size
    dist.all_gather_object(hosts, socket.gethostname())
    names = list(dict.fromkeys(hosts))
    groups = {f"within {name}": [rank for rank, host in enumerate(hosts) if host == name] for name in names}
    groups[f"across {len(names)} machines"] = [hosts.index(name) for name in names]
    measured = {name: _measure(ranks) for name, ranks in groups.items() if len(ranks) > 1}
    told: list[dict[str, float]] = [{}] * world_size
    dist.all_gather_object(told, {name: rate for name, rate in measured.items() if rate is not None})
    rates = {name: min(row[name] for row in told if name in row) for name in measured}
    detail = ", ".join(f"{name} {rate / 1e9:.2f} GB/s" for name, rate in rates.items())
    within = [rate for name, rate in rates.items() if name.startswith("within ")]
    if within and min(within) < SLOWEST_FRACTION * max(within):
        hint = "take the slow machine out of the job and have its links checked"
        return Check("bandwidth", looked_at, "warning", f"machines differ: {detail}", hint)
    return Check("bandwidth", looked_at, "ok", f"bus bandwidth {detail}")


def _measure(ranks: list[int]) -> float | None:
    """Bus bandwidth of an all-reduce of `ranks` in bytes per second, None on the others; every rank calls it."""
    import torch
    import torch.distributed as dist

    group = dist.new_group(ranks)
    if dist.get_rank() not in ranks:
        return None
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    tensor = torch.ones(REDUCED_BYTES // 4, device=device)
    dist.all_reduce(tensor, group=group)  # makes the connections
    float(tensor[0])  # waits for the device
    started = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(tensor, group=group)
    float(tensor[0])
    seconds = (time.perf_counter() - started) / ROUNDS
    dist.destroy_process_group(group)
    return REDUCED_BYTES * 2 * (len(ranks) - 1) / len(ranks) / seconds


def _first_loss(run: PreparedRun) -> Check:
    """Loss of the first micro-batch, as `train` checks it before its first step."""
    from megatron.core import parallel_state

    from megatron_cpt.data.batches import open_batches
    from megatron_cpt.train.start_checks import check_start
    from megatron_cpt.train.state import build_train_state

    config, name = run.checked.config, "first loss"
    if run.ledger.tokens:
        return Check(name, "nothing", "not checked", "the run has a checkpoint, and goes on from there")
    if run.checked.origin.kind == "random" or not config.model.check_start:
        return Check(name, "nothing", "not checked", "the weights are random, or model.check_start is false")
    state = build_train_state(config, run.checked.arch, origin=run.checked.origin)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(config.data.cache_dir or folder)
        batches = open_batches(config, run.checked.datasets, run.ledger, run.plans, cache)
        step = batches.plan_step(run.ledger, phase_at(config))
        rank, size = parallel_state.get_data_parallel_rank(), run.checked.derived.data_parallel_size
        batch = next(batches.micro_batches(step, config.batch.micro_batch_size, rank, size))
    loss = check_start(state, batch, run.checked.origin)
    looked_at = f"{run.checked.origin.weights} on the first micro-batch of rank 0, against a uniform guess"
    return Check(name, looked_at, "ok", f"{loss:.4f} per token; the log says what transformers computes")
