"""`megatron-cpt chat` and `megatron-cpt generate`: talk to a run's model, and to the one it came from."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from megatron_cpt.errors import ConfigError, CptError

if TYPE_CHECKING:
    from megatron_cpt.chat.session import Session

_FOLDER = click.Path(path_type=Path)
_SAMPLING: tuple[Callable[..., Any], ...] = (
    click.option("--temperature", default="0.7", show_default=True, help="0 takes the likeliest token each time."),
    click.option("--top-p", default="0.95", show_default=True, help="Draw among the likeliest that sum up to this."),
    click.option("--max-tokens", default="256", show_default=True, help="Of an answer."),
    click.option("--seed", default="1234", show_default=True, help="The same seed gives the same text."),
)


def _with_sampling(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_SAMPLING):
        command = option(command)
    return command


@click.command()
@click.argument("place", metavar="RUN|DIR", type=_FOLDER)
@click.option("--base", type=_FOLDER, metavar="DIR", help="The model before training.  [default: where the run says]")
@click.option("--compare", is_flag=True, help="Both models answer, side by side, as /compare.")
@click.option("--chat-template", is_flag=True, help="Talk in turns by the tokenizer's template, as /set chat on.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Answer this and leave; may be given often.")
@click.option("--prompts", "file", type=_FOLDER, metavar="FILE", help='Answer each line, or each "prompt" of a .jsonl.')
@click.option("--json", "as_json", is_flag=True, help="One JSON object per prompt on stdout, nothing else.")
@_with_sampling
def chat(
    place: Path,
    base: Path | None,
    compare: bool,
    chat_template: bool,
    prompts: tuple[str, ...],
    file: Path | None,
    as_json: bool,
    **sampling: str,
) -> None:
    """Talk to the model of a run, and to the one it was trained from.

    RUN's checkpoints and exports are found by themselves; a checkpoint is exported first. DIR is an export, any Hugging
    Face folder, or a folder of adapters, which are not merged. A line is a text that the model continues; /help lists
    the commands. Without a terminal, each line of standard input is a prompt.

    \b
      megatron-cpt chat runs/medical --compare
      megatron-cpt chat runs/medical --prompts questions.txt --compare --json > answers.jsonl
    """
    waiting = [*prompts, *(_prompts_of(file) if file is not None else [])]
    session = _session(place, base, sampling, quiet=as_json, compare=compare, chat=chat_template)
    if waiting or file is not None or not sys.stdin.isatty():
        given = waiting if waiting or file is not None else (line.rstrip("\n") for line in sys.stdin)
        for prompt in given:
            _answer(session, prompt, as_json=as_json)
        return
    if as_json:
        raise click.UsageError("--json is for --prompt, --prompts or a pipe")
    _converse(session)


@click.command()
@click.argument("place", metavar="RUN|DIR", type=_FOLDER)
@click.argument("prompt")
@click.option("--base", type=_FOLDER, metavar="DIR", help="Of adapters, their base model.  [default: where they say]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
@_with_sampling
def generate(place: Path, prompt: str, base: Path | None, as_json: bool, **sampling: str) -> None:
    """Continue PROMPT with the model of a run or a folder; `-` reads it from standard input.

    \b
      megatron-cpt generate runs/medical "Multicystic kidney dysplasia is characterized by" --temperature 0
    """
    session = _session(place, base, sampling, quiet=as_json)
    _answer(session, sys.stdin.read().rstrip("\n") if prompt == "-" else prompt, as_json=as_json)


def _session(
    place: Path, base: Path | None, given: dict[str, str], *, quiet: bool, compare: bool = False, chat: bool = False
) -> Session:
    from megatron_cpt.chat.session import Session, setting
    from megatron_cpt.chat.speaker import Sampling, load_speaker
    from megatron_cpt.chat.voices import find_voices

    sampling = Sampling(**{name: setting(name, text) for name, text in given.items()})  # type: ignore[arg-type]
    console = Console(quiet=quiet, soft_wrap=not sys.stdout.isatty())
    return Session(find_voices(place, base), load_speaker, console, sampling, compare, chat)


def _answer(session: Session, prompt: str, *, as_json: bool) -> None:
    exchange = session.ask(prompt)
    if as_json:
        click.echo(json.dumps(exchange.to_json(), ensure_ascii=False))
    if any(answer.ended_by == "interrupt" for answer in exchange.answers.values()):
        raise KeyboardInterrupt


def _prompts_of(file: Path) -> Iterator[str]:
    """The lines of a text file, or what `prompt` holds in each line of a .jsonl."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}", hint="--prompts names a text file of UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            yield line
            continue
        try:
            yield str(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file}:{number}: no prompt: {error}", hint='a line is {"prompt": "..."}; plain lines in a .txt'
            ) from error


def _converse(session: Session) -> None:
    from megatron_cpt.chat.session import said

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lines may be edited and called back
    names = ", ".join(voice.name for voice in session.voices)
    session.console.print(f"{names}\n/help lists the commands; a line of text is continued.", highlight=False)
    while True:
        try:
            if not session.handle(input("> ")):
                return
        except KeyboardInterrupt:
            session.console.print("\n/quit leaves", style="dim")
        except EOFError:
            session.console.print()
            return
        except CptError as error:
            session.console.print(said(error), markup=False, highlight=False)
