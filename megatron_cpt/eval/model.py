"""Open whatever `megatron-cpt eval` is given: a Hugging Face directory, a Megatron checkpoint or a run folder."""

from __future__ import annotations

from pathlib import Path

from checkpoint_convert.sources import open_checkpoint
from megatron_cpt.errors import CheckpointError
from megatron_cpt.eval.perplexity import LoadedModel


def load_model(path: Path) -> tuple[LoadedModel, Path]:
    """The model at `path`, and the directory of its tokenizer.

    Raises:
        CheckpointError, ConversionError: nothing there, or nothing that can be run.
    """
    found = open_checkpoint(path)
    if found.format == "hf":
        from megatron_cpt.eval.hf_model import load_hf_model

        return load_hf_model(found.path), found.side_dir
    if found.format == "torch_dist":
        from megatron_cpt.eval.megatron_model import load_megatron_model

        return load_megatron_model(found.path, found.arch), found.side_dir
    raise CheckpointError(
        f"{path} is a {found.format} checkpoint, which is only read by conversion",
        hint=f"megatron-cpt convert {path} DIR --to hf, then evaluate DIR",
    )
