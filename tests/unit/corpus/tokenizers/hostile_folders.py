"""Model folders at random whose files contradict each other, and AutoTokenizer's word on each.

    PYTHONPATH=. python tests/unit/corpus/tokenizers/hostile_folders.py 1000 [FIRST_SEED]

Prints, of that many folders, how many gave AutoTokenizer's ids and how many were refused; exits 1 on a difference.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, Literal

import orjson

from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.errors import CptError
from tests.unit.corpus.conftest import TEXTS, build_tokenizer

Json = dict[str, Any]
Mode = Literal["parse", "literal"]

SIZE = 403  # ids of the tiny tokenizer, its special tokens included
KNOWN = {"<|endoftext|>": 400, "<|im_start|>": 401, "<|im_end|>": 402}
CONTENTS = (
    "<molecule>",
    "<|doc_end|>",
    "<|pad|>",
    "ab",
    "the",
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_start|>",
    " x",
    "É",
)
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token", "image_token")
LISTS = ("extra_special_tokens", "additional_special_tokens")
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer", None)
CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer")
CLASSES += ("GemmaTokenizer", "BertTokenizer", "GPTNeoXTokenizer", "CodeLlamaTokenizer", "NoSuchTokenizer")
MODEL_TYPES = ("qwen2", "qwen3", "llama", "gpt2", "gemma2", "mistral", "olmo2", "no_such_model", None)
SETTINGS: Json = {
    "add_prefix_space": [True, False], "do_lower_case": [True, False], "add_bos_token": [True, False],
    "add_eos_token": [True, False], "legacy": [True, False], "from_slow": [True, False], "use_fast": [False],
    "split_special_tokens": [True, False], "clean_up_tokenization_spaces": [True, False], "errors": ["replace"],
    "model_max_length": [16, 1 << 60], "padding_side": ["left"], "fix_mistral_regex": [True], "strip_accents": [True],
    "tokenizer_file": ["/nowhere/tokenizer.json"], "name_or_path": ["x/y"], "chat_template": ["{{ x }}"],
}  # fmt: skip
TEXT_PARTS = (
    *CONTENTS,
    " ",
    "  ",
    "\n",
    "a",
    "A b",
    "The quick",
    "x",
    "_",
    "É",
    "e\u0301",
    "\u00a0",
    "▁",
    "日本",
    "12345",
    "s</s>",
)
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def hostile_texts(seed: int, count: int = 40) -> list[str]:
    rng = random.Random(seed)
    texts = ["".join(rng.choice(TEXT_PARTS) for _ in range(rng.randrange(1, 12))) for _ in range(count)]
    return [*texts, *TEXTS, "", " lead", "UPPER <MOLECULE>"]


@cache
def _base() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return (build_tokenizer(Path(folder)) / "tokenizer.json").read_bytes()


class _Dice:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def often(self, share: float) -> bool:
        return self.rng.random() < share

    def token(self, content: str) -> Json:
        flags = {flag: self.often(0.25) for flag in FLAGS if self.often(0.8)}
        return {"content": content} | flags | ({"special": self.often(0.5)} if self.often(0.8) else {})

    def named(self) -> str | Json:
        content = self.rng.choice(CONTENTS)
        token = self.token(content)
        return token | ({"__type": "AddedToken"} if self.often(0.7) else {}) if self.often(0.5) else content

    def names(self) -> Json:
        keys: Json = {name: self.named() for name in NAMES if self.often(0.2)}
        for name in LISTS:
            if self.often(0.2):
                values = [self.named() for _ in range(self.rng.randrange(3))]
                keys[name] = values if self.often(0.8) else {f"k{i}_token": value for i, value in enumerate(values)}
        return keys

    def numbered(self) -> dict[str, int]:
        """Tokens with the id that they would get, now and then with another."""
        out, following = {}, SIZE
        for content in self.rng.sample(CONTENTS, self.rng.randrange(4)):
            index = KNOWN.get(content, following)
            following += index == following
            out[content] = index + (self.rng.choice([7, -300]) if self.often(0.05) else 0)
        return out


def write_folder(folder: Path, seed: int) -> None:
    """A folder with a tokenizer.json and any of the files that AutoTokenizer reads beside it."""
    dice = _Dice(seed)
    rng = dice.rng
    folder.mkdir(parents=True)
    raw = orjson.loads(_base())
    if dice.often(0.3):
        _alter(raw, dice)
    config: Json = {"eos_token": "<|endoftext|>"} | dice.names()
    config["tokenizer_class"] = rng.choice(CLASSES if dice.often(0.3) else PLAIN_CLASSES)
    if config["tokenizer_class"] is None:
        del config["tokenizer_class"]
    if dice.often(0.6):
        config["added_tokens_decoder"] = {str(index): dice.token(c) for c, index in dice.numbered().items()}
    config |= {key: rng.choice(values) for key, values in SETTINGS.items() if dice.often(0.12)}
    files: Json = {"tokenizer": raw, "tokenizer_config": config, "generation_config": {"eos_token_id": [7, 401]}}
    if dice.often(0.4):
        files["added_tokens"] = dice.numbered()
    if dice.often(0.4):
        files["special_tokens_map"] = dice.names()
    model_type = rng.choice(MODEL_TYPES)
    if model_type is None and "tokenizer_class" not in config:
        model_type = "llama"  # AutoTokenizer needs either
    if model_type is not None:
        files["config"] = {"model_type": model_type} | (
            {"tokenizer_class": rng.choice(CLASSES)} if dice.often(0.1) else {}
        )
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def _alter(raw: Json, dice: _Dice) -> None:
    """Another pipeline than the one that the classes of the Qwen2 family build, or other added tokens."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    changes: list[Json] = [
        {"normalizer": None}, {"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": metaspace},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}},
        {"normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}},
        {"added_tokens": [t | {dice.rng.choice([*FLAGS, "special"]): dice.often(0.5)} for t in raw["added_tokens"]]},
        {"added_tokens": [*raw["added_tokens"], {"id": SIZE, "content": "<molecule>"} | dict.fromkeys(
            (*FLAGS, "special"), False)]},
    ]  # fmt: skip
    raw.update(dice.rng.choice(changes))


def their_ids(folder: Path, texts: list[str], mode: Mode) -> list[list[int]]:
    """AutoTokenizer's ids; raises what it raises."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    keys = {"split_special_tokens": mode == "literal", "add_special_tokens": False}
    return [tokenizer(text, **keys).input_ids for text in texts]


def our_ids(folder: Path, texts: list[str], mode: Mode) -> list[list[int]]:
    tokenizer = load_tokenizer(folder, special_tokens_in_text=mode, backend="reference")
    return [tokenizer.encode_batch([text])[0].tolist() for text in texts]


def verdict(folder: Path, seed: int) -> tuple[str, str]:
    """Return "equal", "refused" (why), "theirs fails" (why) or "differs" (where)."""
    texts, mode = hostile_texts(seed), random.Random(seed).choice(["parse", "literal"])
    try:
        if mode == "literal":  # the EOD is split by its role, though a folder may say that it is plain
            eod = load_tokenizer(folder, backend="reference").eod_token
            texts = [text.replace(eod, "") for text in texts]
        ours = our_ids(folder, texts, mode)
    except CptError as error:
        assert error.hint, error
        return "refused", error.message
    try:
        theirs = their_ids(folder, texts, mode)
    except Exception as error:
        return "theirs fails", f"{type(error).__name__}: {error}"
    for text, our, their in zip(texts, ours, theirs, strict=True):
        if our != their:
            return "differs", f"{mode} {text!r}: ours {our}, theirs {their}"
    return "equal", ""


def main() -> None:
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    tally: Counter[str] = Counter()
    work = Path(tempfile.mkdtemp())
    for seed in range(first, first + count):
        write_folder(work / str(seed), seed)
        outcome, why = verdict(work / str(seed), seed)
        tally[outcome] += 1
        if outcome in ("differs", "theirs fails"):
            print(seed, outcome, why[:300])
        shutil.rmtree(work / str(seed))
    print(dict(tally))
    sys.exit(tally["differs"] > 0)


if __name__ == "__main__":
    main()
