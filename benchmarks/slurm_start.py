"""Where the time goes from `megatron-cpt submit` to the first step of a job of 32 ranks, on a real Slurm here.

    python benchmarks/slurm_start.py [--nodes 4] [--gpus-per-node 8]

TP2 x PP2 of a model of a few thousand parameters, so that what is measured is the start and not the model. The virtual
nodes share this machine's cores, which on a cluster every rank has for itself: read the Python and torch parts as CPU
seconds of all ranks over the cores. Needs root, Debian and apt. Prints one markdown table; a few minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_cpt.runs.metrics import read_metrics
from megatron_cpt.slurm.journal import read_journal
from tests.slurm.cluster import cluster_up, why_not
from tests.slurm.conftest import Job, write_inputs


def parts_of(job: Job) -> dict[str, float]:
    """Seconds by part, in their order."""
    submitted, began = (
        next(row["time"] for row in read_journal(job.run) if row["event"] == name) for name in ("submitted", "began")
    )
    rows = list(read_metrics(job.run.metrics))
    start = next(row for row in rows if row.get("event") == "start")
    first_step = next(row["time"] for row in rows if "event" not in row)
    setup = {name.replace("_", " "): seconds for name, seconds in start["setup_seconds"].items()}
    return {
        "sbatch until the script runs": began - submitted,
        "preflight of the nodes, plan, srun": start["time"] - began - sum(setup.values()),
        **setup,
        "first step": first_step - start["time"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    asked = parser.parse_args()
    if (reason := why_not()) is not None:
        sys.exit(reason)
    layout = {"nodes": asked.nodes, "gpus_per_node": asked.gpus_per_node, "tp": 2, "pp": 2}
    with tempfile.TemporaryDirectory() as name, cluster_up(Path(name) / "c", asked.nodes) as cluster:
        (folder := Path(name) / "job").mkdir()
        job = Job(cluster, write_inputs(Path(name) / "inputs"), folder, parallel=layout, budget={"train_tokens": 1024})
        job.submit()
        assert job.ended(seconds=900) == 0, job.describe()
        parts = parts_of(job)
    ranks = asked.nodes * asked.gpus_per_node
    print(f"| start of {ranks} ranks on {asked.nodes} nodes that share {os.cpu_count()} cores | s |\n|---|---|")
    for part, seconds in (parts | {"all": sum(parts.values())}).items():
        print(f"| {part} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
