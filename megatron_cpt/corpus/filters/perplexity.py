"""Documents that a small language model finds too unlikely are dropped (after CCNet, Wenzek et al. 2019).

The perplexity of a document is exp of the mean loss of its first tokens after the very first, by a Hugging Face causal
model in fp32 on one thread of the CPU. Each document is scored alone, so that the answer does not depend on its
neighbours or on the number of workers.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.schema_processing import Perplexity
from megatron_cpt.errors import DataError

Scorer = Callable[[str], float | None]

# Characters per wanted token: of a long document only this many are tokenised.
_CHARS_PER_TOKEN = 16


class PerplexityCeiling:
    """A step that rejects documents over the ceiling. The model is loaded by the process that first needs it."""

    def __init__(self, settings: Perplexity) -> None:
        """Raises DataError when the model cannot be used, before any document is read."""
        self._settings = settings
        self._score: Scorer | None = None
        _check(settings)

    def __call__(self, batch: Batch, tally: UnitTally) -> Batch:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the workers share the cores; and more threads may round differently
        try:
            if self._score is None:
                self._score = load_scorer(self._settings)
            return self._filter(batch, tally, self._score)
        finally:
            torch.set_num_threads(threads)

    def _filter(self, batch: Batch, tally: UnitTally, score: Scorer) -> Batch:
        wanted = []
        for text, place in zip(batch.texts, batch.places, strict=True):
            value = score(text)
            wanted.append(value is None or value <= self._settings.max_perplexity)
            if not wanted[-1]:
                tally.reject(
                    batch.path,
                    place,
                    "perplexity",
                    f"{value:.1f}, allowed at most {self._settings.max_perplexity:g}: {text}",
                )
        return batch.keep(wanted)


def load_scorer(settings: Perplexity) -> Scorer:
    """A function from text to perplexity; None for a text of fewer than two tokens, of which nothing can be said."""
    import torch

    model = _load_model(settings.model)
    tokenizer = _load_tokenizer(settings.model)
    largest, rows = max(tokenizer.get_vocab().values(), default=0), model.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise DataError(
            f"filters.perplexity: the tokenizer in {settings.model} has ids up to {largest:,}, the model {rows:,} rows",
            hint="give a folder whose tokenizer.json is the model's",
        )

    @torch.inference_mode()
    def score(text: str) -> float | None:
        ids = tokenizer.encode(text[: settings.max_tokens * _CHARS_PER_TOKEN]).ids[: settings.max_tokens]
        if len(ids) < 2:
            return None
        inputs = torch.tensor([ids])
        logits = model(input_ids=inputs, use_cache=False).logits[0, :-1].float()
        mean_loss = torch.nn.functional.cross_entropy(logits, inputs[0, 1:]).item()
        return math.exp(mean_loss) if mean_loss < 700 else math.inf

    return score


def _load_model(folder: str) -> Any:
    """Raises DataError when the weights cannot be read or do not cover the model exactly."""
    import torch

    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # of several libraries, some of which raise bare Exception
        raise DataError(
            f"filters.perplexity: transformers cannot open {folder}: {error}", hint="give a whole model folder"
        ) from error
    if wrong := {kind: sorted(names) for kind, names in report.items() if names}:
        raise DataError(f"filters.perplexity: the weights in {folder} do not fit its config.json: {wrong}")
    return model.eval()


def _load_tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"filters.perplexity: {folder}/tokenizer.json is not a tokenizer: {error}", hint="copy the model again"
        ) from error


def _check(settings: Perplexity) -> None:
    """What can be known without loading the model."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise DataError(
                f"the perplexity filter needs the package {package}", hint="pip install 'megatron-cpt[eval]'"
            )
    for name in ("config.json", "tokenizer.json"):
        if not (Path(settings.model) / name).is_file():
            raise DataError(
                f"filters.perplexity: {settings.model} has no {name}",
                hint="give the folder of a Hugging Face causal language model with its tokenizer.json",
            )
    try:
        stated = dict(json.loads((Path(settings.model) / "config.json").read_bytes())).get("max_position_embeddings")
        positions = None if stated is None else int(stated)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"filters.perplexity: {settings.model}/config.json is damaged: {error}",
            hint="copy the model again",
        ) from error
    _load_tokenizer(settings.model)
    if positions is not None and settings.max_tokens > positions:
        raise DataError(
            f"filters.perplexity: max_tokens {settings.max_tokens} is more than the {positions} positions of "
            f"{settings.model}",
            hint=f"set max_tokens to {positions} or less",
        )
