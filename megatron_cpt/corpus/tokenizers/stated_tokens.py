"""Tokens that a model folder states beside its tokenizer file, added as transformers' AutoTokenizer adds them.

    tokenizer_config.json   `added_tokens_decoder` {id: token}, and special tokens by name (`eos_token`, ...)
    added_tokens.json, special_tokens_map.json     the same in older folders; read when there is no decoder

A token of the decoder is added in the order of the ids, and its id must come out as stated; without a decoder so are
those of added_tokens.json and, again, of tokenizer.json, which become special when they are named. A token that is only
named is added after those. What a name or a list holds is a string, a special token, or an object with the flags.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.corpus.tokenizers.tokenizer import read_json
from megatron_cpt.errors import DataError

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = dict[str, Any]  # content and _FLAGS, as in tokenizer.json


@dataclass(frozen=True)
class StatedTokens:
    """What the files beside a tokenizer state."""

    eos: str | None
    numbered: tuple[tuple[int, Token], ...]  # in the order of the ids
    named: tuple[Token, ...]  # special tokens by name
    listed: tuple[Token, ...]  # further tokens; special where they say so
    has_decoder: bool
    where: Path  # the file that states most of it, for errors


def read_stated_tokens(folder: Path) -> StatedTokens:
    """Read what `folder` states; nothing stated gives an empty result.

    Raises:
        DataError: a file is not JSON, or holds no tokens where it should.
    """
    where = folder / "tokenizer_config.json"
    config = read_json(where) if where.is_file() else {}
    try:
        if "added_tokens_decoder" in config:
            decoder = {int(index): _token(token) for index, token in config["added_tokens_decoder"].items()}
            stated = _stated(config, {}, where)
            return replace(stated, numbered=tuple(sorted(decoder.items())), has_decoder=True)
        older = folder / "special_tokens_map.json"
        map_of_names = read_json(older) if older.is_file() else {}
        stated = _stated(config, map_of_names, where)
        if not (file := folder / "added_tokens.json").is_file():
            return stated
        where = file
        special = _special_in_older_file(config, map_of_names) | {token["content"] for token in stated.listed}
        numbered = {int(i): _of_older_file(c, c in special) for c, i in read_json(file).items()}
        return replace(stated, numbered=tuple(sorted(numbered.items())), where=file)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} does not state tokens as it should: {error!r}", hint="copy the file again") from error


def _stated(config: dict[str, Any], older: dict[str, Any], where: Path) -> StatedTokens:
    """Special tokens by name, in transformers' order (those of a model's own last), and further ones."""
    own_names = {key: value for key, value in config.items() if _names_a_token(key, value) and key not in NAMES}
    listed = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(listed, dict):
        own_names, listed = own_names | listed, []
    listed = [_token(value) for value in listed]
    names = {key: _token(config[key]) for key in NAMES if config.get(key)}
    names |= {key: _token(value) for key, value in own_names.items()}
    for key, value in older.items():
        if key in ("extra_special_tokens", "additional_special_tokens"):
            if not isinstance(value, list):
                raise ValueError(f"special_tokens_map.json: {key} is no list")
            more = [_token(token, special=True) for token in value]
            listed = listed + more if key == "extra_special_tokens" else listed or more
        elif value and key.endswith("_token") and isinstance(value, (str, dict)):
            if key in own_names and own_names[key] != value:
                raise ValueError(f"special_tokens_map.json states another {key} than tokenizer_config.json")
            names[key] = _token(value, special=True)
    ordered = [names[key] for key in (*NAMES, *(key for key in names if key not in NAMES)) if key in names]
    eos = names["eos_token"]["content"] if "eos_token" in names else None
    return StatedTokens(eos, (), tuple(_special(token) for token in ordered), tuple(listed), False, where)


def _special_in_older_file(config: dict[str, Any], map_of_names: dict[str, Any]) -> set[str]:
    """The named tokens that are special in added_tokens.json; an object of tokenizer_config.json makes none so."""
    strings = {key: value for key, value in config.items() if isinstance(value, str)} | map_of_names
    return {_token(strings[key])["content"] for key in NAMES if strings.get(key)}


def _names_a_token(key: str, value: Any) -> bool:
    """Whether a key of a configuration is a model's own token; an object is only one when it says so."""
    is_token = isinstance(value, str) or (isinstance(value, dict) and value.get("__type") == "AddedToken")
    return key.endswith("_token") and is_token


def with_numbered_tokens(raw: dict[str, Any], stated: StatedTokens) -> dict[str, Any]:
    """Return a tokenizer.json's content with the numbered tokens added; `raw` itself when it has them all.

    Raises:
        DataError: a token would get another id than the stated one.
    """
    numbered = dict(stated.numbered)
    if not stated.has_decoder:
        numbered |= {int(token["id"]): _token(token) for token in raw.get("added_tokens", [])}
    names = {token["content"] for token in stated.named}
    in_order = [token for _, token in sorted(numbered.items())]
    added = _with_tokens(raw, [_special(token) if token["content"] in names else token for token in in_order])
    ids = {token["content"]: token["id"] for token in added.get("added_tokens", [])}
    for index, token in stated.numbered:
        if (found := ids.get(token["content"])) != index:
            raise DataError(
                f"{stated.where} gives the token {token['content']!r} the id {index}, which would be "
                f"{'another token' if found is None else found} in this tokenizer",
                hint="save the tokenizer with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            )
    return added


def with_named_tokens(raw: dict[str, Any], stated: StatedTokens) -> dict[str, Any]:
    """Return a tokenizer.json's content in which every named or listed token is an added token."""
    known = {token["content"] for token in raw.get("added_tokens", [])}
    names = {token["content"] for token in stated.named}
    listed = [_special(token) if token["content"] in names else token for token in stated.listed]
    return _with_tokens(raw, [token for token in (*stated.named, *listed) if token["content"] not in known])


def _with_tokens(raw: dict[str, Any], tokens: list[Token]) -> dict[str, Any]:
    known = {token["content"]: {flag: token.get(flag) for flag in _FLAGS} for token in raw.get("added_tokens", [])}
    stays = {content for content, flags in known.items() if flags["special"]}  # once special, always special
    stays |= {token["content"] for token in tokens if token["special"]}
    tokens = [token | {"special": token["content"] in stays, "normalized": _normalized(token)} for token in tokens]
    new = [token for token in tokens if known.get(token["content"]) != {flag: token[flag] for flag in _FLAGS}]
    if not new:
        return raw
    from tokenizers import AddedToken, Tokenizer

    try:
        tokenizer = Tokenizer.from_str(orjson.dumps(raw).decode())
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"the tokenizer cannot be read: {error}", hint="copy the tokenizer again") from error
    tokenizer.add_tokens([AddedToken(**token) for token in new])
    return raw | {"added_tokens": orjson.loads(tokenizer.to_str())["added_tokens"]}


def _token(stated: Any, *, special: bool | None = None) -> Token:
    """A token with all its flags; a bare string is a special token. `special` overrides what an object says."""
    if isinstance(stated, str):
        stated, special = {"content": stated}, True
    flags = {flag: bool(stated.get(flag, False)) for flag in _FLAGS}
    is_special = flags["special"] if special is None else special
    return {"content": str(stated["content"]), **flags, "normalized": stated.get("normalized"), "special": is_special}


def _of_older_file(content: str, is_special: bool) -> Token:
    return _token({"content": content, "special": is_special, "normalized": not is_special})


def _special(token: Token) -> Token:
    return token | {"special": True}


def _normalized(token: Token) -> bool:
    """Where nothing is said a token is found in normalised text, unless it is special."""
    stated = token["normalized"]
    return not token["special"] if stated is None else bool(stated)
