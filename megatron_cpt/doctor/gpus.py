"""The GPUs of this machine as nvidia-smi sees them; nothing is allocated on them."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
from collections.abc import Callable

from megatron_cpt.doctor.check import Check
from megatron_cpt.launch.environment import count_nvidia_gpus

SMI_TIMEOUT_SECONDS = 30  # a broken driver lets nvidia-smi wait for ever
BUSY_FRACTION = 0.05  # of a GPU's memory in use before the job starts
GPU_FIELDS = "index,name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"

Smi = Callable[[list[str]], str]  # arguments of nvidia-smi -> its output


class SmiError(Exception):
    """nvidia-smi is not there or did not answer."""


def check_gpus(wanted: int, smi: Smi | None = None, count: Callable[[], int] = count_nvidia_gpus) -> list[Check]:
    """Check the number, the free memory and the memory errors of the GPUs against `wanted` per machine."""
    try:
        rows = _rows((smi or run_smi)([f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits"]))
    except SmiError as error:
        if count():
            return [Check("GPUs", "nvidia-smi", "error", f"/dev shows {count()} GPUs, and {error}", "nvidia-smi")]
        return [Check("GPUs", "nvidia-smi and /dev/nvidia*", "not checked", f"no GPU here ({error}): the CPU trains")]
    checks = [_number(len(rows), wanted), _memory(rows), _ecc(rows)]
    try:
        checks.append(
            _processes(
                _rows((smi or run_smi)(["--query-compute-apps=pid,name,used_memory", "--format=csv,noheader,nounits"]))
            )
        )
    except SmiError as error:
        checks.append(Check("processes on GPUs", "nvidia-smi --query-compute-apps", "not checked", str(error)))
    reason = "nvidia-smi does not show Xid errors; the kernel log (dmesg) does, where you may read it"
    return [*checks, Check("Xid errors", "nothing", "not checked", reason)]


def run_smi(arguments: list[str]) -> str:
    """Return what nvidia-smi prints.

    Raises:
        SmiError: it is not installed, fails, or does not answer within SMI_TIMEOUT_SECONDS.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        raise SmiError("nvidia-smi is not installed")
    try:
        done = subprocess.run(
            [program, *arguments], text=True, capture_output=True, check=False, timeout=SMI_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise SmiError(f"nvidia-smi did not answer within {SMI_TIMEOUT_SECONDS} seconds") from error
    except OSError as error:
        raise SmiError(f"nvidia-smi cannot be started: {error.strerror}") from error
    if done.returncode:
        raise SmiError(f"nvidia-smi failed: {(done.stdout + done.stderr).strip().splitlines()[-1:] or done.returncode}")
    return done.stdout


def _rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if row]


def _number(found: int, wanted: int) -> Check:
    looked_at = f"nvidia-smi, parallel.gpus_per_node = {wanted}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        found = min(found, len([name for name in hidden.split(",") if name.strip() not in ("", "-1")]))
        looked_at += f", CUDA_VISIBLE_DEVICES={hidden}"
    if found < wanted:
        hint = "set parallel.gpus_per_node to the GPUs of a machine, or ask the scheduler for more"
        return Check("number of GPUs", looked_at, "error", f"{found} GPUs for {wanted} ranks", hint)
    return Check("number of GPUs", looked_at, "ok", f"{found} GPUs for {wanted} ranks")


def _memory(rows: list[list[str]]) -> Check:
    used = {row[0]: (_mib(row[3]), _mib(row[2])) for row in rows}
    known = {index: (u, total) for index, (u, total) in used.items() if u is not None and total}
    looked_at = "memory in use on each GPU"
    if not known:
        return Check("GPU memory", looked_at, "not checked", "nvidia-smi gives no numbers")
    busy = [
        f"GPU {i}: {u:,.0f} of {t:,.0f} MiB" for i, (u, t) in known.items() if u is not None and u > BUSY_FRACTION * t
    ]
    if busy:
        hint = "nvidia-smi shows whose it is; the job would find less memory than the plan counts on"
        return Check("GPU memory", looked_at, "warning", f"in use before the job: {'; '.join(busy)}", hint)
    return Check("GPU memory", looked_at, "ok", f"{len(known)} GPUs are empty")


def _ecc(rows: list[list[str]]) -> Check:
    looked_at = "uncorrected ECC errors since the driver was loaded"
    counts = {row[0]: _mib(row[4]) for row in rows}
    unknown = [index for index, count in counts.items() if count is None]
    broken = [f"GPU {index}: {count:.0f}" for index, count in counts.items() if count]
    if broken:
        hint = "drain the machine and have the GPU reset or replaced"
        return Check("GPU memory errors", looked_at, "error", "; ".join(broken), hint)
    if unknown:
        return Check("GPU memory errors", looked_at, "not checked", f"GPU {', '.join(unknown)}: ECC is off or not told")
    return Check("GPU memory errors", looked_at, "ok", f"none on {len(counts)} GPUs")


def _processes(rows: list[list[str]]) -> Check:
    looked_at = "nvidia-smi --query-compute-apps"
    if rows:
        shown = "; ".join(f"{row[1]} (pid {row[0]})" for row in rows[:5])
        return Check("processes on GPUs", looked_at, "warning", f"{len(rows)} already run: {shown}", "end them first")
    return Check("processes on GPUs", looked_at, "ok", "none, as far as this container sees")


def _mib(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # [N/A], [Not Supported]
        return None
