"""What the web page costs with many long runs: start, memory, idle processor time, and the first curves in a browser.

    python benchmarks/web.py [--runs 50] [--rows 100000]

The runs are run folders without checkpoints whose metrics have this many rows (one file under many names: the server
reads each by itself). A first byte is counted from the start of the command; a page is painted when the
table, or the curve of the loss, is on it, in Debian's chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.tiny_runs import step, write_run
from tests.web.conftest import chromium
from tests.web.server import Server

MIB = 2**20
IDLE_SECONDS = 20


def row(iteration: int) -> dict[str, object]:
    """A row as a run with two sources writes it."""
    loss = 3 + 2 / iteration
    seconds: dict[str, Any] = {
        f"{part}_seconds": 0.0123 for part in ("data", "forward_backward", "optimizer", "checkpoint", "eval")
    }
    return step(
        iteration, loss=loss, loss_by_source={"domain": loss - 0.1, "general": loss + 0.1}, global_batch_size=256,
        step_seconds=1.0, tokens_per_second_per_gpu=900.0, mfu=0.41, peak_memory_gib=60.0, remaining_tokens=1_000_000,
        **seconds,
    )  # fmt: skip


def write_runs(root: Path, runs: int, rows: int) -> int:
    """Write the runs. Return the bytes of one's metrics."""
    first = write_run(root / "run-000", [row(1)])
    with (first / "metrics.jsonl").open("w") as file:
        for iteration in range(1, rows + 1):
            file.write(json.dumps(row(iteration)) + "\n")
    for number in range(1, runs):
        folder = write_run(root / f"run-{number:03}", [row(1)])
        (folder / "metrics.jsonl").unlink()
        os.link(first / "metrics.jsonl", folder / "metrics.jsonl")
    return (first / "metrics.jsonl").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--rows", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = write_runs(Path(folder) / "runs", arguments.runs, arguments.rows)
        print(f"{arguments.runs} runs of {arguments.rows:,} rows, {size / MIB:.0f} MiB each\n")
        print("| what | figure |\n| --- | --- |")
        began = time.monotonic()
        server = Server(Path(folder))
        server.request("/")
        print(f"| start to the first byte | {time.monotonic() - began:.2f} s |")
        process = psutil.Process(server.process.pid)
        print(f"| resident memory after it | {process.memory_info().rss / MIB:.0f} MiB |")
        try:
            measure(server, process)
        finally:
            server.kill()


def measure(server: Server, process: psutil.Process) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page()
        began = time.monotonic()
        page.goto(server.address)
        page.locator("#runs tbody tr").last.wait_for()
        print(f"| the table of all runs is painted | {time.monotonic() - began:.2f} s |")
        ids = [run["id"] for run in server.ask("/api/runs")]
        began = time.monotonic()
        page.goto(f"http://127.0.0.1:{server.port}/runs/{ids[0]}")
        page.locator('[data-chart="loss"] canvas').wait_for()
        print(f"| the curves of a run are painted | {time.monotonic() - began:.2f} s |")
        page.close()
        began = time.monotonic()
        for run in ids:
            server.ask(f"/api/runs/{run}/curves", {})
        print(f"| the curves of every run, one after the other | {time.monotonic() - began:.1f} s |")
        print(f"| resident memory after it | {process.memory_info().rss / MIB:.0f} MiB |")
        before = sum(process.cpu_times()[:2])
        time.sleep(IDLE_SECONDS)
        print(f"| processor while nobody looks | {(sum(process.cpu_times()[:2]) - before) / IDLE_SECONDS:.1%} |")
        page = browser.new_page()
        page.goto(server.address)
        page.locator("#runs tbody tr").last.wait_for()
        before = sum(process.cpu_times()[:2])
        time.sleep(IDLE_SECONDS)
        print(f"| while one page shows the table | {(sum(process.cpu_times()[:2]) - before) / IDLE_SECONDS:.1%} |")
        browser.close()


if __name__ == "__main__":
    main()
