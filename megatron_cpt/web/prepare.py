"""What a form would start: its YAML, the exact command, and everything that speaks against it beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.derive import broken_rules
from megatron_cpt.config.load import validate
from megatron_cpt.config.problems import Problem
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.corpus.schema import Corpus, corpus_problems
from megatron_cpt.errors import CptError
from megatron_cpt.launch.origin import run_architecture
from megatron_cpt.launch.survey import survey
from megatron_cpt.planner.hardware import DEFAULT, find_hardware
from megatron_cpt.planner.page import plan_page
from megatron_cpt.planner.plan import blocking_findings, make_plan
from megatron_cpt.planner.search import search
from megatron_cpt.web.forms import corpus_form, run_form
from megatron_cpt.web.values import Entered, tree_of, yaml_text


@dataclass(frozen=True)
class Prepared:
    """A command that could be started.

    Attributes:
        arguments: of `megatron-cpt`; `{job}` stands for the folder that the job will get.
        files: name -> content, written into that folder.
        target: what the job writes.
        problems: why it cannot be started, each beside the key it is about, as far as it is about one.
        page: what the command would say beforehand.
        layouts: of a run, the fastest that fit: overrides and tokens per second.
    """

    kind: str
    title: str
    arguments: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    target: Path | None = None
    problems: tuple[Problem, ...] = ()
    page: str = ""
    layouts: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it for the page."""
        return {
            "kind": self.kind,
            "title": self.title,
            "command": " ".join(("megatron-cpt", *self.arguments)),
            "files": dict(self.files),
            "problems": [{"path": p.path, "message": p.message, "hint": p.hint} for p in self.problems],
            "page": self.page,
            "layouts": list(self.layouts),
        }


class Allowed:
    """Folders below which a job may read and write; symbolic links are resolved first."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self.roots = tuple(root.resolve() for root in roots)

    def has(self, path: str | Path) -> bool:
        """Return whether `path` lies below one of the folders."""
        found = Path(path).resolve()
        return any(found == root or root in found.parents for root in self.roots)

    def problem(self, key: str, path: str) -> Problem | None:
        """Return what speaks against a path, None where nothing does."""
        if self.has(path):
            return None
        return Problem(
            key, path, "is outside the folders that this server may use",
            "start it with --allow FOLDER, once for each further folder",
        )  # fmt: skip


def prepare_run(
    entered: Entered, root: Path, allowed: Allowed, *, submit: bool = False, layouts: bool = False
) -> Prepared:
    """Check a run as `plan` does. Its folder is a new one below `root` unless the form names another."""
    tree, problems = tree_of(run_form(), entered)
    name = str(tree.get("job_name") or "")
    if name and "run_dir" not in tree:
        tree["run_dir"] = str(root / name)
    config, found = validate(tree)
    problems += found
    text = yaml_text(tree)
    kind = "submit" if submit else "train"
    if config is None or problems:
        return Prepared(kind, name, files={"config.yaml": text}, problems=tuple(problems))
    problems += [p for p in (allowed.problem(*item) for item in _paths_of_run(config)) if p is not None]
    if not _is_below(Path(config.folder), root):
        problems.append(Problem("run_dir", config.folder, f"is not below {root}", "leave it empty"))
    page = ""
    best: tuple[dict[str, Any], ...] = ()
    if not problems:
        arch, problems = _architecture(config)
        if arch is not None and not (problems := broken_rules(config, arch)):
            page, problems = _plan(config)
            best = _layouts(config, arch) if layouts else ()
    return Prepared(
        kind,
        config.job_name,
        (kind, "{job}/config.yaml"),
        {"config.yaml": text},
        Path(config.folder).resolve(),
        tuple(problems),
        page,
        best,
    )


def prepare_corpus(entered: Entered, allowed: Allowed) -> Prepared:
    """Check a corpus as `preprocess` does before it reads."""
    tree, problems = tree_of(corpus_form(), entered)
    files, name = {"corpus.yaml": yaml_text(tree)}, str(tree.get("output_prefix") or "")
    try:
        corpus = Corpus.model_validate(tree)
    except ValidationError as error:
        problems += corpus_problems(error, Corpus)
        return Prepared("preprocess", name, files=files, problems=tuple(problems))
    problems += [p for p in (allowed.problem(*item) for item in _paths_of_corpus(corpus)) if p is not None]
    target = Path(corpus.output_prefix).resolve()
    return Prepared("preprocess", name, ("preprocess", "{job}/corpus.yaml"), files, target, tuple(problems))


def prepare_export(run: Path, checkpoint: str, to: str, output: str, allowed: Allowed) -> Prepared:
    """Check the export of a run's newest checkpoint, or of a named one, in a format."""
    problems = []
    if to not in ("hf", "torch_dist", "legacy"):
        problems.append(Problem("to", to, "is not a format", "hf, torch_dist or legacy"))
    source = run / "checkpoints" / checkpoint if checkpoint else run
    if checkpoint and checkpoint not in {path.name for path in (run / "checkpoints").glob("iter_*")}:
        problems.append(Problem("checkpoint", checkpoint, "is not a checkpoint of this run", "choose another"))
    target = Path(output) if output else run / "export" / to
    if (problem := allowed.problem("output", str(target))) is not None:
        problems.append(problem)
    if target.exists():
        problems.append(Problem("output", str(target), "is there already", "give a folder that is not there"))
    arguments = ("convert", str(source), str(target), "--to", to)
    return Prepared("convert", f"{run.name} to {to}", arguments, target=target.resolve(), problems=tuple(problems))


def prepare_perplexity(model: Path, data: str, allowed: Allowed) -> Prepared:
    """Check the measurement of a run, a checkpoint or a model on a dataset or a text."""
    problems = []
    if not data:
        problems.append(Problem("data", None, "is missing", "the prefix of a dataset, or a text file"))
    elif (problem := allowed.problem("data", data)) is not None:
        problems.append(problem)
    arguments = ("eval", "perplexity", str(model), "--data", data)
    return Prepared("eval", f"{model.name} on {data}", arguments, problems=tuple(problems))


def _paths_of_run(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Every path that a run reads or writes, with its key."""
    if config.model.init_from != "random":
        yield "model.init_from", config.model.init_from
    if config.model.architecture is not None:
        yield "model.architecture", config.model.architecture
    for source in config.data.train:
        yield "data.train", source.prefix
    for prefix in config.data.validation.values():
        yield "data.validation", prefix
    if config.data.cache_dir is not None:
        yield "data.cache_dir", config.data.cache_dir
    yield "run_dir", config.folder


def _paths_of_corpus(corpus: Corpus) -> Iterator[tuple[str, str]]:
    yield "output_prefix", corpus.output_prefix
    yield from _named_paths(corpus.model_dump(mode="json", exclude={"output_prefix", "sources"}))
    for source in corpus.sources:
        for name in source.files:
            yield "sources", _fixed_part(name)
        for _, path in _named_paths(source.model_dump(mode="json", exclude={"files"})):
            yield "sources", path


def _named_paths(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text anywhere in a tree that names something on this machine; a refusal too many does no harm."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _named_paths(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for value in tree:
            yield from _named_paths(value, key)
    elif isinstance(tree, str) and ("/" in tree or key == "tokenizer"):
        yield key, _fixed_part(tree)


def _fixed_part(pattern: str) -> str:
    """The folder in front of the first wildcard of a glob."""
    if not any(sign in pattern for sign in "*?["):
        return pattern
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    return str(Path(*parts[:first])) if first else "."


def _architecture(config: RunConfig) -> tuple[Architecture | None, list[Problem]]:
    try:
        return run_architecture(config), []
    except CptError as error:
        key = "model.init_from" if config.model.architecture is None else "model.architecture"
        return None, [Problem(key, None, error.message, error.hint or "")]


def _plan(config: RunConfig) -> tuple[str, list[Problem]]:
    """The plan's page, and what would stop a start on this machine."""
    try:
        made = make_plan(survey(config, "the form"), find_hardware(DEFAULT))
    except CptError as error:
        return "", [Problem("", None, error.message, error.hint or "")]
    found = blocking_findings(made, strict=False)
    return plan_page(made, ""), [Problem("", None, finding.message, finding.hint or "") for finding in found]


def _layouts(config: RunConfig, arch: Architecture) -> tuple[dict[str, Any], ...]:
    found = search(config, arch, find_hardware(DEFAULT))
    return tuple(
        {"overrides": list(candidate.overrides(config)), "tokens_per_s": candidate.speed.tokens_per_s}
        for candidate in found.best
    )


def _is_below(path: Path, root: Path) -> bool:
    return root.resolve() in path.resolve().parents
