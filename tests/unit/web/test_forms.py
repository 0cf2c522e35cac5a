"""Forms from the schemas: every key has an input, and what is entered becomes the file that one would write."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cpt.config.load import build_config, known_paths, validate
from megatron_cpt.config.yaml_file import read_yaml
from megatron_cpt.runs.folder import resolved_dict
from megatron_cpt.web.forms import corpus_form, run_form
from megatron_cpt.web.values import entered_of, tree_of

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*/config.yaml"))


def test_every_key_of_a_run_is_in_the_form_once_with_its_description() -> None:
    fields = [field for section in run_form() for field in section.fields]
    paths = [field.path for field in fields]
    assert len(set(paths)) == len(paths) > 60
    columns = {f"{field.path}.{column}" for field in fields for column in field.columns}
    leaves = {path for path in known_paths() if "." in path or path in ("job_name", "run_dir", "seed")}
    sections = {path.rpartition(".")[0] for path in leaves}
    inside = {path for path in leaves if any(path.startswith(f"{key}.") for key in paths)}
    assert leaves - sections - set(paths) - columns - inside == set()
    assert all(field.description for field in fields)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_a_config_entered_in_the_form_is_the_same_config(path: Path) -> None:
    tree = read_yaml(path)
    again, problems = tree_of(run_form(), entered_of(run_form(), tree))
    assert not problems
    assert resolved_dict(build_config(again)) == resolved_dict(build_config(tree))


def test_there_are_examples_to_enter() -> None:
    assert len(EXAMPLES) >= 2


def test_what_is_left_empty_is_not_in_the_file_and_text_keys_stay_text() -> None:
    entered = {
        "job_name": "123",
        "model.init_from": " random ",
        "budget.train_tokens": "1.5B",
        "optimizer.lr": "1e-5",
        "batch.seq_length": "",
        "data.train": [{"name": "1", "prefix": "a", "weight": "2"}, {"name": "", "prefix": "", "weight": ""}],
        "data.validation": {"x": "data/x", "": "y"},
    }
    tree, problems = tree_of(run_form(), entered)
    assert not problems
    assert tree == {
        "job_name": "123",
        "model": {"init_from": "random"},
        "data": {"train": [{"name": "1", "prefix": "a", "weight": 2}], "validation": {"x": "data/x"}},
        "budget": {"train_tokens": "1.5B"},
        "optimizer": {"lr": "1e-5"},
    }
    config, problems = validate(tree)
    assert config is not None and not problems


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optimizer.lr", "[1"),
        ("optimizer.lr", ["a"]),
        ("data.train", "text"),
        ("data.train", [1]),
        ("data.validation", ["a"]),
        ("nothing.at.all", "x"),
    ],
)
def test_what_cannot_be_read_is_a_problem_beside_its_key(path: str, value: object) -> None:
    _, problems = tree_of(run_form(), {"job_name": "x", path: value})
    assert [problem.path for problem in problems] == [path]


def test_the_form_of_a_corpus_shows_what_every_corpus_needs_first() -> None:
    first = corpus_form()[0]
    assert [field.path for field in first.fields][:3] == ["output_prefix", "tokenizer", "sources"]
    assert first.fields[2].columns == ("name", "files", "format", "text")
