"""Write the reference pages of docs/ from the code: config.md, config.schema.json, corpus-reference.md, cli.md.

`make docs` runs it; a test fails when a page differs from what this writes.
"""

from __future__ import annotations

import json
import sys
import types
import typing
from pathlib import Path

import click
import pydantic

from megatron_cpt.cli import COMMANDS, cli
from megatron_cpt.config.load import ALIASES, WITHOUT_MEANING
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.section import Section
from megatron_cpt.corpus import schema as corpus_schema
from megatron_cpt.corpus import schema_processing as processing

CORPUS_SECTIONS: list[type[pydantic.BaseModel]] = [corpus_schema.Corpus, corpus_schema.Source, corpus_schema.Chunking]
CORPUS_SECTIONS += [processing.Clean, processing.Filters, processing.Language, processing.GopherQuality]
CORPUS_SECTIONS += [processing.GopherRepetition, processing.FineWeb, processing.CodeQuality]
CORPUS_SECTIONS += [processing.Perplexity, processing.Dedup, processing.Passages, processing.Near]
CORPUS_SECTIONS += [processing.Decontaminate]

DOCS = Path(__file__).resolve().parent
NOTE = "<!-- written by docs/generate.py (make docs); edit the code instead -->\n"


def config_page() -> str:
    lines = [
        NOTE,
        "# The run's config\n",
        "One YAML file is one run. Precedence: defaults, then the file, then `key.sub=value` on the command line. "
        "Counts of tokens may be written `1_638_400`, `100M` or `1.5B`; an interval is `100M tokens` or "
        "`1000 iters`, always with its unit. Unknown keys are errors.\n",
    ]
    top = {n: f for n, f in RunConfig.model_fields.items() if _section(f) is None}
    lines += ["## Top level\n", *_table(top), ""]
    for name, field in RunConfig.model_fields.items():
        section = _section(field)
        if section is not None:
            lines += [f"## {name}\n", (section.__doc__ or "").strip() + "\n", *_table(section.model_fields, name), ""]
            for sub in _list_items(section):
                lines += [f"Each item of `{name}.{sub[0]}`:\n", *_table(sub[1].model_fields), ""]
    lines += ["## Aliases\n", "Other names that are accepted at the top level.\n", "| alias | key |", "| --- | --- |"]
    lines += [
        f"| `{alias}` | `{path}`{' (iterations)' if alias == 'save_interval' else ''} |"
        for alias, path in ALIASES.items()
    ]
    lines += [f"| `{name}` | none: {why} |" for name, why in WITHOUT_MEANING.items()]
    return "\n".join(lines) + "\n"


def _section(field: pydantic.fields.FieldInfo) -> type[Section] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _list_items(section: type[Section]) -> list[tuple[str, type[Section]]]:
    return [
        (name, arg)
        for name, field in section.model_fields.items()
        for arg in typing.get_args(field.annotation)
        if isinstance(arg, type) and issubclass(arg, Section)
    ]


def _table(fields: dict[str, pydantic.fields.FieldInfo], prefix: str = "") -> list[str]:
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields.items():
        key = f"{prefix}.{name}" if prefix else name
        rows.append(f"| `{key}` | {_type(field)} | {_default(field)} | {field.description} |")
    return rows


def _type(field: pydantic.fields.FieldInfo) -> str:
    return _type_name(field.annotation, tuple(field.metadata)).replace("|", "\\|")


def _type_name(kind: typing.Any, metadata: tuple[typing.Any, ...] = ()) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _type_name(args[0])
    if origin is typing.Literal:
        return " | ".join(f"`{arg}`" for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(arg) for arg in args if arg is not type(None))
    if origin in (tuple, list):
        return "list of " + _type_name(args[0])
    if origin is dict:
        return f"{_type_name(args[0])} to {_type_name(args[1])}"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", "Interval": "interval"}
    return names.get(kind) or names.get(getattr(kind, "__name__", "")) or str(getattr(kind, "__name__", kind))


def _default(field: pydantic.fields.FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value is None or value in ((), {}) or isinstance(value, pydantic.BaseModel) else f"`{value}`"


def cli_page() -> str:
    lines = [NOTE, "# Commands\n", "```\n" + _help(cli, ["megatron-cpt"]) + "\n```\n"]
    for name in COMMANDS:
        lines += _command_pages(_get(cli, name), ["megatron-cpt", name])
    return "\n".join(lines)


def _get(group: click.Group, name: str) -> click.Command:
    command = group.get_command(click.Context(group), name)
    assert command is not None, name
    return command


def _command_pages(command: click.Command, path: list[str]) -> list[str]:
    pages = [f"## {' '.join(path)}\n", "```\n" + _help(command, path) + "\n```\n"]
    if isinstance(command, click.Group):
        for sub in command.list_commands(click.Context(command)):
            pages += _command_pages(_get(command, sub), [*path, sub])
    return pages


def _help(command: click.Command, path: list[str]) -> str:
    context = click.Context(
        command,
        info_name=" ".join(path),
        terminal_width=110,
        max_content_width=110,
        help_option_names=cli.context_settings["help_option_names"],  # as subcommands inherit it when they run
    )
    return command.get_help(context).rstrip()


def corpus_page() -> str:
    lines = [
        NOTE,
        "# Keys of a corpus.yaml\n",
        "The [guide](corpus.md) says what they are for. `true` switches a group of rules on with its defaults. "
        "Unknown keys are errors.\n",
    ]
    for section in CORPUS_SECTIONS:
        lines += [f"## {section.__name__}\n", (section.__doc__ or "").strip() + "\n", *_table(section.model_fields), ""]
    return "\n".join(lines)


def config_schema() -> str:
    """JSON Schema of a run's config, aliases included, for editors."""
    schema = RunConfig.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "megatron-cpt run", **schema}
    schema["title"] = "A run of megatron-cpt"
    properties = schema["properties"]
    for alias, path in ALIASES.items():
        section, key = path.split(".")
        reference = properties[section].get("$ref") or properties[section]["allOf"][0]["$ref"]
        target = schema["$defs"][reference.rsplit("/", 1)[-1]]["properties"][key]
        properties[alias] = {k: v for k, v in target.items() if k not in ("default", "title")}
        properties[alias]["description"] = f"Another name of {path}."
    properties["save_interval"] = {"type": ["integer", "string"], "description": "Iterations between saves."}
    properties |= {name: {"description": f"Accepted without effect: {why}."} for name, why in WITHOUT_MEANING.items()}
    return json.dumps(schema, indent=1, default=str) + "\n"


PAGES = {
    "config.md": config_page,
    "cli.md": cli_page,
    "corpus-reference.md": corpus_page,
    "config.schema.json": config_schema,
}


def main(folder: Path = DOCS) -> None:
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
