"""The `megatron-cpt` command: one table of subcommands, each imported only when it is called.

Data goes to stdout, logs and errors to stderr. Exit 0 done, 1 failed, 2 user error.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import NoReturn

import click

from megatron_cpt import __version__
from megatron_cpt.config.problems import near_match
from megatron_cpt.errors import CptError

# name -> (module:function, one line of help). The help stands here so that `--help` imports no command.
COMMANDS: dict[str, tuple[str, str]] = {
    "preprocess": (
        "megatron_cpt.commands.preprocess:preprocess",
        "Tokenise raw text into .bin/.idx datasets.",
    ),
    "inspect": (
        "megatron_cpt.commands.dataset:inspect",
        "Show a dataset's manifest, statistics and documents.",
    ),
    "verify": ("megatron_cpt.commands.dataset:verify", "Prove a dataset sound in one pass."),
    "merge": ("megatron_cpt.commands.dataset:merge", "Join datasets of one tokenizer into one."),
    "split": ("megatron_cpt.commands.dataset:split", "Split a dataset by document."),
    "dedup": ("megatron_cpt.commands.dataset:dedup", "Join datasets without duplicate documents."),
    "plan": (
        "megatron_cpt.commands.plan:plan",
        "Validate a config and print what it derives from the token budget.",
    ),
    "train": ("megatron_cpt.commands.train:train", "Start or continue the run that a config describes."),
    "status": ("megatron_cpt.commands.status:status", "Show where a run stands: tokens, rate, time left, errors."),
    "checkpoints": (
        "megatron_cpt.commands.checkpoints:checkpoints",
        "List, verify and prune a run's checkpoints.",
    ),
    "index": ("megatron_cpt.commands.index:index", "Build a run's data indices before its job starts."),
    "eval": ("megatron_cpt.commands.eval:eval_group", "Measure a model: perplexity on a dataset or text."),
    "convert": (
        "megatron_cpt.commands.convert:convert",
        "Convert checkpoints between Hugging Face and Megatron.",
    ),
}


class LazyGroup(click.Group):
    """A click group that imports a subcommand's module when the subcommand is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), function)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            near = near_match(args[0], COMMANDS)
            hint = f"did you mean {near!r}?" if near else "megatron-cpt --help lists the commands"
            raise click.UsageError(f"no command {args[0]!r}\nhint: {hint}", ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="megatron-cpt")
@click.option("-v", "--verbose", is_flag=True, help="Log more, and show tracebacks of expected errors.")
def cli(verbose: bool) -> None:
    """Continued pre-training of large language models on Megatron-Core.

    \b
    The main job, in order:
      megatron-cpt preprocess --input corpus.jsonl --output-prefix data/corpus --tokenizer MODEL_DIR
      megatron-cpt plan config.yaml
      megatron-cpt train config.yaml
      megatron-cpt convert runs/JOB export/JOB --to hf
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        stream=sys.stderr,
        format="%(levelname)s %(message)s",
    )


def run(command: click.Command, argv: list[str] | None = None, prog: str | None = None) -> NoReturn:
    """Run a click command with this project's conventions for errors and exit codes; never returns."""
    try:
        result = command.main(args=argv, prog_name=prog, standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        click.echo("aborted", err=True)
        code = 130
    except click.ClickException as error:
        error.show()
        code = 2
    except CptError as error:
        if "-v" in sys.argv or "--verbose" in sys.argv:
            logging.getLogger(__name__).exception("details")
        click.echo(f"error: {error.message}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        code = error.exit_code
    sys.exit(code)


def main() -> NoReturn:
    run(cli, prog="megatron-cpt")
