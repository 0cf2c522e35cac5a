"""The commented config.yaml and corpus.yaml that `megatron-cpt init` writes, as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_cpt.architecture.facts import Architecture

SEQ_LENGTH = 4096
TARGET_SAMPLES = 256  # of 4,096 tokens: about a million tokens a step


@dataclass(frozen=True)
class Starter:
    """What the two files are written for."""

    name: str  # of the model, for job_name
    arch: Architecture
    gpus: int
    init_from: str
    architecture: str | None  # a folder with config.json, where init_from is not on this machine
    instruct_sign: str | None  # why it looks like an Instruct model, None for a base model
    sections: dict[str, dict[str, Any]]  # from `layout`


def global_batch_size(replicas: int) -> int:
    """Samples per step: near the target, and a multiple of the data-parallel replicas."""
    return max(1, TARGET_SAMPLES // replicas) * replicas


def config_text(starter: Starter) -> str:
    """A run's config with a comment on what to edit."""
    parallel = starter.sections["parallel"]
    replicas = starter.gpus // (parallel.get("tp", 1) * parallel.get("pp", 1))
    seq_length = min(SEQ_LENGTH, starter.arch.positions)
    lines = [
        f"# Continued pre-training of {starter.name} ({starter.arch.num_parameters / 1e9:.2f} billion parameters) on "
        f"{starter.gpus} GPU{'s' if starter.gpus > 1 else ''} of 80 GB.",
        "# Edit what is marked EDIT, then: megatron-cpt plan config.yaml, megatron-cpt train config.yaml.",
        f"job_name: {starter.name}-cpt",
        "",
        "model:",
        f"  init_from: {_quoted(starter.init_from)}    # EDIT: the Base checkpoint, a Hugging Face directory"
        if starter.architecture
        else f"  init_from: {_quoted(starter.init_from)}",
    ]
    if starter.architecture:
        path = _quoted(starter.architecture)
        lines.append(f"  architecture: {path}    # its config.json; remove this line once the model is there")
    if starter.instruct_sign:
        lines.append(f"  # {starter.instruct_sign}: CPT undoes its tuning; prefer the base model, or allow it:")
        lines.append("  # allow_instruct: true    # EDIT")
    lines += [
        "",
        "budget:",
        "  train_tokens: 1B    # EDIT: the currency is tokens, iterations follow",
        "  warmup_tokens: 10M    # 1 %",
        "",
        "batch:",
        f"  seq_length: {seq_length}",
        "  micro_batch_size: 1",
        f"  global_batch_size: {global_batch_size(replicas)}    # samples per step, over {replicas} "
        f"replica{'s' if replicas > 1 else ''} of the model",
        "",
        "schedule: {kind: wsd}    # warm up, stable, decay over the last 10 %",
        "optimizer:",
        "  lr: 1.0e-5    # EDIT: 5e-6 to 3e-5 below 5B tokens",
        "  min_lr: 1.0e-6",
        *_offload(starter),
        "",
        f"parallel: {_flow(parallel)}",
        *(f"{name}: {_flow(values)}" for name, values in starter.sections.items() if name in ("recompute",)),
        "precision: {dtype: bf16}",
        "",
        "data:",
        "  train:",
        "    - {name: domain, prefix: data/domain_train, weight: 0.9}",
        "    # - {name: general, prefix: data/general_train, weight: 0.1}    # EDIT: replay against forgetting",
        "  validation:",
        "    domain: data/domain_valid",
        "",
        "eval: {every: 50M tokens}",
        "checkpoint: {save_every: 100M tokens, keep_last: 2}",
    ]
    return "\n".join(lines) + "\n"


def _offload(starter: Starter) -> list[str]:
    ratio = starter.sections.get("optimizer", {}).get("cpu_offload_ratio")
    if ratio is None:
        return []
    host_bytes = 12 * starter.arch.num_parameters * ratio
    return [
        f"  cpu_offload_ratio: {ratio}    # the optimizer's state needs {host_bytes / 2**30:,.0f} GiB of host memory"
    ]


def corpus_text(starter: Starter) -> str:
    """A corpus that gives the datasets which the config names."""
    tokenizer = starter.init_from
    return f"""# The corpus that config.yaml trains on: megatron-cpt preprocess corpus.yaml
output_prefix: data/domain    # data/domain_train and data/domain_valid
tokenizer: {_quoted(tokenizer)}    # of the model that is continued
split: {{train: 0.99, valid: 0.01}}    # by document
sources:
  - name: domain
    files: [corpus/*.jsonl]    # EDIT: JSON lines, text, Parquet, HTML, compressed or not
    text: text    # the key of the text
clean: {{unicode: true, whitespace: true}}
filters: {{min_chars: 100}}    # docs/corpus.md: languages, quality rules, code
dedup: {{near: true}}    # exact and near duplicates go
"""


def _flow(values: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    return "{" + ", ".join(f"{key}: {shown(value)}" for key, value in values.items()) + "}"


def _quoted(text: str) -> str:
    """A path as YAML: plain where that is safe."""
    safe = text.replace("/", "").replace("-", "").replace("_", "").replace(".", "").isalnum()
    return text if safe and not text.startswith("-") else "'" + text.replace("'", "''") + "'"
