"""What one cluster needs: `slurm/cluster.env`, the only file that a site edits.

It is a shell file, as the batch script sources it on the nodes; here the same shell says what it sets.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_cpt.errors import LaunchError

CLUSTER_ENV = "slurm/cluster.env"
_SECONDS = 30  # a profile on a hung file system must not hang a submission


@dataclass(frozen=True)
class Site:
    """Values of a cluster; None where the cluster's own default holds."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    reservation: str | None = None
    time_limit: str | None = None
    container_image: str | None = None
    cluster_env: str = CLUSTER_ENV  # as the batch script names it
    environment: Mapping[str, str] = field(default_factory=dict)  # in which sbatch is called

    def directives(self) -> list[tuple[str, str]]:
        """The options of sbatch that the site fixes."""
        named = {
            "account": self.account,
            "partition": self.partition,
            "qos": self.qos,
            "reservation": self.reservation,
        }
        return [(name, value) for name, value in named.items() if value]


def read_site(path: Path | None) -> Site:
    """The site that `path` describes; None: `slurm/cluster.env` where there is one, else the cluster's defaults.

    Raises:
        LaunchError: the file is missing, has a syntax error, or names a container image that is not there.
    """
    if path is None:
        if not Path(CLUSTER_ENV).is_file():
            return Site(environment=dict(os.environ), cluster_env=str(Path(CLUSTER_ENV).absolute()))
        path = Path(CLUSTER_ENV)
    if not path.is_file():
        raise LaunchError(
            f"{path} does not exist", hint="copy slurm/cluster.env.example to slurm/cluster.env and edit it"
        )
    values = _sourced(path)
    image = values.get("CONTAINER_IMAGE") or None
    if image is not None and image.startswith(("/", "./", "../")) and not Path(image).exists():
        raise LaunchError(
            f"CONTAINER_IMAGE={image} in {path} does not exist",
            hint="correct it, build the image (docker/), or leave CONTAINER_IMAGE out to run in a virtual environment",
        )
    return Site(
        account=values.get("SBATCH_ACCOUNT") or None,
        partition=values.get("SBATCH_PARTITION") or None,
        qos=values.get("SBATCH_QOS") or None,
        reservation=values.get("SBATCH_RESERVATION") or None,
        time_limit=values.get("SBATCH_TIMELIMIT") or None,
        container_image=image,
        cluster_env=str(path.absolute()),
        environment=values,
    )


def _sourced(path: Path) -> dict[str, str]:
    """The environment after `path` was sourced, with what it sets without exporting it."""
    checked = subprocess.run(["bash", "-n", str(path)], text=True, capture_output=True, check=False)
    if checked.returncode:
        raise LaunchError(
            f"{path} is not a shell file: {checked.stderr.strip().splitlines()[0]}",
            hint="slurm/cluster.env.example is one that works",
        )
    script = f"set -a; source {shlex.quote(str(path.absolute()))} >/dev/null; env -0"
    try:
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, check=False, timeout=_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"sourcing {path} took longer than {_SECONDS} seconds", hint="does it wait for input or a file system?"
        ) from error
    pairs = (entry.partition("=") for entry in done.stdout.decode(errors="replace").split("\0") if entry)
    return {name: value for name, _, value in pairs}
