"""Presets: published sizes, valid layouts that fit, and `megatron-cpt init`, whose files pass the commands' checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.cli import cli
from megatron_cpt.config.derive import derive
from megatron_cpt.config.load import build_config, load_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.yaml_file import parse_yaml
from megatron_cpt.corpus.schema import load_corpus
from megatron_cpt.errors import ConfigError
from megatron_cpt.planner.hardware import find_hardware
from megatron_cpt.planner.layout import Layout
from megatron_cpt.planner.memory import StageMemory, memory_of_stages, worst_stage
from megatron_cpt.planner.plan import verdict
from megatron_cpt.presets import Preset, find_preset, layout, presets
from megatron_cpt.presets.starter import Starter, config_text

HARDWARE = find_hardware("a100-80g")


def starter_config(preset: Preset, gpus: int) -> RunConfig:
    arch = preset.architecture
    starter = Starter(preset.name, arch, gpus, "/models/x", "model", None, layout(arch, gpus))
    return build_config(parse_yaml(config_text(starter)))


def worst_rank(config: RunConfig, arch: Architecture) -> StageMemory:
    return worst_stage(memory_of_stages(arch, Layout.of(config, arch)))


@pytest.mark.parametrize("name", presets())
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    preset = presets()[name]
    assert round(preset.architecture.num_parameters / 1e6) == preset.parameters_millions


def test_the_promised_models_are_there() -> None:
    names = {"qwen2-0.5b", "qwen2-72b", "qwen2.5-0.5b", "qwen2.5-72b", "qwen3-0.6b", "qwen3-32b"}
    assert names | {"llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b"} <= set(presets())


@pytest.mark.parametrize("name", presets())
def test_every_layout_is_valid_and_fits_or_is_refused_with_the_fewest_gpus(name: str) -> None:
    preset = presets()[name]
    arch = preset.architecture
    laid_out = []
    for gpus in (1, 8, 16, 32, 64):
        try:
            config = starter_config(preset, gpus)
        except ConfigError as error:
            assert "is the fewest" in (error.hint or "")
            continue
        derived = derive(config, arch, origin=name)
        assert derived.world_size == gpus
        assert verdict(worst_rank(config, arch), HARDWARE) == "fits", gpus
        laid_out.append(gpus)
    assert {8, 32} <= set(laid_out)
    assert (1 in laid_out) == (arch.num_parameters < 9e9)


@pytest.mark.parametrize("gpus", [2, 3, 4, 6])
def test_other_numbers_of_gpus_take_the_next_smaller_layout(gpus: int) -> None:
    preset = find_preset("qwen3-8b")
    derived = derive(starter_config(preset, gpus), preset.architecture)
    assert derived.world_size == gpus


def test_gpus_that_fill_no_nodes_are_refused_with_legal_numbers() -> None:
    with pytest.raises(ConfigError, match="12 GPUs do not fill nodes of 8") as caught:
        layout(find_preset("qwen3-8b").architecture, 12)
    assert caught.value.hint == "--gpus 8 or 16"


def run_init(*args: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["init", *map(str, args)])
    return done.exit_code, done.output + str(done.exception or "")


def test_init_writes_files_that_plan_and_preprocess_accept(tmp_path: Path) -> None:
    code, output = run_init("--preset", "Llama-3.1-70B", "--gpus", "32", "--to", tmp_path / "job")
    assert code == 0, output
    config = load_config(tmp_path / "job" / "config.yaml")
    assert (config.parallel.tp, config.parallel.pp, config.parallel.world_size) == (8, 4, 32)
    assert config.model.architecture == str(tmp_path / "job" / "model")
    planned = CliRunner().invoke(cli, ["plan", str(tmp_path / "job" / "config.yaml"), "--json"])
    assert planned.exit_code == 0, planned.output
    corpus = load_corpus(str(tmp_path / "job" / "corpus.yaml"))
    assert config.data.train[0].prefix == f"{corpus.output_prefix}_train"

    before = (tmp_path / "job" / "config.yaml").read_bytes()
    code, output = run_init("--preset", "qwen3-8b", "--gpus", "8", "--to", tmp_path / "job")
    assert code != 0 and "is not replaced" in output
    assert (tmp_path / "job" / "config.yaml").read_bytes() == before


def test_init_from_a_folder_reads_its_config_and_warns_of_an_instruct_model(tmp_path: Path) -> None:
    model = tmp_path / "My Model-Instruct"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(find_preset("qwen2.5-1.5b").hf_config))
    code, output = run_init("--from", model, "--gpus", "1", "--to", tmp_path / "job")
    assert code == 0, output
    text = (tmp_path / "job" / "config.yaml").read_text()
    assert "job_name: My-Model-Instruct-cpt" in text and "# allow_instruct: true" in text
    config = load_config(tmp_path / "job" / "config.yaml")
    assert config.model.init_from == str(model) and not config.model.allow_instruct


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--preset", "qwen2.5-7"], "did you mean 'qwen2.5-7b'?"),
        (["--preset", "llama-3.1-70b", "--gpus", "1"], "--gpus 8 is the fewest"),
        (["--from", "nowhere"], "no config.json in nowhere"),
        (["--from", "a", "--preset", "b"], "--from or --preset, not both"),
    ],
)
def test_a_wrong_wish_is_an_error_and_writes_nothing(tmp_path: Path, args: list[str], says: str) -> None:
    code, output = run_init(*args, "--to", tmp_path / "job")
    assert code != 0 and says in output, output
    assert not (tmp_path / "job").exists()
