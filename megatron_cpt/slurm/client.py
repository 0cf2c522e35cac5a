"""Slurm's own commands, called: sbatch, scancel, squeue, sinfo. Each has a timeout, each failure is one clear error.

Sites wrap these commands, for a banner or their accounting: an answer is taken from among other lines, never guessed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.errors import LaunchError
from megatron_cpt.slurm.site import Site

SECONDS = 60  # a controller that is busy answers late; one that is dead, never


def check_client(site: Site) -> None:
    """Raise LaunchError when this machine cannot submit the jobs of `site`."""
    if shutil.which("sbatch", path=site.environment.get("PATH")) is None:
        raise LaunchError(
            "sbatch is not on this machine", hint="submit from a login node of the cluster; --dry-run prints the script"
        )
    if site.partition is not None:
        known = sorted(set(call(["sinfo", "--noheader", "--all", "--format=%R"], site).split()))
        # Without an answer it is for sbatch to say.
        unknown = [name for name in site.partition.split(",") if known and name not in known]
        if unknown:
            raise LaunchError(f"the cluster has no partition {', '.join(unknown)}", hint=f"one of {', '.join(known)}")
    if site.container_image is not None and "--container-image" not in call(["srun", "--help"], site):
        raise LaunchError(
            f"CONTAINER_IMAGE={site.container_image}, and srun has no --container-image here",
            hint="ask for pyxis to be installed, or leave CONTAINER_IMAGE out to run in a virtual environment",
        )


def check_script(text: str, site: Site) -> None:
    """Raise LaunchError when Slurm would not accept the batch script `text`; nothing is submitted."""
    _sbatch(["--test-only"], site, text)


def submit_script(path: Path, site: Site, options: Sequence[str] = ()) -> str:
    """Submit the batch script. Return the id of its job.

    Raises:
        LaunchError: Slurm does not accept it, or does not say the job's id.
    """
    answer = _sbatch(["--parsable", *options, str(path)], site)
    ids = re.findall(r"^(?:Submitted batch job )?(\d+)(?:;\S+)?\s*$", answer, re.MULTILINE)
    if len(ids) != 1:
        raise LaunchError(
            f"sbatch did not say one job id, but {answer.strip()[-200:]!r}",
            hint="`squeue --me` shows whether the job is in the queue; scancel it before you submit again",
        )
    return str(ids[0])


def cancel(jobs: Sequence[str], site: Site) -> None:
    """Take jobs out of the queue.

    Raises:
        LaunchError: Slurm does not do it.
    """
    if jobs:
        call(["scancel", *jobs], site)


def jobs_of(option: str, columns: Sequence[str], site: Site, seconds: int = SECONDS) -> list[list[str]]:
    """What squeue says of the jobs that `option` selects, finished ones too: a row per job, a text per column.

    Args:
        option: `--me`, `--jobs=1,2`.
        columns: letters of squeue's `--format`; the first is `i`, the job's id, and the last may hold any text.

    Raises:
        LaunchError: squeue cannot be asked, or its answer is no list of jobs.
    """
    form = "|".join(f"%{letter}" for letter in columns)
    try:
        lines = call(["squeue", "--states=all", f"--format={form}", option], site, seconds=seconds).splitlines()
    except LaunchError as error:
        if "Invalid job id" in error.message:  # the only job is long forgotten
            return []
        raise
    # The header is asked for: it tells a queue without jobs from an answer that is none.
    header = next((number for number, line in enumerate(lines) if line.startswith("JOBID|")), len(lines))
    rows = [line.split("|", len(columns) - 1) for line in lines[header + 1 :] if line.strip()]
    if header == len(lines) or any(len(row) != len(columns) for row in rows):
        raise LaunchError(
            f"squeue did not answer with a list of jobs, but {' '.join(lines)[:200]!r}",
            hint="`which squeue` says which one it is; `squeue --me` shows what it prints",
        )
    return rows


def _sbatch(arguments: Sequence[str], site: Site, text: str | None = None) -> str:
    try:
        return call(["sbatch", *arguments], site, text)
    except LaunchError as error:
        raise LaunchError(
            f"Slurm does not accept the job: {error.message}",
            hint="`sinfo` shows partitions and nodes, `sacctmgr show user $USER withassoc` accounts; they are set in "
            "slurm/cluster.env or by the options of `megatron-cpt submit`",
        ) from error


def call(command: Sequence[str], site: Site, text: str | None = None, seconds: int = SECONDS) -> str:
    """Return what one of Slurm's commands prints; `text` is its input, `seconds` how long it may take.

    Raises:
        LaunchError: it is not there, fails, or does not answer.
    """
    try:
        done = subprocess.run(
            command,
            input=text,
            text=True,
            capture_output=True,
            check=False,
            timeout=seconds,
            env=dict(site.environment) or None,
        )
    except FileNotFoundError as error:
        raise LaunchError(f"{command[0]} is not on this machine", hint="work on a login node of the cluster") from error
    except OSError as error:
        raise LaunchError(
            f"{command[0]} cannot be called: {error.strerror}", hint=f"`which {command[0]}` says which one it is"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"{command[0]} did not answer within {seconds} seconds", hint="is the Slurm controller up? `scontrol ping`"
        ) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        words = "; ".join(line.split("error: ", 1)[-1] for line in lines[-2:])
        raise LaunchError(words, hint="`scontrol ping` says whether the controller is up")
    return done.stdout
