"""Docs are true: generated pages are current, and every command, flag, key and path that they name exists."""

from __future__ import annotations

import ast
import difflib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from megatron_cpt.cli import COMMANDS, cli
from megatron_cpt.config.load import known_paths

REPO = Path(__file__).resolve().parents[2]
PAGES = sorted(
    p
    for p in [
        REPO / "README.md",
        REPO / "CHANGELOG.md",
        REPO / "CONTRIBUTING.md",
        REPO / "tests/README.md",
        *REPO.glob("docs/**/*.md"),
        *REPO.glob("examples/**/*.md"),
    ]
)
SCRIPTS = sorted([*REPO.glob("slurm/*.sbatch"), REPO / "Makefile"])


def test_the_pages_are_found() -> None:
    assert len(PAGES) >= 6
    assert len(SCRIPTS) >= 2


def test_generated_pages_are_current(tmp_path: Path) -> None:
    """In a process of its own, as `make docs` does: click keeps the first help option that a command made."""
    script = REPO / "docs" / "generate.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], cwd=REPO, check=True)
    generated = sorted(path.name for path in tmp_path.iterdir())
    assert len(generated) >= 4
    for name in generated:
        old, new = ((folder / name).read_text().splitlines() for folder in (REPO / "docs", tmp_path))
        difference = difflib.unified_diff(old, new, "on disk", "generated", lineterm="")
        assert not (lines := list(difference)), f"docs/{name} is out of date: make docs\n" + "\n".join(lines)


def test_every_command_is_used_in_a_guide() -> None:
    """In the README or in a page of docs/ that a person wrote."""
    guides = [page for page in PAGES if page.name not in ("cli.md", "CHANGELOG.md")]
    text = "\n".join(page.read_text() for page in guides)
    assert [name for name in COMMANDS if f"megatron-cpt {name}" not in text] == []


def test_the_tree_of_the_readme_is_the_tree() -> None:
    """It names every folder of the repository and every room of the library, and nothing else."""
    tree = (REPO / "README.md").read_text().split("## The tree")[1].split("```")[1]
    shown: set[Path] = set()
    for line in tree.strip("\n").split("\n"):
        root = {0: REPO, 2: REPO / "megatron_cpt", 4: REPO / "megatron_cpt" / "corpus"}[len(line) - len(line.lstrip())]
        shown |= {root / name for name in re.split(r"\s{2,}", line.strip())[0].split()}
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, text=True, capture_output=True, check=True).stdout.split()
    tops = {Path(name).parts for name in tracked if "/" in name and not name.startswith(".")}
    folders = {REPO / parts[0] for parts in tops}
    folders |= {REPO / Path(*parts[:2]) for parts in tops if parts[0] == "megatron_cpt" and len(parts) > 2}
    assert len(folders) > 15
    assert {path for path in shown if not path.exists()} == set()
    assert folders - shown == set()


def test_named_functions_exist() -> None:
    """`file.py:name` and `file.py:Class.name`, in every page."""
    named = {
        (page.name, file, name)
        for page in PAGES
        for file, name in re.findall(r"`([\w/]+\.py):([A-Za-z_][\w.]*)`", page.read_text())
    }
    assert len(named) > 40
    assert sorted(entry for entry in named if entry[2] not in _names_in(REPO / entry[1])) == []


def _names_in(file: Path) -> set[str]:
    """Functions, classes with their methods, and names assigned at the top of a module."""
    found: set[str] = set()
    for node in ast.parse(file.read_text()).body if file.exists() else []:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def command_lines() -> list[tuple[str, str]]:
    """Every `megatron-cpt ...` line in a code block or in backticks, with line continuations joined."""
    found = []
    for page in [*PAGES, *SCRIPTS]:
        if page.name == "cli.md":
            continue
        text = page.read_text().replace("\\\n", " ")
        blocks = re.findall(r"```.*?\n(.*?)```", text, re.DOTALL) if page.suffix == ".md" else [text]
        inline = re.findall(r"`(megatron-cpt [^`]+)`", text)
        lines = [line for block in blocks for line in block.splitlines()] + inline
        for line in lines:
            match = re.search(r"(?:^|\s|/)megatron-cpt ((?:-|[a-z]).*)$", line.split(" #")[0].strip())
            if match:
                found.append((page.relative_to(REPO).as_posix(), match.group(1)))
    return found


def test_documented_commands_and_flags_exist() -> None:
    lines = command_lines()
    assert len(lines) >= 5
    wrong = [(page, line, why) for page, line in lines if (why := _why_wrong(line))]
    assert wrong == []


def _why_wrong(line: str) -> str | None:
    try:
        words = shlex.split(re.sub(r"[|&>].*$", "", line))
    except ValueError:
        return None
    command: click.Command = cli
    while words and isinstance(command, click.Group) and words[0] in command.list_commands(click.Context(command)):
        following = command.get_command(click.Context(command), words.pop(0))
        assert following is not None
        command = following
    if command is cli and words and not words[0].startswith("-"):
        return f"no command {words[0]!r}"
    passed_on = _passed_on(command, words)
    options = {name for p in [*_params(command), *passed_on] for name in (*p.opts, *p.secondary_opts)}
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    unknown = [flag for flag in flags if flag not in options | {"--help", "--version"}]
    return f"no flag {unknown}" if unknown else None


def _passed_on(command: click.Command, words: list[str]) -> list[click.Parameter]:
    """Parameters of the command that `submit convert ...` and `submit eval ...` hand their arguments to."""
    named = command.name == "submit" and words and words[0] in ("convert", "eval")
    target = cli.get_command(click.Context(cli), words[0]) if named else None
    return _params(target) if target is not None else []


def _params(command: click.Command) -> list[click.Parameter]:
    """Parameters of a command; of a group, those of its subcommands too."""
    params = list(command.params)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            sub = command.get_command(context, name)
            params += sub.params if sub else []
    return params


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(REPO).as_posix())
def test_named_paths_and_links_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(
        r"`((?:megatron_cpt|checkpoint_convert|tools|examples|slurm|tests|docs|benchmarks)/[\w./-]*)`", text
    )
    missing = [path for path in named if not (REPO / path).exists()]
    links = [link.split("#")[0] for link in re.findall(r"\]\((?!http)([^)]+)\)", text)]
    missing += [link for link in links if link and not (page.parent / link).exists()]
    assert missing == []


def test_named_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    named = {t for page in PAGES for t in re.findall(r"`(?:[A-Z]+=\S+ )?make ([a-z-]+)", page.read_text())}
    assert named and named <= targets


def test_named_config_keys_exist() -> None:
    """`section.key` in backticks, where section is a section of the config."""
    known = set(known_paths())
    sections = {path.split(".")[0] for path in known if "." in path}
    wrong = []
    for page in PAGES:
        for key in re.findall(r"`([a-z_]+\.[a-z_.]+?)(?:[:=][^`]*)?`", page.read_text()):
            is_file = key.rsplit(".", 1)[-1] in {"py", "md", "json", "yaml", "jsonl", "bin", "idx", "toml", "txt", "sh"}
            if key.split(".")[0] in sections and not is_file and key not in known and not (REPO / key).exists():
                wrong.append((page.name, key))
    assert wrong == []


def test_nothing_names_a_developers_machine() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=REPO, text=True, capture_output=True, check=True).stdout.split("\n")
    texts = [REPO / f for f in files if f and (REPO / f).is_file()]
    assert len(texts) > 30
    words = re.compile("|".join(["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/[a-z]"]))
    hits = [str(p) for p in texts if words.search(p.read_text(errors="ignore"))]
    assert hits == []
