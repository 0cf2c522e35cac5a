"""One reader for all YAML that people write: what it refuses, it refuses everywhere, in one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config.load import build_config, load_config
from megatron_cpt.config.yaml_file import parse_yaml, read_yaml
from megatron_cpt.corpus.readers.registry import resolve_datasets
from megatron_cpt.corpus.schema import load_corpus, parse_corpus
from megatron_cpt.errors import ConfigError


def load_registry(path: Path) -> Any:
    raw = {"output_prefix": "x", "tokenizer": "t", "registry": str(path), "sources": [{"dataset": "med"}]}
    return resolve_datasets(parse_corpus(raw, "test"))


READERS: list[Callable[[Path], Any]] = [read_yaml, load_config, load_corpus, load_registry]
BAD = [
    ("a: 1\na: 2\n", "key 'a' stands twice"),
    ("sources: [{files: a, files: b}]\n", "key 'files' stands twice"),
    ("? [a, b]\n: 1\n", "a key is not a plain value"),
    ("a: 2026-13-45\n", "cannot be read"),
    ("a: " + "9" * 5000, "cannot be read"),
    ("a: &x [*x]\n", "not valid YAML"),
    ("a: " + "[" * 5000, "not valid YAML"),
    ("a: [", "not valid YAML"),
    ("a: !!python/object:os.system {}\n", "not valid YAML"),
    ("- 1\n", "no mapping"),
    ("", "no mapping"),
]


@pytest.mark.parametrize("read", READERS, ids=["yaml", "config", "corpus", "registry"])
@pytest.mark.parametrize(("text", "message"), BAD, ids=[text[:20] for text, _ in BAD])
def test_every_reader_refuses_what_is_no_clear_mapping(
    read: Callable[[Path], Any], text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read(path)
    assert error.value.hint
    assert str(path) in error.value.message


@pytest.mark.parametrize("read", READERS, ids=["yaml", "config", "corpus", "registry"])
def test_a_missing_file_and_one_that_is_not_text_are_named(read: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, message in (("none.yaml", "cannot read"), ("binary.yaml", "not UTF-8")):
        with pytest.raises(ConfigError, match=message):
            read(tmp_path / name)


def test_a_json_file_may_be_indented_by_tabs_and_its_keys_stand_once(tmp_path: Path) -> None:
    path = tmp_path / "registry.json"
    path.write_text(json.dumps({"med": {"files": "a.jsonl"}}, indent="\t"))
    assert read_yaml(path) == {"med": {"files": "a.jsonl"}}
    path.write_text('{"med": {"files": "a", "files": "b"}}')
    with pytest.raises(ConfigError, match="not valid JSON: key 'files' stands twice"):
        load_registry(path)


def test_a_key_given_twice_in_an_override_is_a_problem() -> None:
    with pytest.raises(ConfigError, match="key 'lr' stands twice"):
        build_config({"job_name": "a", "model": {"init_from": "m"}}, ["optimizer={lr: 1e-5, lr: 2e-5}"])


def test_a_merge_key_may_be_overridden() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize("entry", ["5", "{files: 5}", "{files: [1, 2]}", "{files: {a: b}}", "{files: a, txt: b}"])
def test_a_registry_entry_of_the_wrong_kind_is_a_clear_error(entry: str, tmp_path: Path) -> None:
    path = tmp_path / "registry.yaml"
    path.write_text(f"med: {entry}\n2026: {{files: a}}\n")
    with pytest.raises(ConfigError, match="med") as error:
        load_registry(path)
    assert error.value.hint


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=3))
def test_what_yaml_writes_is_read_back(value: dict[str, Any]) -> None:
    assert parse_yaml(yaml.safe_dump(value)) == value


@given(st.text(alphabet="ab:-[]{}&*!|>'\"#%@?, \n\t0123.e\\<", max_size=60))
def test_any_text_is_read_or_refused_with_a_yaml_error(text: str) -> None:
    try:
        parse_yaml(text)
    except yaml.YAMLError:
        return
