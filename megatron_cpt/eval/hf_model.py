"""Score tokens with plain `transformers`, as any user of the exported model would run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_cpt.errors import CheckpointError, CptError
from megatron_cpt.eval.scorer import Likelihoods, likelihoods_of


def open_hf_model(model_dir: Path, dtype: str = "auto") -> HfModel:
    """Open a Hugging Face directory in `dtype`, "auto" being that of its weights, on the GPU where there is one.

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
            model_dir, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"transformers cannot open {model_dir}: {error}", hint="is it a whole Hugging Face directory?"
        ) from error
    wrong = {kind: sorted(names) for kind, names in report.items() if names}
    if wrong:
        raise CheckpointError(f"the weights in {model_dir} do not fit its config.json: {wrong}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return HfModel(model.to(device).eval(), device)


class HfModel:
    """See `Scorer` and `TaskModel`."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model, self._device = model, device

    @property
    def module(self) -> Any:
        """The model of transformers itself, for what runs it in another way."""
        return self._model

    @torch.inference_mode()
    def nll(self, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
        tokens = tokens.to(self._device)
        mask = None if document_ids is None else self._mask(document_ids.to(self._device))
        logits = self._model(input_ids=tokens[:, :-1], attention_mask=mask, use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        return losses.view(len(tokens), -1)

    @torch.inference_mode()
    def likelihoods(self, inputs: Tensor, first: int, labels: Tensor, rows: Tensor) -> Likelihoods:
        places = torch.arange(first, inputs.shape[1], device=self._device)
        logits = self._logits(inputs.to(self._device), places)
        return likelihoods_of(logits, labels.to(self._device), rows.to(self._device))

    @torch.inference_mode()
    def next_logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        places, rows = lengths.unique(return_inverse=True)
        logits = self._logits(tokens[:, : int(lengths.max())].to(self._device), (places - 1).to(self._device))
        return logits.float().cpu()[torch.arange(len(tokens)), rows]

    def _logits(self, inputs: Tensor, places: Tensor) -> Tensor:
        """[b, n] -> [b, number of places, vocabulary]; the output layer sees no other place."""
        logits: Tensor = self._model(input_ids=inputs, logits_to_keep=places, use_cache=False).logits
        return logits

    def _mask(self, document_ids: Tensor) -> Tensor:
        """[b, n] -> [b, 1, n, n], added to the attention scores: earlier tokens of the same document are seen."""
        length = document_ids.shape[1]
        seen = document_ids[:, :, None] == document_ids[:, None, :]
        seen &= torch.ones(length, length, dtype=torch.bool, device=self._device).tril()
        lowest = torch.finfo(self._model.dtype).min
        return torch.zeros(seen.shape, dtype=self._model.dtype, device=self._device).masked_fill(~seen, lowest)[:, None]
