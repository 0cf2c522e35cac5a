"""`megatron-cpt web`: the page."""

from __future__ import annotations

from pathlib import Path

import click

from megatron_cpt.web.app import Site
from megatron_cpt.web.prepare import Allowed
from megatron_cpt.web.server import serve


@click.command()
@click.argument("root", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"))
@click.option("--port", type=click.IntRange(0, 65_535), default=8765, show_default=True, help="0 takes a free one.")
@click.option(
    "--allow",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A further folder that jobs may read and write, beside the working directory and ROOT.",
)
@click.option("--bind", default="127.0.0.1", show_default=True, help="Address to listen on; others need --token-file.")
@click.option("--token-file", type=click.Path(path_type=Path, dir_okay=False), help="File that holds the token.")
@click.option("--name", "names", multiple=True, help="A further host name by which the server may be called.")
def web(
    root: Path, port: int, allow: tuple[Path, ...], bind: str, token_file: Path | None, names: tuple[str, ...]
) -> None:
    """Show the runs below ROOT in a browser: watch, compare, prepare, start, stop, export.

    Prints the address to open, which holds a token that only you have. The page listens on this machine alone; from
    another one use a tunnel:

    \b
      ssh -L 8765:127.0.0.1:8765 HOST

    The run folders are all its state: end it and start it again at any time, runs and jobs go on.
    """
    root.mkdir(parents=True, exist_ok=True)
    site = Site(root, Allowed((Path.cwd(), root, *allow)))
    serve(site, port=port, bind=bind, token_file=token_file, names=names, say=click.echo)
