"""The config contract: aliases, overrides, every problem at once, derived numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.config.derive import derive
from megatron_cpt.config.load import build_config, known_paths, load_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.section import Section
from megatron_cpt.errors import ConfigError

REPO = Path(__file__).resolve().parents[3]
MINIMAL: dict[str, Any] = {"job_name": "job", "model": {"init_from": "somewhere"}}
PASTED = """
job_name: qwen2-cpt
batch_size: 1
global_batch_size: 32
learning_rate: 5e-5
min_learning_rate: 5e-6
sequence_length: 1024
pad_length: 128
save_interval: 1000
train_tokens: 1638400
warmup_tokens: 163840
"""


def config_of(*overrides: str, **sections: Any) -> RunConfig:
    return build_config({**MINIMAL, **sections}, overrides)


def test_a_pasted_recipe_table_is_the_default() -> None:
    pasted = build_config({**yaml.safe_load(PASTED), "model": {"init_from": "somewhere"}})
    assert pasted == config_of(job_name="qwen2-cpt")
    assert str(pasted.checkpoint.save_every) == "1K iters"


def test_an_alias_that_contradicts_the_canonical_key_is_a_problem() -> None:
    with pytest.raises(ConfigError, match=r"another name of optimizer\.lr"):
        config_of(learning_rate=1e-5, optimizer={"lr": 2e-5})


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "data": {"train": [{"name": "a", "prefix": "p"}]}}))
    config = load_config(path, ["optimizer.lr=1e-4", "train_tokens=2B", "data.train.0.weight=3", "parallel.tp=2"])
    assert (config.optimizer.lr, config.budget.train_tokens, config.parallel.tp) == (1e-4, 2_000_000_000, 2)
    assert config.data.train[0].weight == 3


def test_all_single_field_problems_are_reported_together_with_hints() -> None:
    with pytest.raises(ConfigError) as error:
        build_config(
            {
                "job_name": "a b",
                "optimizer": {"lrr": 1},
                "paralel": {},
                "train_tokens": "1.2Q",
                "data": {"train": [{"name": "a", "prefix": "p", "wieght": 2}]},
            },
            ["nonsense"],
        )
    text = str(error.value)
    for part in ("job_name", "model: is missing", "did you mean 'optimizer.lr'?", "did you mean 'parallel'?",
                 "1.2Q", "key.sub=value", "7 problems", "did you mean 'data.train.0.weight'?"):  # fmt: skip
        assert part in text, text
    assert text.count("hint:") == 8


@pytest.mark.parametrize("key", ["seq_len", "train_token", "parallel.tpp", "checkpoint.save_evry", "warmup_token"])
def test_a_typo_is_answered_with_the_nearest_key(key: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(f"{key}=1")
    assert "did you mean" in str(error.value)
    assert any(known in str(error.value) for known in known_paths())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- 1\n", "no mapping"),
        ("", "no mapping"),
        ("job_name: a\njob_name: b\n", "stands twice"),
    ],
)
def test_what_is_no_config_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert error.value.hint


def test_a_missing_file_and_a_binary_file_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read config"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "b.yaml")


def test_the_72b_example_gives_the_numbers_of_its_layout() -> None:
    config = load_config(REPO / "examples/qwen2_72b/config.yaml")
    arch = read_architecture(REPO / "examples/qwen2_72b")
    derived = derive(config, arch)
    assert arch.num_parameters == 72_706_203_648
    assert (derived.world_size, derived.data_parallel_size, derived.gradient_accumulation_steps) == (32, 1, 256)
    assert (derived.tokens_per_step, derived.train_iters) == (1_048_576, 1431)
    assert derived.train_tokens - derived.added_tokens == 1_500_000_000
    assert (derived.layers_per_stage, derived.padded_vocab_size) == ((20, 20, 20, 20), 152_064)


def test_global_batch_is_not_batch_times_gpus() -> None:
    """TP8 x PP4 on 32 GPUs is one replica: 32 samples are 32 micro-batches of it, not one per GPU."""
    derived = derive(config_of(parallel={"nodes": 4, "gpus_per_node": 8, "tp": 8, "pp": 4}))
    assert (derived.data_parallel_size, derived.gradient_accumulation_steps) == (1, 32)


def test_all_cross_field_problems_are_reported_together_with_legal_values() -> None:
    config = config_of(
        "parallel.tp=3", "parallel.pp=3", "parallel.cp=2", "parallel.gpus_per_node=8", "train_tokens=100",
        data={"train": [{"name": "a", "prefix": "p"}, {"name": "a", "prefix": "q"}]},
    )  # fmt: skip
    with pytest.raises(ConfigError) as error:
        derive(config, read_architecture(REPO / "examples/qwen2_72b"))
    text = str(error.value)
    for part in ("must divide gpus_per_node = 8", "tp x pp x cp = 3 x 3 x 2 = 18", "smaller than one step", "'a'",
                 "64 attention heads", "8 key/value heads", "80 layers", "[1, 2, 4, 8]"):  # fmt: skip
        assert part in text, text


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["parallel.vpp=2"], "pp > 1"),
        (["parallel.gpus_per_node=2", "parallel.cp=2", "seq_length=1023"], "a multiple of 4"),
        (["parallel.gpus_per_node=2", "parallel.tp=2", "seq_length=1023"], "sequence parallelism"),
        (["parallel.gpus_per_node=2", "global_batch_size=3"], "2 or 4"),
        (["min_lr=1"], "above optimizer.lr"),
        (["warmup_tokens=2B"], "exceeds train_tokens"),
        (["schedule.kind=wsd", "schedule.decay_tokens=1.6M"], "at most 1,474,560"),
        (["schedule.decay_tokens=1K"], "means nothing to kind"),
        (["parallel.overlap_param_gather=true"], "overlap_grad_reduce"),
        (["budget.rounding=exact", "train_tokens=1_638_401"], "1,638,400 or 1,671,168"),
        (["seq_length=262144", "train_tokens=1B"], "131,072 positions"),
        (["forgetting.kl.sources=[replay]"], "no source of data.train has this name"),
        (["forgetting.ewc.strength=1", "lora.rank=8"], "leaves forgetting.ewc nothing to hold"),
        (["forgetting.ewc.strength=1", "optimizer.moments_dtype=bf16"], "hides the fp32 weights"),
        (["forgetting.ewc.strength=1", "optimizer.cpu_offload_ratio=0.5"], "out of reach"),
    ],
)
def test_each_cross_field_rule(overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigError) as error:
        derive(config_of(*overrides), read_architecture(REPO / "examples/qwen2_72b"))
    assert part in str(error.value)
    assert "hint:" in str(error.value)


RAMP = ["global_batch_size=4", "seq_length=10", "batch.rampup_from=1", "batch.rampup_tokens=900", "warmup_tokens=0"]


def test_exact_rounding_holds_with_a_batch_ramp_too() -> None:
    with pytest.raises(ConfigError, match="does not end with a whole step of 40 tokens") as error:
        derive(config_of(*RAMP, "budget.rounding=exact", "train_tokens=1001"))
    below = int((error.value.hint or "").split(" or ")[0].replace(",", ""))
    derived = derive(config_of(*RAMP, "budget.rounding=exact", f"train_tokens={below}"))
    assert (derived.train_tokens, derived.added_tokens) == (below, 0)
    rounded = derive(config_of(*RAMP, "train_tokens=1001"))
    assert rounded.train_tokens == below + 40
    assert f"{below + 40 - 1001} tokens are added so that the last step is whole" in rounded.notes[0]


def test_every_section_is_asked_for_its_rules() -> None:
    config = config_of()
    keys = [name for name in RunConfig.model_fields if isinstance(getattr(config, name), Section)]
    assert len(keys) == 15
    assert [type(section) for section in config.sections] == [type(getattr(config, key)) for key in keys]


def test_the_resolved_config_round_trips_through_yaml() -> None:
    config = load_config(REPO / "examples/qwen2_72b/config.yaml")
    again = build_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert again == config


def test_a_sliding_window_that_matters_at_this_length_is_refused() -> None:
    arch = dataclasses.replace(read_architecture(REPO / "examples/qwen2_72b"), sliding_window=4096)
    assert derive(config_of("seq_length=4096"), arch).tokens_per_step == 32 * 4096
    with pytest.raises(ConfigError, match="sliding window of 4,096"):
        derive(config_of("seq_length=8192"), arch)
