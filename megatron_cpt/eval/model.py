"""Run whatever `megatron-cpt eval` is given: a Hugging Face directory, a Megatron checkpoint or a run folder."""

from __future__ import annotations

from checkpoint_convert.checkpoint import IndexedCheckpoint
from megatron_cpt.errors import CheckpointError
from megatron_cpt.eval.scorer import Scorer


def load_scorer(found: IndexedCheckpoint, seq_length: int, *, document_attention: bool = False) -> Scorer:
    """Load the model: a Hugging Face directory into transformers, a torch_dist checkpoint into Megatron-Core.

    Raises:
        CheckpointError: weights that are damaged, or a format that only the converter reads.
    """
    if found.format == "hf":
        from megatron_cpt.eval.hf_model import open_hf_model

        return open_hf_model(found.path)
    if found.format == "torch_dist" and not found.gammas_less_one:
        from megatron_cpt.eval.megatron_model import megatron_scorer

        return megatron_scorer(found.path, found.arch, seq_length, document_attention)
    what = f"a {found.format} checkpoint" + (", its norms stored minus 1" if found.gammas_less_one else "")
    raise CheckpointError(
        f"{found.path} is {what}, which is only read by the converter",
        hint=f"megatron-cpt convert {found.path} DIR --to hf, then evaluate DIR",
    )
