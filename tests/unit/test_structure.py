"""The tree is the architecture: who may import whom, no circles, and what needs neither torch nor Megatron-Core."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("megatron_cpt", "checkpoint_convert")

# From the ground up. A room imports from the lines above its own, never from its own line or from below.
LAYERS = (
    ("errors",),
    ("budget", "durable", "console"),
    ("architecture",),
    ("config",),
    ("corpus", "runs", "presets"),
    ("checkpoint_convert",),
    ("data", "report"),
    ("launch",),
    ("planner", "slurm"),
    ("runtime",),
    ("model",),
    ("forgetting", "peft"),
    ("train",),
    ("doctor", "dry_run", "eval", "web"),
    ("chat",),
    ("commands",),
    ("cli",),
)
# The same for the rooms and files of megatron_cpt/corpus.
CORPUS_LAYERS = (
    ("arrays", "workers", "staging", "schema_processing"),
    ("documents", "schema"),
    ("readers", "tokenizers"),
    ("dataset",),
    ("filters", "dedup"),
    ("run",),
)

# They start the program; nothing that is imported may depend on them.
ENTRY_SCRIPTS = {"megatron_cpt.__main__", "checkpoint_convert.__main__"}

# These answer on a login node, where neither is installed; `data` only in the modules that `launch` needs.
WITHOUT_TORCH = (
    "errors",
    "budget",
    "durable",
    "architecture",
    "config",
    "corpus",
    "runs",
    "presets",
    "launch",
    "planner",
    "slurm",
    "report",
    "web",
    "cli",
)

# Imports that are known to point upward or to close a circle, until their owner has turned them round.
TO_BE_REMOVED: set[tuple[str, str]] = set()


class Edge(NamedTuple):
    importer: str
    imported: str


def modules(root: Path, packages: Iterable[str] = PACKAGES) -> dict[str, Path]:
    """The dotted name and the file of every module below `root/package`."""
    files = (file for package in packages for file in sorted((root / package).rglob("*.py")))
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def import_edges(files: dict[str, Path]) -> set[Edge]:
    """Which of our modules imports which other, at any depth: inside functions and for types only too."""
    return {
        Edge(importer, imported)
        for importer, file in files.items()
        for name in _imported_names(file)
        if (imported := _module_of(name, files)) not in {None, importer}
    }


def _imported_names(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write the full name of the module"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _module_of(name: str, files: dict[str, Path]) -> str | None:
    """`a.b.c` is the module a.b.c, or the name c of the module a.b."""
    return next((known for known in (name, name.rpartition(".")[0]) if known in files), None)


def circle(edges: Iterable[Edge]) -> list[str]:
    """Modules that import each other in a ring, or nothing."""
    graph: dict[str, set[str]] = {}
    for importer, imported in edges:
        graph.setdefault(importer, set()).add(imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def room(module: str) -> str:
    """`config` of megatron_cpt.config.load; checkpoint_convert is one room."""
    package, *rest = module.split(".")
    return rest[0] if package == "megatron_cpt" and rest else package


def upward(edges: Iterable[Edge]) -> list[Edge]:
    """Imports between rooms that LAYERS does not allow."""
    height = {name: number for number, names in enumerate(LAYERS) for name in names}
    return sorted(
        edge
        for edge in edges
        if (low := room(edge.imported)) != (high := room(edge.importer))
        and edge.importer not in ENTRY_SCRIPTS
        and "megatron_cpt" not in {low, high}  # its version number; the names that it offers are looked up late
        and height[low] >= height[high]
    )


@pytest.fixture(scope="module")
def edges() -> set[Edge]:
    files = modules(REPO)
    assert len(files) > 150
    found = import_edges(files)
    assert len(found) > 500
    return {edge for edge in found if edge.importer != "megatron_cpt" and edge not in TO_BE_REMOVED}


def test_every_room_has_a_place_among_the_layers() -> None:
    rooms = {room(module) for module in modules(REPO)} - {"megatron_cpt", "__main__"}
    assert rooms - {name for names in LAYERS for name in names} == set()


def test_imports_never_point_upward(edges: set[Edge]) -> None:
    assert upward(edges) == []


def test_the_rooms_of_the_corpus_have_one_direction(edges: set[Edge]) -> None:
    height = {name: number for number, names in enumerate(CORPUS_LAYERS) for name in names}
    inside = [(e, e.importer.split(".")[2], e.imported.split(".")[2]) for e in edges if _both_in_corpus(e)]
    assert len(inside) > 100
    assert [edge for edge, high, low in inside if high != low and height[low] >= height[high]] == []


def _both_in_corpus(edge: Edge) -> bool:
    return all(name.startswith("megatron_cpt.corpus.") for name in edge)


def test_no_modules_import_each_other_in_a_circle(edges: set[Edge]) -> None:
    assert circle(edges) == []


def test_nothing_imports_the_commands_but_the_command_line(edges: set[Edge]) -> None:
    allowed = {"megatron_cpt.cli", *ENTRY_SCRIPTS}
    importers = {importer for importer, imported in edges if room(imported) == "commands"}
    assert {name for name in importers - allowed if room(name) != "commands"} == set()


def test_a_planted_circle_and_a_planted_upward_import_are_found(tmp_path: Path) -> None:
    planted = {
        "budget.py": "import megatron_cpt.errors\n",
        "config/load.py": "def late():\n    from megatron_cpt.config import derive\n",
        "config/derive.py": "from megatron_cpt.config.load import read_yaml\n",
        "errors.py": "from megatron_cpt.train import loop\n",
        "train/loop.py": "from megatron_cpt.budget import Interval\n",
    }
    for name, text in planted.items():
        file = tmp_path / "megatron_cpt" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    edges = import_edges(modules(tmp_path))
    assert len(edges) == len(planted)
    assert upward(edges) == [("megatron_cpt.errors", "megatron_cpt.train.loop")]
    of_config = {edge for edge in edges if room(edge.importer) == "config"}
    assert set(circle(of_config)) == {"megatron_cpt.config.load", "megatron_cpt.config.derive"}
    assert circle(edges - of_config - {edge for edge in edges if edge.importer == "megatron_cpt.errors"}) == []


def test_what_a_login_node_needs_imports_neither_torch_nor_megatron() -> None:
    wanted = [name for name in modules(REPO) if room(name) in WITHOUT_TORCH]
    assert len(wanted) > 60
    script = (
        "import importlib, sys\n"
        "for name in ('torch', 'megatron', 'transformers'): sys.modules[name] = None\n"
        f"for name in {wanted!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_folders_of_unit_tests_mirror_the_tree() -> None:
    elsewhere = {"convert": "checkpoint_convert", "quickstart": "examples/quickstart", "tools": "tools"}
    folders = [
        folder.relative_to(REPO / "tests/unit").as_posix()
        for folder in (REPO / "tests/unit").rglob("*")
        if folder.is_dir() and any(folder.glob("test_*.py"))
    ]
    assert len(folders) > 10
    assert [name for name in folders if not (REPO / elsewhere.get(name, f"megatron_cpt/{name}")).is_dir()] == []
