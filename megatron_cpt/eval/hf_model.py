"""Score token blocks with plain `transformers`, as any user of the exported model would run it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_cpt.errors import CheckpointError, CptError
from megatron_cpt.eval.perplexity import BlockScorer


def hf_scorer(model_dir: Path) -> BlockScorer:
    """Open a Hugging Face directory in the dtype of its weights, on the GPU where there is one.

    Raises:
        CheckpointError: the directory cannot be opened, or its weights do not cover the model exactly.
        CptError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise CptError(
            "evaluating a Hugging Face directory needs the package transformers",
            hint="pip install 'megatron-cpt[eval]'",
        ) from error
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            model_dir, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"transformers cannot open {model_dir}: {error}", hint="is it a whole Hugging Face directory?"
        ) from error
    wrong = {kind: sorted(names) for kind, names in report.items() if names}
    if wrong:
        raise CheckpointError(f"the weights in {model_dir} do not fit its config.json: {wrong}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()

    @torch.inference_mode()
    def score(inputs: torch.Tensor, labels: torch.Tensor) -> float:
        logits = model(input_ids=inputs.to(device), use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.to(device).flatten(), reduction="none")
        return float(losses.double().sum())

    return score
