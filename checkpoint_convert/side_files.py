"""What belongs to a model beside its weights: config.json, tokenizer, generation config, model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from checkpoint_convert.checkpoint import IndexedCheckpoint
from megatron_cpt.architecture.families.family import Config

# By pattern and not "everything": other formats of the weights stay behind, and so does any code.
PATTERNS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)


def target_config(config: Config, dtype: str, vocab_size: int) -> Config:
    """config.json for the written weights: their true dtype and vocabulary, all else as it was."""
    key = "dtype" if "dtype" in config else "torch_dtype"
    return config | {key: dtype, "vocab_size": vocab_size}


def write_side_files(source: IndexedCheckpoint, folder: Path, dtype: str) -> list[str]:
    """Copy tokenizer and licences, and write config.json. Returns the names written."""
    folder.mkdir(parents=True, exist_ok=True)
    config = target_config(source.config, dtype, source.arch.vocab_size)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    names = {"config.json"}
    for pattern in PATTERNS:
        for file in sorted(source.side_dir.glob(pattern)):
            if file.is_file() and file.suffix != ".py":
                shutil.copyfile(file, folder / file.name)
                names.add(file.name)
    return sorted(names)


def has_tokenizer(names: list[str]) -> bool:
    return any(name in names for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"))


def model_card(source: IndexedCheckpoint, tool: str) -> str:
    """README.md: a draft for people to finish, from the run's own config where there is one."""
    run = _run_config(source)
    base = str(run.get("model", {}).get("init_from", "")) if run else ""
    head = ["---", "library_name: transformers", "tags: [continued-pretraining]" if run else "tags: []"]
    if base and not base.startswith(("/", ".")):
        head.append(f"base_model: {json.dumps(base)}")
    title = run.get("job_name") or source.path.resolve().name
    lines = [*head, "---", "", f"# {title}", ""]
    if not run:
        lines += [f"Converted from {source.format} by {tool}; conversion.json says what was done to the weights."]
        return "\n".join(lines) + "\n"
    iteration = "" if source.iteration is None else f" Weights of iteration {source.iteration:,}."
    lines += [f"Draft, written by {tool}: continued pre-training of `{base}`.{iteration}", ""]
    lines += ["## Training", "", *_training_rows(run), "", "## Data", "", *_data_rows(run), ""]
    lines += [
        "## To be written by you",
        "",
        "Intended use, evaluation, limits, licence of the data and of the base model.",
    ]
    return "\n".join(lines) + "\n"


def _run_config(source: IndexedCheckpoint) -> dict[str, Any]:
    if source.run_config is None:
        return {}
    loaded = yaml.safe_load(source.run_config.read_text(encoding="utf-8"))
    return loaded if isinstance(loaded, dict) else {}


def _training_rows(run: dict[str, Any]) -> list[str]:
    budget, batch = run.get("budget", {}), run.get("batch", {})
    optimizer, schedule = run.get("optimizer", {}), run.get("schedule", {})
    facts = {
        "token budget": budget.get("train_tokens"),
        "warm-up tokens": budget.get("warmup_tokens"),
        "sequence length": batch.get("seq_length"),
        "global batch size": batch.get("global_batch_size"),
        "learning rate": optimizer.get("lr"),
        "final learning rate": optimizer.get("min_lr"),
        "schedule": schedule.get("kind"),
        "seed": run.get("seed"),
    }
    rows = [f"| {name} | {value:,} |" if isinstance(value, int) else f"| {name} | {value} |"
            for name, value in facts.items() if value is not None]  # fmt: skip
    return ["| | |", "|---|---|", *rows]


def _data_rows(run: dict[str, Any]) -> list[str]:
    sources = run.get("data", {}).get("train", [])
    total = sum(float(source.get("weight", 1.0)) for source in sources) or 1.0
    rows = [f"| {source.get('name')} | {float(source.get('weight', 1.0)) / total:.1%} |" for source in sources]
    return ["| source | share of training tokens |", "|---|---|", *rows]
