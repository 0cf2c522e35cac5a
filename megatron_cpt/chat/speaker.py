"""A loaded model that continues texts, one token after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from checkpoint_convert.convert import Options, convert
from checkpoint_convert.open import open_checkpoint
from checkpoint_convert.peft import is_peft
from megatron_cpt.chat.voices import Voice, check_voice
from megatron_cpt.errors import CheckpointError, ConfigError, CptError
from megatron_cpt.eval.generate import choose
from megatron_cpt.eval.hf_model import open_hf_model

logger = logging.getLogger(__name__)

EndedBy = Literal["stop token", "max_tokens", "context", "interrupt"]
_UNFINISHED = "\ufffd"  # what a character decodes to of which only some tokens are there


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 256
    seed: int = 1234


@dataclass
class Answer:
    """What a model said. `seconds` are those of the tokens, without loading."""

    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    ended_by: EndedBy = "interrupt"

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Speaker:
    """A model with its tokenizer.

    Attributes:
        stop_ids: tokens that end a text: what the folder's configs call eos, the separator of documents among them.
    """

    def __init__(self, voice: Voice, folder: Path, model: Any, tokenizer: Any, stop_ids: frozenset[int]) -> None:
        self.voice, self.folder = voice, folder
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        self._model = model
        self._positions = int(model.config.max_position_embeddings)

    def prompt_ids(self, text: str) -> list[int]:
        """The tokens of a text to continue, as training read them: the tokenizer adds a BOS if it has one.

        Raises:
            ConfigError: it is empty.
        """
        ids = list(self.tokenizer(text)["input_ids"])
        if ids and ids[-1] in self.stop_ids and not text.endswith(self.tokenizer.decode(ids[-1:])):
            ids.pop()  # a tokenizer that ends every text
        if not ids:
            raise ConfigError("there is no text to continue", hint="write some words")
        return ids

    def turn_ids(self, turns: Sequence[dict[str, str]]) -> list[int]:
        """The tokens of a conversation by the tokenizer's chat template, up to where the model answers.

        Raises:
            ConfigError: there is no template.
        """
        if not self.tokenizer.chat_template:
            raise ConfigError(f"the tokenizer in {self.folder} has no chat template", hint="/set chat off")
        text = self.tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def say(self, prompt: Sequence[int], sampling: Sampling, answer: Answer) -> Iterator[str]:
        """Continue `prompt`; yield the pieces of text as they come and keep `answer` up to date.

        The same prompt, model and sampling give the same text.
        """
        generator = torch.Generator().manual_seed(sampling.seed)
        room = self._positions - len(prompt)
        limit = min(sampling.max_tokens, max(0, room))
        answer.prompt_tokens, answer.ended_by = len(prompt), "max_tokens" if limit == sampling.max_tokens else "context"
        ids: list[int] = []
        began = time.perf_counter()
        for token in self._next_tokens(prompt, sampling, generator, limit):
            answer.seconds = time.perf_counter() - began
            if token in self.stop_ids:
                answer.ended_by = "stop token"
                break
            ids.append(token)
            answer.tokens = len(ids)
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
            if not text.endswith(_UNFINISHED):
                piece, answer.text = text[len(answer.text) :], text
                yield piece
        rest = self.tokenizer.decode(ids, skip_special_tokens=False)[len(answer.text) :]
        if rest:  # half a character at the end is shown as what it is
            answer.text += rest
            yield rest

    def _next_tokens(
        self, prompt: Sequence[int], sampling: Sampling, generator: torch.Generator, limit: int
    ) -> Iterator[int]:
        device = next(self._model.parameters()).device
        inputs, cache = torch.tensor([list(prompt)]), None
        for _ in range(limit):
            with torch.inference_mode():
                told = self._model(input_ids=inputs.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = told.past_key_values
            inputs = choose(told.logits[:, -1].float().cpu(), sampling.temperature, sampling.top_p, generator)[:, None]
            yield int(inputs)


def load_speaker(voice: Voice) -> Speaker:
    """Load a model; a checkpoint is exported first, into the folder of its run, and found there the next time.

    Raises:
        CptError: transformers or peft is not installed; a folder that cannot be opened; no room for the export.
    """
    check_voice(voice)
    folder = _exported(voice)
    model = _open(voice, folder)
    tokenizer_folder = folder if not is_peft(folder) or (folder / "tokenizer_config.json").is_file() else voice.base
    tokenizer = _tokenizer(tokenizer_folder or folder)
    return Speaker(voice, folder, model, tokenizer, _stop_ids(model, tokenizer))


def _exported(voice: Voice) -> Path:
    if voice.export is None:
        return voice.path
    if not voice.export.exists():
        logger.info("exporting %s to %s, where it is found the next time", voice.path, voice.export)
        voice.export.parent.mkdir(parents=True, exist_ok=True)
        convert(open_checkpoint(voice.path, adapters=True), voice.export, Options(to="peft" if voice.alone else "hf"))
    return voice.export


def _open(voice: Voice, folder: Path) -> Any:
    logger.info("loading %s", folder)
    if not is_peft(folder):
        return open_hf_model(folder).module
    try:
        from peft import PeftModel
    except ImportError as error:
        raise CptError("adapters are loaded by the package peft", hint="pip install 'megatron-cpt[eval]'") from error
    assert voice.base is not None
    return PeftModel.from_pretrained(open_hf_model(voice.base).module, str(folder)).eval()


def _tokenizer(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"transformers finds no tokenizer in {folder}: {error}", hint="copy the base model's tokenizer files there"
        ) from error


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    found = (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id)
    return frozenset(
        token for one in found for token in (one if isinstance(one, list | tuple) else [one]) if token is not None
    )


def same_tokens(one: Speaker, other: Speaker) -> bool:
    """Whether two models read text as the same tokens."""
    return bool(one.tokenizer.get_vocab() == other.tokenizer.get_vocab())
