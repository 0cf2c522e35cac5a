"""The `megatron-cpt` command: one table of subcommands, each imported only when it is called.

Data goes to stdout, logs and errors to stderr. Exit 0 done, 1 failed, 2 user error.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import NamedTuple, NoReturn

import click

from megatron_cpt import __version__
from megatron_cpt.config.problems import near_match
from megatron_cpt.console import ConsoleHandler, guarded_output
from megatron_cpt.errors import CptError

log = logging.getLogger(__name__)

COMPLETION = "_MEGATRON_CPT_COMPLETE"  # set by a shell that asks for completions: docs/install.md


class Entry(NamedTuple):
    """A subcommand: the section of `--help` that it stands in, its function, and one line of help.

    The help stands here so that `--help` imports no command.
    """

    section: str
    function: str  # module:function
    help: str


_COMMANDS = "megatron_cpt.commands"
COMMANDS: dict[str, Entry] = {
    "init": Entry("Setup", f"{_COMMANDS}.init:init", "Write a commented config.yaml and corpus.yaml for a model."),
    "env": Entry("Setup", f"{_COMMANDS}.env:env", "Show versions, devices, what is available and what is missing."),
    "doctor": Entry("Setup", f"{_COMMANDS}.doctor:doctor", "Check the machine, the data and the model before a job."),
    "preprocess": Entry("Data", f"{_COMMANDS}.preprocess:preprocess", "Tokenise raw text into .bin/.idx datasets."),
    "inspect": Entry("Data", f"{_COMMANDS}.dataset:inspect", "Show a dataset's manifest, statistics and documents."),
    "verify": Entry("Data", f"{_COMMANDS}.dataset:verify", "Prove a dataset sound in one pass."),
    "adopt": Entry("Data", f"{_COMMANDS}.adopt:adopt", "Prove a dataset of another tool and write its manifest."),
    "merge": Entry("Data", f"{_COMMANDS}.dataset:merge", "Join datasets of one tokenizer into one."),
    "split": Entry("Data", f"{_COMMANDS}.dataset:split", "Split a dataset by document."),
    "dedup": Entry("Data", f"{_COMMANDS}.dataset:dedup", "Join datasets without duplicate documents."),
    "plan": Entry("Run", f"{_COMMANDS}.plan:plan", "Check a config and print what follows from its token budget."),
    "dry-run": Entry("Run", f"{_COMMANDS}.dry_run:dry_run_command", "Build every rank of a config on one CPU."),
    "index": Entry("Run", f"{_COMMANDS}.index:index", "Build a run's data indices before its job starts."),
    "fisher": Entry("Run", f"{_COMMANDS}.fisher:fisher", "Estimate how much each weight matters, for forgetting.ewc."),
    "recipe": Entry("Run", f"{_COMMANDS}.recipe:recipe", "Propose rate, replay, schedule and more, with evidence."),
    "ewc-pilot": Entry("Run", f"{_COMMANDS}.ewc_pilot:ewc_pilot", "Choose forgetting.ewc.strength by short runs."),
    "kl-targets": Entry("Run", f"{_COMMANDS}.kl_targets:kl_targets", "Store what the base says, for forgetting.kl."),
    "train": Entry("Run", f"{_COMMANDS}.train:train", "Start or continue the run that a config describes."),
    "submit": Entry("Run", f"{_COMMANDS}.submit:submit", "Submit a run, corpus, conversion or evaluation to Slurm."),
    "status": Entry("Run", f"{_COMMANDS}.status:status", "Show where a run stands: tokens, rate, time left, errors."),
    "runs": Entry("Run", f"{_COMMANDS}.runs:runs", "List runs, compare them, and show how their configs differ."),
    "report": Entry("Run", f"{_COMMANDS}.report:report", "Write one page on what a run gained, lost and cost."),
    "checkpoints": Entry("Run", f"{_COMMANDS}.checkpoints:checkpoints", "List, verify and prune a run's checkpoints."),
    "web": Entry("Run", f"{_COMMANDS}.web:web", "Show runs in a browser: watch, compare, start, stop, export."),
    "eval": Entry("Model", f"{_COMMANDS}.eval:eval_group", "Measure a model: perplexity, downstream tasks."),
    "chat": Entry("Model", f"{_COMMANDS}.chat:chat", "Talk to a run's model, beside the one it came from."),
    "generate": Entry("Model", f"{_COMMANDS}.chat:generate", "Continue one prompt with a run's model."),
    "merge-lora": Entry("Model", f"{_COMMANDS}.merge_lora:merge_lora", "Add LoRA adapters to their base model."),
    "interpolate": Entry(
        "Model", f"{_COMMANDS}.interpolate:interpolate", "Mix a trained model with its base, weight by weight."
    ),
    "convert": Entry("Model", f"{_COMMANDS}.convert:convert", "Convert checkpoints between Hugging Face and Megatron."),
    "compare": Entry("Model", f"{_COMMANDS}.compare:compare", "Prove that two checkpoints are the same model."),
}


class LazyGroup(click.Group):
    """A click group that imports a subcommand's module when the subcommand is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name].function.split(":")
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
        """The commands by section, in the order of the table, with their texts in one column over all sections."""
        width = max(map(len, COMMANDS))
        for section in dict.fromkeys(entry.section for entry in COMMANDS.values()):
            with formatter.section(section):
                formatter.write_dl(
                    [(name.ljust(width), entry.help) for name, entry in COMMANDS.items() if entry.section == section]
                )


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
    log_to_console(logging.DEBUG if verbose else logging.INFO)


def log_to_console(level: int = logging.INFO) -> None:
    """Show log records on stderr, each with its level."""
    handler = ConsoleHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def run(command: click.Command, argv: list[str] | None = None, prog: str | None = None) -> NoReturn:
    """Run a click command with this project's conventions for errors and exit codes; never returns.

    A reader who leaves (`| head`) changes nothing; any other failure to write what was asked for is exit 1.
    """
    if COMPLETION in os.environ:  # click answers a shell in bytes, which the guard does not take
        sys.exit(_run(command, argv, prog))
    with guarded_output() as stdout:
        code = _run(command, argv, prog)
        stdout.flush()
        if stdout.failure is not None and not stdout.may_fail:
            click.echo(f"error: the output could not be written: {stdout.failure}", err=True)
            code = code or 1
    sys.exit(code)


def _run(command: click.Command, argv: list[str] | None, prog: str | None) -> int:
    """Run the command and print its error, if any. Return the exit code."""
    try:
        result = command.main(args=argv, prog_name=prog, standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Abort:
        click.echo("aborted", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return 2
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "megatron_cpt", "checkpoint_convert"):
            raise
        log.debug("details", exc_info=True)
        click.echo(f"error: the Python package {missing} is not installed in {sys.prefix}", err=True)
        click.echo("hint: make setup completes a half-installed environment; megatron-cpt env shows the rest", err=True)
        return 1
    except CptError as error:
        log.debug("details", exc_info=True)
        click.echo(f"error: {error.message}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        return error.exit_code


def main() -> NoReturn:
    run(cli, prog="megatron-cpt")
