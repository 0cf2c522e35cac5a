"""`megatron-cpt init`: a commented config.yaml and corpus.yaml for a model and a machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.config.derive import derive
from megatron_cpt.config.load import build_config
from megatron_cpt.config.yaml_file import parse_yaml
from megatron_cpt.corpus.schema import parse_corpus
from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import ConfigError
from megatron_cpt.launch.base_model import sign_of_instruct
from megatron_cpt.launch.environment import count_nvidia_gpus
from megatron_cpt.presets import find_preset, layout, presets
from megatron_cpt.presets.starter import Starter, config_text, corpus_text

DEFAULT_PRESET = "qwen2.5-0.5b"


@click.command()
@click.option("--from", "model_dir", type=click.Path(path_type=Path), help="Hugging Face directory of the model.")
@click.option("--preset", help="A known model instead, whose weights may be elsewhere: --list names them.")
@click.option("--gpus", type=click.IntRange(min=1), help="GPUs of the job.  [default: those of this machine, or 1]")
@click.option("--to", "folder", type=click.Path(path_type=Path), default=Path(), help="Folder of the two files.")
@click.option("--list", "list_presets", is_flag=True, help="List the presets.")
def init(model_dir: Path | None, preset: str | None, gpus: int | None, folder: Path, list_presets: bool) -> None:
    """Write a commented config.yaml and corpus.yaml for a model on a number of 80 GB GPUs.

    \b
      megatron-cpt init --from /models/Qwen2.5-7B --gpus 8
      megatron-cpt init --preset llama-3.1-70b --gpus 32 --to jobs/llama
    Both files are checked as `plan` and `preprocess` check them; nothing that is there is replaced.
    """
    if list_presets:
        for known in presets().values():
            click.echo(f"{known.name:<15} {known.hub:<30} {known.parameters_millions / 1000:6.2f} billion parameters")
        return
    if model_dir is not None and preset is not None:
        raise click.UsageError("give --from or --preset, not both\nhint: --from reads the model's own config.json")
    starter, files = _starter(model_dir, preset, gpus or max(1, count_nvidia_gpus()), folder)
    files |= {"config.yaml": config_text(starter), "corpus.yaml": corpus_text(starter)}
    _check(starter, files)
    _write(folder, files)
    for name in files:
        click.echo(folder / name)
    click.echo(f"edit what is marked EDIT, then: megatron-cpt plan {folder / 'config.yaml'}")


def _starter(model_dir: Path | None, preset: str | None, gpus: int, folder: Path) -> tuple[Starter, dict[str, str]]:
    """What to write for, and the files that it needs beside the two."""
    if model_dir is not None:
        arch = read_architecture(model_dir)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", model_dir.resolve().name).strip("-._") or "model"
        sign = sign_of_instruct(model_dir)
        return Starter(name, arch, gpus, str(model_dir), None, sign, layout(arch, gpus)), {}
    known = find_preset(preset or DEFAULT_PRESET)
    arch = known.architecture
    here = folder / "model"
    init_from = f"/models/{known.hub.split('/')[1]}"
    sign = "no base model of it is published" if known.instruct_only else None
    starter = Starter(known.name, arch, gpus, init_from, str(here), sign, layout(arch, gpus))
    return starter, {"model/config.json": json.dumps(known.hf_config, indent=2) + "\n"}


def _check(starter: Starter, files: dict[str, str]) -> None:
    """What is written is valid: the checks of `plan` and `preprocess` on the very texts."""
    config = build_config(parse_yaml(files["config.yaml"]), origin="config.yaml")
    derive(config, starter.arch, origin="config.yaml")
    parse_corpus(parse_yaml(files["corpus.yaml"]), "corpus.yaml")


def _write(folder: Path, files: dict[str, str]) -> None:
    present = [name for name in files if (folder / name).exists()]
    if present:
        raise ConfigError(
            f"{folder / present[0]} is there already and is not replaced",
            hint="another folder: --to FOLDER, or move it away",
        )
    try:
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name, text.encode())
    except OSError as error:
        raise ConfigError(
            f"cannot write {folder / name}: {error.strerror}", hint="--to names another folder"
        ) from error
