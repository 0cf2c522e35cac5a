"""Where the ranks will meet: the host name resolves, and the port is free."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from megatron_cpt.doctor.check import Check
from megatron_cpt.launch.place import under_launcher


def check_meeting_place(environ: Mapping[str, str] = os.environ) -> Check:
    """Check MASTER_ADDR and MASTER_PORT as a process that would listen there; call it before the ranks meet."""
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    looked_at = f"MASTER_ADDR={address or '-'}, MASTER_PORT={port or '-'}"
    if port is None:
        return Check("meeting place", looked_at, "not checked", "MASTER_PORT is not set: the launcher chooses a port")
    if not port.isdigit() or not 0 < int(port) < 65_536:
        return Check("meeting place", looked_at, "error", f"{port!r} is no port", "set MASTER_PORT to 1024 to 65535")
    try:
        socket.getaddrinfo(address or "localhost", int(port))
    except OSError as error:
        detail = f"{address} does not resolve here: {error.strerror}"
        return Check("meeting place", looked_at, "error", detail, "set MASTER_ADDR to a name that every node knows")
    if under_launcher(environ) and (
        environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or environ.get("RANK") != "0"
    ):
        return Check(
            "meeting place", looked_at, "ok", "the address resolves; the port is held by rank 0 or its launcher"
        )
    try:
        with socket.create_server(("", int(port))):
            pass
    except OSError as error:
        detail = f"port {port} cannot be listened on: {error.strerror}"
        return Check("meeting place", looked_at, "error", detail, "set MASTER_PORT to a free port")
    return Check("meeting place", looked_at, "ok", "the address resolves and the port is free on this machine")
