"""The tokenizer class that a model folder names, and whether it leaves the ids of tokenizer.json as they are.

AutoTokenizer of transformers 5 takes tokenizer.json as it stands for its general class; a class of a model keeps only
vocabulary and merges, builds normaliser and pre-tokenizer itself, and adds special tokens of its own. Such a folder is
read when the class is in CLASSES and builds what tokenizer.json says; any other is refused, as its ids would not be
AutoTokenizer's. The rules are those of transformers' models/auto/tokenization_auto.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.corpus.tokenizers.stated_tokens import NAMES, StatedTokens, Token
from megatron_cpt.corpus.tokenizers.tokenizer import read_json
from megatron_cpt.errors import DataError

Json = dict[str, Any]

_GENERAL = "TokenizersBackend"
_GENERAL_NAMES = frozenset({"TokenizersBackend", "PythonBackend", "PreTrainedTokenizer"})  # "Fast" left out
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"


@dataclass(frozen=True)
class _Class:
    """What a class builds, whatever tokenizer.json says, as that file would say it."""

    normalizer: Json | None
    pre_tokenizer: Callable[[Mapping[str, Any]], Json]  # of the settings in tokenizer_config.json
    model: Json  # options of the BPE that are on
    tokens: dict[str, str]  # special tokens that it has where the folder names none
    adds_again: bool = False  # every special token, without flags


def _byte_level(settings: Mapping[str, Any], *, use_regex: bool = True) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": bool(settings.get("add_prefix_space")), "use_regex": use_regex}


def _qwen2(settings: Mapping[str, Any]) -> Json:
    split = {"type": "Split", "pattern": {"Regex": _QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(settings, use_regex=False)]}


def _llama(settings: Mapping[str, Any]) -> Json:
    prefix = settings.get("add_prefix_space")
    scheme = "never" if prefix is not None and not prefix else "always" if settings.get("legacy") else "first"
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def _gemma(_: Mapping[str, Any]) -> Json:
    return {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


_BYTE_FALLBACK = {"fuse_unk": True, "byte_fallback": True}
CLASSES = {
    "Qwen2Tokenizer": _Class(
        {"type": "NFC"}, _qwen2, {}, dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END), adds_again=True
    ),
    "LlamaTokenizer": _Class(
        None, _llama, _BYTE_FALLBACK, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    ),
    "GPT2Tokenizer": _Class(None, _byte_level, {}, dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END)),
    "GPTNeoXTokenizer": _Class(
        {"type": "NFC"}, _byte_level, {},
        dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END) | {"pad_token": "<|padding|>"},
    ),
    "GemmaTokenizer": _Class(
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, _gemma,
        _BYTE_FALLBACK | {"unk_token": "<unk>"},
        {f"{name}_token": f"<{name}>" for name in ("unk", "bos", "eos", "pad", "mask")},
    ),
}  # fmt: skip
# The class of a model_type; it counts where tokenizer_config.json names none, and for some against what it names.
_OF_MODEL = {
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"), "Qwen2Tokenizer"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp"), "Qwen3_5Tokenizer"),
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "phi", "starcoder2", "hyperclovax_vision_v2"), "GPT2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("gpt_neox", "olmo", "olmoe", "mamba"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("mistral", "mixtral", "ministral", "granite", "olmo2", "olmo3", "phi3", "stablelm"), _GENERAL),
    "siglip2": "Siglip2Tokenizer",
    "llama": "",  # what tokenizer_config.json names
}
_MODEL_OVER_NAME = frozenset(
    ("qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "hyperclovax_vision_v2", "siglip2")
)
_PATCHED_VOCABULARY = 90_000  # transformers patches vocabularies of more than 100,000, added tokens among them
_MISTRALS = ("mistral", "mixtral", "ministral")


def check_stated_class(folder: Path, raw: Json, stated: StatedTokens) -> None:
    """Raise DataError when AutoTokenizer would make other ids of `folder` than its tokenizer.json `raw` says.

    `raw` has the numbered tokens of `stated` already.
    """
    settings = _json_if_there(folder / "tokenizer_config.json")
    name = _class_name(settings, _json_if_there(folder / "config.json"), _is_byte_level(raw.get("pre_tokenizer")))
    if reason := _of_settings(settings, raw) or (_of_class(name, settings, raw, stated) if name != _GENERAL else None):
        raise DataError(
            f"{folder}: AutoTokenizer would give other ids than tokenizer.json: {reason}",
            hint="for AutoTokenizer's ids, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW) of transformers; "
            'for those of tokenizer.json, copy FOLDER\'s tokenizer files to NEW; then set "tokenizer_class": '
            '"PreTrainedTokenizerFast" in NEW/tokenizer_config.json, take auto_map, fast_tokenizer_files and '
            "fix_mistral_regex out of it, and give NEW, which has no config.json",
        )


def _json_if_there(file: Path) -> Json:
    return read_json(file) if file.is_file() else {}


def _class_name(settings: Json, model: Json, is_byte_level: bool) -> str:
    """The class that AutoTokenizer builds; one that is not in CLASSES where that is not known here."""
    named = str(settings.get("tokenizer_class") or model.get("tokenizer_class") or "").removesuffix("Fast")
    model_type = str(model.get("model_type") or "")
    own = _OF_MODEL.get(model_type)
    if (
        named == "LlamaTokenizer"
        and is_byte_level
        and own is not None
        and model_type not in (*_MODEL_OVER_NAME, "phi3")
    ):
        return named if model_type in _MISTRALS else _GENERAL
    if not named:
        return own or (_GENERAL if model_type in ("", "llama") else f"the class of model_type {model_type!r}")
    if model_type in _MODEL_OVER_NAME and own:
        return own
    if named in _GENERAL_NAMES or own == _GENERAL:
        return _GENERAL
    return named


def _is_byte_level(pre_tokenizer: Any) -> bool:
    if not isinstance(pre_tokenizer, dict):
        return False
    parts = pre_tokenizer.get("pretokenizers", [])
    return pre_tokenizer.get("type") == "ByteLevel" or any(map(_is_byte_level, parts))


def _of_settings(settings: Json, raw: Json) -> str | None:
    if "auto_map" in settings:
        return "tokenizer_config.json names code of its own under auto_map"
    if any(file != "tokenizer.json" for file in settings.get("fast_tokenizer_files") or ()):
        return "tokenizer_config.json names other files under fast_tokenizer_files"
    if settings.get("fix_mistral_regex") and len(raw.get("model", {}).get("vocab", ())) > _PATCHED_VOCABULARY:
        return "tokenizer_config.json states fix_mistral_regex"
    return None


def _of_class(name: str, settings: Json, raw: Json, stated: StatedTokens) -> str | None:
    """Why the class does not give what tokenizer.json says; None when it does."""
    if (built := CLASSES.get(name)) is None:
        return f"{name} may build another tokenizer than tokenizer.json says"
    model = raw.get("model", {})
    options = {key: value for key, value in model.items() if key not in ("vocab", "merges") and value}
    parts = {
        "model": (
            options.get("type", "BPE") == "BPE" and {k: v for k, v in options.items() if k != "type"},
            built.model,
        ),
        "normalizer": (raw.get("normalizer"), built.normalizer),
        "pre_tokenizer": (_comparable(raw.get("pre_tokenizer")), built.pre_tokenizer(settings)),
    }
    if differing := [part for part, (states, builds) in parts.items() if states != builds]:
        return f"{name} builds another {' and '.join(differing)}"
    return _of_tokens(name, built, settings, raw, stated)


def _of_tokens(name: str, built: _Class, settings: Json, raw: Json, stated: StatedTokens) -> str | None:
    added = {str(token["content"]): token for token in raw.get("added_tokens", [])}
    numbered = {token["content"] for _, token in stated.numbered}
    if stated.has_decoder and (lost := [content for content in added if content not in numbered]):
        return f"{name} has only the tokens of added_tokens_decoder, where {lost[0]!r} is missing"
    stated_names = {key for key in NAMES if key in settings}
    defaults = [content for key, content in built.tokens.items() if key not in stated_names]
    named = [*defaults, *(token["content"] for token in (*stated.named, *stated.listed))]
    if new := [content for content in named if content not in added]:
        return f"{name} adds the token {new[0]!r}, which tokenizer.json does not have"
    if built.adds_again and (changed := [content for content in named if not _is_plain_special(added[content])]):
        return f"{name} makes {changed[0]!r} a special token without other flags, which it is not in tokenizer.json"
    return None


def _is_plain_special(token: Token) -> bool:
    return bool(token.get("special")) and not any(
        token.get(flag) for flag in ("lstrip", "rstrip", "single_word", "normalized")
    )


def _comparable(part: Any) -> Any:
    """A pre-tokenizer without what does not change ids, and with what is the default."""
    if not isinstance(part, dict):
        return part
    out = {key: value for key, value in part.items() if key != "trim_offsets"}
    if out.get("type") == "ByteLevel":
        out.setdefault("use_regex", True)
    if "pretokenizers" in out:
        out["pretokenizers"] = [_comparable(inner) for inner in out["pretokenizers"]]
    return out
