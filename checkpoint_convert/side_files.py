"""What belongs to a model beside its weights: config.json, tokenizer, generation config, model card."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import yaml

from checkpoint_convert.checkpoint import IndexedCheckpoint
from checkpoint_convert.measurements import evaluation_rows
from megatron_cpt.architecture.families.family import Config
from megatron_cpt.architecture.model_folder import side_files

log = logging.getLogger(__name__)

# Beside the files of a Megatron checkpoint only these; in a model's own folder everything that is a side file.
TOKENIZER_PATTERNS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "tekken.json",
    "chat_template*",
)
REWRITTEN = (
    Path("config.json"),
    Path("README.md"),
    Path("conversion.json"),
)  # they describe the source, not the output
GENERATION_CONFIG = "generation_config.json"


def target_config(config: Config, dtype: str, vocab_size: int) -> Config:
    """config.json for the written weights: their true dtype and vocabulary, all else as it was."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return config | dict.fromkeys(keys, dtype) | {"vocab_size": vocab_size}


def write_side_files(source: IndexedCheckpoint, folder: Path, dtype: str) -> list[str]:
    """Copy what belongs to the model beside its weights, and write config.json. Return the names written."""
    folder.mkdir(parents=True, exist_ok=True)
    config = target_config(source.config, dtype, source.arch.vocab_size)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    names = {"config.json"}
    for name in _side_files(source):
        if name not in REWRITTEN:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.side_dir / name, folder / name)
            names.add(name.as_posix())
    if _add_document_end(source, config, folder / GENERATION_CONFIG):
        names.add(GENERATION_CONFIG)
    return sorted(names)


def _side_files(source: IndexedCheckpoint) -> list[Path]:
    if source.format == "hf" or source.side_dir not in (source.path, source.path.parent):
        return list(side_files(source.side_dir))
    found = {path for pattern in TOKENIZER_PATTERNS for path in source.side_dir.glob(pattern) if path.is_file()}
    return [Path(path.name) for path in sorted(found)]


def _add_document_end(source: IndexedCheckpoint, config: Config, path: Path) -> bool:
    """Let generation stop where the corpus of the run ends its documents too. Return whether the file was changed.

    Training teaches the model to write the corpus' end of a document. Where that is another token than the base
    model's end of sequence, a client that knows only the latter would generate on into the next document.
    """
    document_ends = _document_ends(source)
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    known = (config if generation is None else generation).get("eos_token_id")
    stops = known if isinstance(known, list) else [] if known is None else [known]
    more = [end for end in document_ends if end not in stops and end < source.arch.vocab_size]
    if not more:
        return False
    if generation is None:
        generation = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    generation["eos_token_id"] = [*stops, *more]
    path.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    log.info("generation also stops at token %s, the end of a document in the training data", more)
    return True


def _document_ends(source: IndexedCheckpoint) -> list[int]:
    """The tokens that end documents in the datasets of the run, by their manifests, each once."""
    found: list[int] = []
    for item in _run_config(source).get("data", {}).get("train", []):
        manifest = Path(f"{item.get('prefix')}.manifest.json")
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            end = content["tokenizer"]["eod_id"] if content["append_eod"] else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s): generation may not stop where its documents end", manifest, error)
            continue
        if isinstance(end, int) and end not in found:
            found.append(end)
    return found


def has_tokenizer(names: list[str]) -> bool:
    return any(
        name in names for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    )


def model_card(source: IndexedCheckpoint, tool: str) -> str:
    """README.md: a draft for people to finish, from the run's own config where there is one."""
    run = _run_config(source)
    base = str(run.get("model", {}).get("init_from", "")) if run else ""
    from_scratch = base == "random"
    tags = ", ".join([_tag(base), *(["lora"] if source.lora else [])]) if run else ""
    head = ["---", f"library_name: {'peft' if source.lora else 'transformers'}", f"tags: [{tags}]"]
    if base and not from_scratch and not base.startswith(("/", ".")):
        head.append(f"base_model: {json.dumps(base)}")
    title = run.get("job_name") or source.path.resolve().name
    lines = [*head, "---", "", f"# {title}", ""]
    if source.merge is not None and source.merge.other is not None:
        share = source.merge.share
        lines += [f"Every weight is {share:g} times the trained one plus {1 - share:g} times that of the base.", ""]
    if not run:
        lines += [f"Converted from {source.format} by {tool}; conversion.json says what was done to the weights."]
        return "\n".join(lines) + "\n"
    iteration = "" if source.iteration is None else f" Weights of iteration {source.iteration:,}."
    training = "pre-training from random weights" if from_scratch else f"continued pre-training of `{base}`"
    lines += [f"Draft, written by {tool}: {training}.{iteration}", ""]
    if source.lora:
        lines += ["Low-rank adapters alone, without the base model's weights.", ""]
    lines += ["## Training", "", *_training_rows(run), "", "## Data", "", *_data_rows(run), ""]
    mixed = source.merge is not None and source.merge.other is not None
    if source.run_dir is not None and not mixed:
        measured = evaluation_rows(source.run_dir, source.iteration)
        lines += ["## Evaluation", "", *measured, ""] if measured else []
    lines += [
        "## To be written by you",
        "",
        "Intended use, limits, licence of the data and of the base model.",
    ]
    return "\n".join(lines) + "\n"


def _tag(base: str) -> str:
    return "pretraining" if base == "random" else "continued-pretraining"


def _run_config(source: IndexedCheckpoint) -> dict[str, Any]:
    if source.run_config is None:
        return {}
    loaded = yaml.safe_load(source.run_config.read_text(encoding="utf-8"))
    return loaded if isinstance(loaded, dict) else {}


def _training_rows(run: dict[str, Any]) -> list[str]:
    budget, batch = run.get("budget", {}), run.get("batch", {})
    optimizer, schedule, lora = run.get("optimizer", {}), run.get("schedule", {}), run.get("lora", {})
    facts = {
        "token budget": budget.get("train_tokens"),
        "warm-up tokens": budget.get("warmup_tokens"),
        "sequence length": batch.get("seq_length"),
        "global batch size": batch.get("global_batch_size"),
        "learning rate": optimizer.get("lr"),
        "final learning rate": optimizer.get("min_lr"),
        "schedule": schedule.get("kind"),
        "seed": run.get("seed"),
        "LoRA rank": lora.get("rank"),
        "LoRA alpha": lora.get("alpha") if lora.get("rank") else None,
    }
    rows = [f"| {name} | {value:,} |" if isinstance(value, int) else f"| {name} | {value} |"
            for name, value in facts.items() if value is not None]  # fmt: skip
    return ["| | |", "|---|---|", *rows]


def _data_rows(run: dict[str, Any]) -> list[str]:
    sources = run.get("data", {}).get("train", [])
    total = sum(float(source.get("weight", 1.0)) for source in sources) or 1.0
    rows = [f"| {source.get('name')} | {float(source.get('weight', 1.0)) / total:.1%} |" for source in sources]
    return ["| source | share of training tokens |", "|---|---|", *rows]
