"""What people bring along from other trainers: names of their options, and the other kind of YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_cpt.config.problems import Problem
from megatron_cpt.errors import ConfigError

_PER_STEP = "batch.global_batch_size is samples per step over all GPUs; accumulation follows from it"
_FROM_TOKENS = "megatron-cpt inspect PREFIX says how many tokens an epoch has"
# option of Hugging Face's Trainer, LLaMA-Factory, axolotl or Megatron-LM -> (key here, what to know)
FOREIGN_NAMES: dict[str, tuple[str, str]] = {
    "model_name_or_path": ("model.init_from", ""),
    "base_model": ("model.init_from", ""),
    "pretrained_model_name_or_path": ("model.init_from", ""),
    "attn_implementation": ("model.attention", ""),
    "flash_attn": ("model.attention", ""),
    "flash_attention": ("model.attention", ""),
    "neat_packing": ("model.document_attention", ""),
    "output_dir": ("run_dir", ""),
    "run_name": ("job_name", ""),
    "num_train_epochs": ("budget.train_tokens", f"epochs x tokens of the data; {_FROM_TOKENS}"),
    "num_epochs": ("budget.train_tokens", f"epochs x tokens of the data; {_FROM_TOKENS}"),
    "max_steps": ("budget.train_tokens", "steps x batch.global_batch_size x batch.seq_length"),
    "train_iters": ("budget.train_tokens", "steps x batch.global_batch_size x batch.seq_length"),
    "train_samples": ("budget.train_tokens", "samples x batch.seq_length"),
    "warmup_steps": ("budget.warmup_tokens", "steps x batch.global_batch_size x batch.seq_length"),
    "warmup_ratio": ("budget.warmup_tokens", "the ratio x budget.train_tokens"),
    "lr_warmup_iters": ("budget.warmup_tokens", "steps x batch.global_batch_size x batch.seq_length"),
    "lr_warmup_fraction": ("budget.warmup_tokens", "the fraction x budget.train_tokens"),
    "cutoff_len": ("batch.seq_length", ""),
    "max_seq_length": ("batch.seq_length", ""),
    "max_length": ("batch.seq_length", ""),
    "model_max_length": ("batch.seq_length", ""),
    "sequence_len": ("batch.seq_length", ""),
    "block_size": ("batch.seq_length", ""),
    "per_device_train_batch_size": ("batch.micro_batch_size", _PER_STEP),
    "train_micro_batch_size_per_gpu": ("batch.micro_batch_size", _PER_STEP),
    "gradient_accumulation_steps": (
        "batch.global_batch_size",
        "samples per GPU x accumulation x replicas of the model",
    ),
    "train_batch_size": ("batch.global_batch_size", ""),
    "lr_scheduler_type": ("schedule.kind", ""),
    "lr_scheduler": ("schedule.kind", ""),
    "lr_decay_style": ("schedule.kind", ""),
    "adam_epsilon": ("optimizer.adam_eps", ""),
    "max_grad_norm": ("optimizer.clip_grad", ""),
    "gradient_clipping": ("optimizer.clip_grad", ""),
    "bf16": ("precision.dtype", "bf16 or fp32"),
    "fp16": ("precision.dtype", "bf16 or fp32"),
    "pure_bf16": ("precision.dtype", "bf16 or fp32"),
    "gradient_checkpointing": ("recompute.granularity", "full recomputes every layer"),
    "activations_checkpoint_method": ("recompute.granularity", ""),
    "recompute_granularity": ("recompute.granularity", ""),
    "dataset": ("data.train", "a list of name and prefix, which megatron-cpt preprocess writes"),
    "datasets": ("data.train", "a list of name and prefix, which megatron-cpt preprocess writes"),
    "dataset_dir": ("data.train", "a list of name and prefix, which megatron-cpt preprocess writes"),
    "data_path": ("data.train", "a list of name and prefix, which megatron-cpt preprocess writes"),
    "train_file": ("data.train", "a list of name and prefix, which megatron-cpt preprocess writes"),
    "eval_dataset": ("data.validation", "a name and a prefix each"),
    "validation_file": ("data.validation", "a name and a prefix each"),
    "valid_data_path": ("data.validation", "a name and a prefix each"),
    "eval_steps": ("eval.every", "with a unit, such as 500 iters"),
    "eval_interval": ("eval.every", "with a unit, such as 500 iters"),
    "eval_strategy": ("eval.every", "with a unit, such as 500 iters"),
    "evaluation_strategy": ("eval.every", "with a unit, such as 500 iters"),
    "save_steps": ("checkpoint.save_every", "with a unit, such as 500 iters"),
    "save_strategy": ("checkpoint.save_every", "with a unit, such as 500 iters"),
    "save_total_limit": ("checkpoint.keep_last", ""),
    "resume_from_checkpoint": (
        "checkpoint.branch_from",
        "a run continues by itself when its command is started again; this key starts one from another run",
    ),
    "logging_steps": ("log.every", "with a unit, such as 10 iters"),
    "log_interval": ("log.every", "with a unit, such as 10 iters"),
    "report_to": ("log.wandb_project", "or log.tensorboard: true"),
    "wandb_project_name": ("log.wandb_project", ""),
    "deepspeed": ("parallel.distributed_optimizer", "on by default; parallel.tp and parallel.pp split the model"),
    "fsdp": ("parallel.distributed_optimizer", "on by default; parallel.tp and parallel.pp split the model"),
    "nproc_per_node": ("parallel.gpus_per_node", ""),
    "nnodes": ("parallel.nodes", ""),
    "finetuning_type": ("lora.rank", "with a rank adapters are trained, without one all weights"),
    "target_modules": (
        "lora.targets",
        "all, or a list of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
    ),
}


def recognised(problems: list[Problem], known: frozenset[str]) -> list[Problem]:
    """Give the right key in the hint of every unknown key that is another trainer's name for it."""
    return [_recognised(problem, known) for problem in problems]


def _recognised(problem: Problem, known: frozenset[str]) -> Problem:
    name = problem.path.rsplit(".", 1)[-1]
    if problem.path in known or name not in FOREIGN_NAMES or not problem.rule.startswith("is not a key"):
        return problem
    key, note = FOREIGN_NAMES[name]
    rule = "is an option of another trainer, not a key of the config"
    return replace(problem, rule=rule, hint=f"{key} is the key here" + (f": {note}" if note else ""))


def refuse_corpus(raw: Mapping[str, Any], origin: str) -> None:
    """Raise ConfigError when a file given as a run's config describes a corpus."""
    if "sources" in raw and ("output_prefix" in raw or "tokenizer" in raw) and "model" not in raw:
        raise ConfigError(
            f"{origin} describes a corpus, and this command takes a run's config",
            hint=f"megatron-cpt preprocess {origin}; a run's config names the datasets in data.train",
        )


def refuse_run(raw: Mapping[str, Any], origin: str) -> None:
    """Raise ConfigError when a file given as a corpus is a run's config."""
    if "sources" not in raw and "model" in raw and {"job_name", "budget", "batch", "data", "parallel"} & set(raw):
        raise ConfigError(
            f"{origin} is a run's config, and this command takes a corpus",
            hint=f"megatron-cpt plan {origin} checks it, megatron-cpt train {origin} starts it",
        )
