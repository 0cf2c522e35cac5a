"""Starts the server: where it listens, who gets its token, and what it says."""

from __future__ import annotations

import ipaddress
import logging
import secrets
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from megatron_cpt.errors import LaunchError
from megatron_cpt.web.app import Site, make_app

logger = logging.getLogger(__name__)

MOST_CONNECTIONS = 200
_SHORTEST_TOKEN = 16


def serve(
    site: Site, *, port: int, bind: str, token_file: Path | None, names: tuple[str, ...], say: Callable[[str], None]
) -> None:
    """Serve `site` until the process is told to stop.

    Args:
        site: what to serve.
        port: to listen on; 0 takes a free one.
        bind: address to listen on; another than this machine's own needs `token_file`.
        token_file: holds the token; without it a random one is made.
        names: further names by which the server may be called.
        say: prints a line for the person who started it.

    Raises:
        LaunchError: the port is in use, the address is not ours, or it is not safe to listen there.
    """
    token = _token(token_file, bind)
    with _listen(bind, port) as listening:
        port = listening.getsockname()[1]
        hosts = ("127.0.0.1", "localhost", "[::1]", bind, *names)
        app = make_app(site, token=token, port=port, hosts=hosts)
        shown = "127.0.0.1" if _is_everywhere(bind) else f"[{bind}]" if ":" in bind else bind
        say(f"http://{shown}:{port}/?token={token}" if token_file is None else f"http://{shown}:{port}/?token=...")
        say(f"runs below {site.root}; Ctrl-C ends the page, not the runs and jobs that it started")
        config = uvicorn.Config(
            app,
            log_level="warning",
            lifespan="off",
            ws="none",
            http="h11",  # the same parser and loop whatever other packages bring
            loop="asyncio",
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
            limit_concurrency=MOST_CONNECTIONS,
        )
        uvicorn.Server(config).run(sockets=[listening])


def _token(path: Path | None, bind: str) -> str:
    if path is None:
        if not _is_own(bind):
            raise LaunchError(
                f"refusing to listen on {bind}: anyone who reaches it could start jobs as you",
                hint="keep the default and use a tunnel (ssh -L 8765:127.0.0.1:8765 HOST), or give --token-file FILE",
            )
        return secrets.token_urlsafe(24)
    try:
        token = path.read_text(encoding="utf-8").strip()
        mode = path.stat().st_mode & 0o077
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"cannot read the token in {path}: {error}", hint="a file with one line of text") from error
    if mode:
        raise LaunchError(f"{path} can be read by others", hint=f"chmod 600 {path}")
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise LaunchError(
            f"the token in {path} is not {_SHORTEST_TOKEN} or more printable characters without a space",
            hint="python -c 'import secrets; print(secrets.token_urlsafe(24))' prints one",
        )
    return token


def _listen(bind: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((bind, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise LaunchError(
            f"cannot listen on {bind}:{port}: {error.strerror}",
            hint="is it started already? --port 0 takes a free port",
        ) from error
    return listening


def _is_own(bind: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(bind).is_loopback
    except ValueError:
        return bind == "localhost"


def _is_everywhere(bind: str) -> bool:
    try:
        return ipaddress.ip_address(bind).is_unspecified
    except ValueError:
        return False
