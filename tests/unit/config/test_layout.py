"""Every illegal layout is refused before a process group starts, alone and together, each with a legal value."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.derive import derive
from megatron_cpt.config.load import build_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.sections.parallel import ParallelConfig
from megatron_cpt.errors import ConfigError

ARCH = Architecture(
    family="llama", num_layers=30, hidden_size=576, ffn_hidden_size=1536, num_attention_heads=9, num_query_groups=3,
    head_dim=64, vocab_size=49152, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=1e5, rope_scaling=None,
    tie_word_embeddings=True, qkv_bias=False, qk_norm=False, sliding_window=None, dtype="bfloat16",
)  # fmt: skip
WIDE = dataclasses.replace(ARCH, num_attention_heads=64, num_query_groups=8, num_layers=32)

# (name, model, overrides, words of the message)
ILLEGAL: list[tuple[str, Architecture, list[str], str]] = [
    ("heads", ARCH, ["parallel.gpus_per_node=2", "parallel.tp=2"], "the model's 9 attention heads"),
    ("kv heads", ARCH, ["parallel.gpus_per_node=9", "parallel.tp=9"], "the model's 3 key/value heads"),
    ("ffn", dataclasses.replace(WIDE, ffn_hidden_size=1534), ["parallel.gpus_per_node=4", "parallel.tp=4"], "MLP rows"),
    ("layers", ARCH, ["parallel.gpus_per_node=4", "parallel.pp=4"], "must divide the model's 30 layers"),
    ("vpp layers", ARCH, ["parallel.gpus_per_node=2", "parallel.pp=2", "parallel.vpp=4"], "pp x vpp = 8"),
    (
        "layers, with an uneven way out", ARCH, ["parallel.gpus_per_node=4", "parallel.pp=4"],
        "or parallel.last_stage_layers, one of [3, 6, 9, 12",
    ),
    (
        "last stage", ARCH, ["parallel.gpus_per_node=4", "parallel.pp=4", "parallel.last_stage_layers=5"],
        "of the model's 30 layers it must leave layers that 3 other stages share equally",
    ),
    (
        "first and last stage", ARCH,
        ["parallel.gpus_per_node=2", "parallel.pp=2", "parallel.first_stage_layers=18", 
         "parallel.last_stage_layers=11"],
        "with first_stage_layers = 18 it must be what the first stage leaves\nhint: one of [12]",
    ),
    (
        "all in the first stage", ARCH, ["parallel.gpus_per_node=2", "parallel.pp=2", "parallel.first_stage_layers=30"],
        "share equally",
    ),
    ("uneven without pp", ARCH, ["parallel.last_stage_layers=12"], "needs pp > 1"),
    (
        "uneven vpp", WIDE,
        ["parallel.gpus_per_node=2", "parallel.pp=2", "parallel.vpp=2", "parallel.last_stage_layers=13"],
        "must divide into vpp = 2 chunks",
    ),
    (
        "uneven middle vpp", WIDE,
        ["parallel.gpus_per_node=4", "parallel.pp=4", "parallel.vpp=2", "parallel.last_stage_layers=4"],
        "3 other stages in 2 chunks each share equally",
    ),
    ("vpp without pp", ARCH, ["parallel.vpp=2"], "virtual stages need pp > 1"),
    (
        "vpp micro batches", WIDE,
        ["parallel.gpus_per_node=4", "parallel.pp=4", "parallel.vpp=2", "batch.global_batch_size=6"],
        "a multiple of pp = 4",
    ),
    ("world size", WIDE, ["parallel.gpus_per_node=6", "parallel.pp=4"], "must divide nodes x gpus_per_node"),
    ("tp across nodes", WIDE, ["parallel.nodes=4", "parallel.gpus_per_node=4", "parallel.tp=8"], "across nodes"),
    ("micro batches", ARCH, ["parallel.gpus_per_node=3", "batch.global_batch_size=32"], "micro_batch_size x dp"),
    ("cp chunks", ARCH, ["parallel.gpus_per_node=2", "parallel.cp=2", "batch.seq_length=1026"], "2 x cp = 4 chunks"),
    (
        "cp unfused", ARCH, ["parallel.gpus_per_node=2", "parallel.cp=2", "model.attention=unfused"],
        "computes whole sequences only",
    ),
    (
        "sp sequence", WIDE, ["parallel.gpus_per_node=8", "parallel.tp=8", "batch.seq_length=1028"],
        "sequence parallelism splits",
    ),
    ("sp without tp", ARCH, ["parallel.sequence_parallel=true"], "needs tp > 1"),
    ("lazy gather", ARCH, ["parallel.overlap_param_gather=true"], "needs distributed_optimizer"),
    ("positions", ARCH, ["batch.seq_length=16384"], "the model's 8,192 positions"),
    ("window", dataclasses.replace(ARCH, sliding_window=512), [], "sliding window of 512"),
    ("fp8 on sdpa", ARCH, ["precision.fp8=hybrid", "model.attention=sdpa"], "is TransformerEngine's"),
    (
        "narrow moments", ARCH, ["optimizer.moments_dtype=bf16", "parallel.distributed_optimizer=false"],
        "needs the distributed optimizer",
    ),
]  # fmt: skip


def config(overrides: list[str]) -> RunConfig:
    raw: dict[str, Any] = {"job_name": "x", "model": {"init_from": "m"}, "budget": {"warmup_tokens": 0}}
    return build_config(raw, overrides)


@pytest.mark.parametrize(("arch", "overrides", "words"), [row[1:] for row in ILLEGAL], ids=[row[0] for row in ILLEGAL])
def test_illegal_alone(arch: Architecture, overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        derive(config(overrides), arch)
    assert words in str(caught.value)
    assert "hint:" in str(caught.value)


def test_illegal_together_are_reported_together() -> None:
    overrides = [
        "parallel.gpus_per_node=8", "parallel.tp=4", "parallel.pp=2", "parallel.vpp=4",
        "parallel.overlap_param_gather=true", "batch.seq_length=9001", "batch.global_batch_size=7",
        "precision.fp8=e4m3", "precision.dtype=fp32",
    ]  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        derive(config(overrides), ARCH)
    for words in (
        "9 attention heads", "3 key/value heads", "pp x vpp = 8", "needs distributed_optimizer", "sequence parallelism",
        "8,192 positions", "a multiple of pp = 2", "is TransformerEngine's",
    ):  # fmt: skip
        assert words in str(caught.value)


@pytest.mark.parametrize("tp", [1, 3])
def test_named_legal_values_are_legal(tp: int) -> None:
    with pytest.raises(ConfigError, match=r"one of \[1, 3\]"):
        derive(config(["parallel.gpus_per_node=2", "parallel.tp=2"]), ARCH)
    wanted = [f"parallel.gpus_per_node={tp}", f"parallel.tp={tp}", "batch.seq_length=1023"]
    assert derive(config(wanted), ARCH).data_parallel_size == 1


UNEVEN = [
    (30, {"pp": 2}, (15, 15)),
    (30, {"pp": 2, "last_stage_layers": 12}, (18, 12)),
    (30, {"pp": 2, "first_stage_layers": 18}, (18, 12)),
    (30, {"pp": 2, "first_stage_layers": 18, "last_stage_layers": 12}, (18, 12)),
    (30, {"pp": 4, "last_stage_layers": 6}, (8, 8, 8, 6)),
    (80, {"pp": 8, "first_stage_layers": 11, "last_stage_layers": 9}, (11, 10, 10, 10, 10, 10, 10, 9)),
    (32, {"pp": 2, "vpp": 2, "last_stage_layers": 12}, (20, 12)),
    (30, {"pp": 4}, None),
    (32, {"pp": 2, "vpp": 2, "last_stage_layers": 13}, None),
    (30, {"pp": 2, "last_stage_layers": 30}, None),
]


@pytest.mark.parametrize(("num_layers", "parallel", "stages"), UNEVEN)
def test_layers_of_each_stage(num_layers: int, parallel: dict[str, int], stages: tuple[int, ...] | None) -> None:
    assert ParallelConfig(gpus_per_node=8, **parallel).layers_per_stage(num_layers) == stages
    assert stages is None or sum(stages) == num_layers


def test_every_legal_last_stage_is_accepted_and_no_other() -> None:
    legal = [n for n in range(1, 31) if ParallelConfig(pp=4, last_stage_layers=n).layers_per_stage(30)]
    assert legal == [3, 6, 9, 12, 15, 18, 21, 24, 27]
    uneven = ["parallel.gpus_per_node=4", "parallel.pp=4", "num_layers_in_last_pipeline_stage=6"]
    assert derive(config(uneven), ARCH).layers_per_stage == (8, 8, 8, 6)
