"""Run the quickstart's steps: skip what is finished, show what runs, measure time and memory.

`STATE` (steps.json in the work folder) remembers for each step a fingerprint of its command and inputs and, once it
is finished, how long it took and how much memory its processes held. A step is skipped when it is finished with
the same fingerprint and its outputs are still there. A step that was interrupted runs again as it is, and the
command itself continues where it stopped; a step whose command changed runs again from nothing, and so do all
steps after it.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from megatron_cpt.errors import CptError

SAMPLE_SECONDS = 0.2
SAMPLE_SHARE = 0.005  # of the time: reading a process's memory map stops that process for as long as it takes


@dataclass(frozen=True)
class Step:
    """One command. `outputs` are the files or folders it makes; `inputs` files whose content it depends on."""

    title: str
    command: list[str]
    outputs: list[Path]
    inputs: list[Path] = field(default_factory=list)
    stdout: Path | None = None  # where its standard output goes, when that is a result
    environment: dict[str, str] = field(default_factory=dict)


def run_steps(steps: list[Step], state_path: Path, console: Console) -> dict[str, dict[str, Any]]:
    """Run all unfinished steps in order; returns the state: title -> seconds, cpu_seconds, peak_memory_bytes, ...

    Raises:
        CptError: a command failed; the error says which and how to try again.
    """
    state: dict[str, dict[str, Any]] = json.loads(state_path.read_text()) if state_path.exists() else {}
    chain = ""
    for number, step in enumerate(steps, start=1):
        chain = _fingerprint(step, chain)
        record = state.get(step.title, {})
        heading = f"[{number}/{len(steps)}] {step.title}"
        outputs = [*step.outputs, *([step.stdout] if step.stdout else [])]
        if record.get("finished") and record["fingerprint"] == chain and all(path.exists() for path in outputs):
            console.print(f"[green]{heading}: done before, skipped[/green] ({record['seconds']:.0f} s then)")
            continue
        if record.get("fingerprint") != chain:
            _remove(outputs)
        state[step.title] = {"fingerprint": chain, "finished": False}
        _save(state, state_path)
        console.print(f"\n[bold]{heading}[/bold]\n  $ {_shown(step)}", highlight=False, soft_wrap=True)
        measured = _run(step)
        state[step.title] |= {"finished": True, **measured}
        _save(state, state_path)
        megabytes = measured["peak_memory_bytes"] / 1e6
        console.print(f"  {measured['seconds']:.1f} s, {megabytes:,.0f} MB at most", style="dim", highlight=False)
    return state


def _fingerprint(step: Step, previous: str) -> str:
    """Of the command, its input files and all steps before it."""
    digest = hashlib.sha256(previous.encode())
    digest.update(json.dumps([step.command[1:], sorted(step.environment.items())]).encode())
    for path in step.inputs:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _shown(step: Step) -> str:
    """The command as a user would type it."""
    words = step.command[2:] if step.command[1] == "-m" else step.command[1:]
    words = ["megatron-cpt", *words[1:]] if words[0] == "megatron_cpt" else ["python", *words]
    variables = [f"{name}={value}" for name, value in step.environment.items()]
    return " ".join([*variables, *words, *(["> " + str(step.stdout)] if step.stdout else [])])


def _run(step: Step) -> dict[str, float]:
    started, cpu_before = time.monotonic(), _children_cpu_seconds()
    partial = step.stdout.with_name(step.stdout.name + ".partial") if step.stdout else None
    with open(partial or os.devnull, "wb") as sink:
        process = subprocess.Popen(
            step.command, stdout=sink if partial else None, env={**os.environ, **step.environment}
        )
        try:
            peak_memory_bytes = _wait_and_measure(process)
        except KeyboardInterrupt:
            process.wait()  # the command got the interrupt too: let it stop in good order
            raise
    if process.returncode != 0:
        raise CptError(
            f"the step {step.title!r} failed with exit code {process.returncode}",
            hint="its message stands above; the same command continues here once that is fixed",
        )
    if partial and step.stdout:
        partial.rename(step.stdout)
    return {
        "seconds": round(time.monotonic() - started, 2),
        "cpu_seconds": round(_children_cpu_seconds() - cpu_before, 2),  # of all cores, whatever else they do
        "peak_memory_bytes": peak_memory_bytes,
    }


def _children_cpu_seconds() -> float:
    """User and system time of all processes that ended under this one so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _wait_and_measure(process: subprocess.Popen[bytes]) -> int:
    """Wait for `process`; the most memory that it and its descendants held at one time, shared pages once."""
    peak_bytes, finished = 0, threading.Event()

    def sample() -> None:
        nonlocal peak_bytes
        pause = SAMPLE_SECONDS
        while not finished.wait(pause):
            started = time.perf_counter()
            peak_bytes = max(peak_bytes, _tree_bytes(process.pid))
            pause = max(SAMPLE_SECONDS, (time.perf_counter() - started) / SAMPLE_SHARE)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        process.wait()
    finally:
        finished.set()
        thread.join()
    return peak_bytes


def _tree_bytes(pid: int) -> int:
    """Proportional set size of a process and its descendants; 0 when they are gone."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in family:
        try:
            memory = process.memory_full_info()
        except (psutil.Error, OSError):
            continue
        total += getattr(memory, "pss", memory.rss)
    return total


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _save(state: dict[str, dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(state, indent=2) + "\n")
    partial.rename(path)
