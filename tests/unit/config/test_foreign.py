"""What people bring from other trainers is recognised: their option names, numbers without a unit, the other YAML."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_cpt.config.foreign import FOREIGN_NAMES
from megatron_cpt.config.load import ALIASES, build_config, known_paths, load_config
from megatron_cpt.corpus.schema import load_corpus
from megatron_cpt.errors import ConfigError

REPO = Path(__file__).resolve().parents[3]
RUN = {"job_name": "a", "model": {"init_from": "random"}}


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_another_trainers_option_names_the_key_here(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({**RUN, name: 3})
    assert f"{name} = 3: is an option of another trainer" in caught.value.message
    assert (caught.value.hint or "").startswith(f"{FOREIGN_NAMES[name][0]} is the key here")


def test_every_key_in_a_hint_exists_and_no_foreign_name_hides_one_of_ours() -> None:
    known = set(known_paths())
    assert {key for key, _ in FOREIGN_NAMES.values()} <= known
    assert not set(FOREIGN_NAMES) & known


def test_a_pasted_table_reports_all_its_names_at_once_and_an_override_too() -> None:
    table = {"num_train_epochs": 3, "cutoff_len": 2048, "per_device_train_batch_size": 2, "save_steps": 500}
    with pytest.raises(ConfigError, match="5 problems") as caught:
        build_config({**RUN, **table}, ["optimizer.max_grad_norm=1"])
    for key in ("budget.train_tokens", "batch.seq_length", "batch.micro_batch_size", "checkpoint.save_every"):
        assert f"hint: {key} is the key here" in caught.value.message
    assert "hint: optimizer.clip_grad is the key here" in caught.value.message


@pytest.mark.parametrize("key", ["checkpoint.save_every", "eval.every", "log.every", "save_every"])
@pytest.mark.parametrize("value", ["1000", "1_000", "50M", "'1000'"])
def test_an_interval_needs_its_unit(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=r"has no unit: .* iters, or .* tokens"):
        build_config(RUN, [f"{key}={value}"])
    assert build_config(RUN, [f"{key}={value} iters".replace("'", "")])


@pytest.mark.parametrize("value", [1000, "1000", "1_000", "1K"])
def test_the_cloud_recipes_save_interval_keeps_counting_iterations(value: int | str) -> None:
    assert str(build_config({**RUN, "save_interval": value}).checkpoint.save_every) == "1K iters"


def test_a_corpus_given_as_a_run_and_the_reverse_say_which_command_takes_them(tmp_path: Path) -> None:
    corpus = REPO / "examples" / "medical" / "corpus.yaml"
    with pytest.raises(ConfigError, match="describes a corpus") as caught:
        load_config(corpus)
    assert f"megatron-cpt preprocess {corpus}" in (caught.value.hint or "")
    run = REPO / "examples" / "qwen2_72b" / "config.yaml"
    with pytest.raises(ConfigError, match="is a run's config") as caught:
        load_corpus(run)
    assert f"megatron-cpt plan {run}" in (caught.value.hint or "")


def faults(value: Any, schema: dict[str, Any], root: dict[str, Any], path: str = "") -> list[str]:
    """What contradicts the parts of JSON Schema that docs/config.schema.json is made of."""
    if "$ref" in schema:
        return faults(value, root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], root, path)
    if "anyOf" in schema:
        each = [faults(value, option, root, path) for option in schema["anyOf"]]
        return [] if [] in each else each[0]
    kinds: dict[str, type | tuple[type, ...]] = {"object": dict, "array": list, "string": str, "boolean": bool}
    kinds |= {"null": type(None), "integer": int, "number": (int, float)}
    named = schema.get("type", [])
    allowed = [named] if isinstance(named, str) else named
    if allowed and not any(isinstance(value, kinds[kind]) for kind in allowed):
        return [f"{path}: {value!r} is no {allowed}"]
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        return [f"{path}: {value!r} does not match"]
    found = [f"{path}: {value!r}"] if "enum" in schema and value not in schema["enum"] else []
    if isinstance(value, dict):
        known = schema.get("properties", {})
        if schema.get("additionalProperties") is False:
            found += [f"{path}.{key} is unknown" for key in value if key not in known]
        for key, inner in value.items():
            found += faults(inner, known.get(key, {}), root, f"{path}.{key}")
    if isinstance(value, list):
        for inner in value:
            found += faults(inner, schema.get("items", {}), root, f"{path}[]")
    return found


def test_the_examples_follow_the_schema_that_they_name_for_editors() -> None:
    examples = sorted(REPO.glob("examples/**/config*.yaml"))
    assert len(examples) >= 3
    for example in examples:
        named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", example.read_text())
        assert named is not None, example
        schema = json.loads((example.parent / named.group(1)).read_text())
        assert faults(yaml.safe_load(example.read_text()), schema, schema) == []


def test_the_schema_takes_aliases_and_counts_as_text_and_refuses_what_the_config_refuses() -> None:
    schema = json.loads((REPO / "docs" / "config.schema.json").read_text())
    assert set(ALIASES) <= set(schema["properties"])
    good = {**RUN, "train_tokens": "1.5B", "save_interval": 1000, "checkpoint": {"save_every": "100M tokens"}}
    assert faults(good, schema, schema) == []
    for bad in (
        {"batch": {"seq_len": 1}},
        {"budget": {"train_tokens": "much"}},
        {"eval": {"every": "1000"}},
        {"eval": {"every": 1000}},
        {"schedule": {"kind": "cosinus"}},
        {"cutoff_len": 1},
    ):
        assert faults({**RUN, **bad}, schema, schema), bad
