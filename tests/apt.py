"""Debian's packages that a test needs, installed where that is allowed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

_APT = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "-qq"]


def update() -> None:
    """Read the lists of packages again, where that is allowed."""
    if os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run([*_APT, "update"], capture_output=True, check=False)


def install(packages: Sequence[str], programs: Sequence[str]) -> str | None:
    """Install `packages` unless all `programs` are there. Return why they are not, None when they are."""
    if all(map(shutil.which, programs)):
        return None
    if os.geteuid() != 0:
        return f"{', '.join(programs)}: not installed, and only root can install them"
    if shutil.which("apt-get") is None:
        return f"{', '.join(programs)}: not installed, and this is no Debian: there is no apt-get"
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    update()
    command = [*_APT, "install", "-y", "--no-install-recommends", *packages]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    missing = [name for name in programs if shutil.which(name) is None]
    return f"apt-get could not install {', '.join(missing)}: {done.stderr[-500:]}" if missing else None
