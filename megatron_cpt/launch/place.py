"""The place of this process in a job that torchrun or srun has started: their environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from megatron_cpt.errors import LaunchError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def under_launcher(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or srun has already started one process per rank."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def rank_here(environ: Mapping[str, str] = os.environ) -> int:
    return int(environ.get("RANK", "0"))


def adopt_slurm_ranks(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """torchrun's variables from srun's, for `srun --ntasks-per-node=GPUS`; empty without a job of several tasks.

    The first node of the step hosts the rendezvous, and the port follows from the job id.
    """
    if "RANK" in environ or int(environ.get("SLURM_NTASKS", "1")) < 2 or "SLURM_PROCID" not in environ:
        return {}
    adopted = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_NTASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "MASTER_PORT": environ.get("MASTER_PORT", str(20_000 + int(environ["SLURM_JOB_ID"]) % 20_000)),
    }
    nodes = next(
        (environ[n] for n in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if n in environ), ""
    )
    if address := environ.get("MASTER_ADDR") or first_host(nodes):
        adopted["MASTER_ADDR"] = address
    return adopted


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[07-09,12],login` -> `gpu07`; several brackets may follow each other."""
    first = ""
    for text, bracket in re.findall(r"([^\[\],]+)|\[([^\]]*)\]", re.split(r",(?![^\[]*\])", nodes)[0]):
        first += text or re.split(r"[-,]", bracket)[0]
    return first


def check_variables(environ: Mapping[str, str] = os.environ) -> None:
    """Raise LaunchError when the processes of a job cannot find each other."""
    if missing := [name for name in VARIABLES if name not in environ]:
        raise LaunchError(
            f"{environ.get('WORLD_SIZE')} processes were started, and {', '.join(missing)} is not set: they cannot "
            "find each other",
            hint="start them with torchrun, or set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port "
            "before srun",
        )


def check_world_size(expected: int, environ: Mapping[str, str] = os.environ) -> None:
    """Raise LaunchError when the job has another number of processes than the config's layout asks for."""
    world_size = int(environ.get("WORLD_SIZE", "1"))
    if world_size != expected:
        raise LaunchError(
            f"parallel.nodes x parallel.gpus_per_node asks for {expected} processes, "
            f"{world_size} process{'es' if world_size > 1 else ''} started",
            hint=f"start it with `torchrun --nproc-per-node N`, {expected} processes in all, or let "
            "`megatron-cpt train` start them",
        )
