"""Tokens that a model folder states beside its tokenizer file, added as transformers' AutoTokenizer adds them.

    tokenizer_config.json   `added_tokens_decoder` {id: token}, and special tokens by name (`eos_token`, ...)
    added_tokens.json, special_tokens_map.json     the same in older folders; read when there is no decoder

A token of the decoder is added in the order of the ids; its id must come out as stated. A special token that is only
named is added after those, and only matters where special tokens spelled in the text become ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.corpus.tokenizers.tokenizer import read_json
from megatron_cpt.errors import DataError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = dict[str, Any]  # content and _FLAGS, as in tokenizer.json


@dataclass(frozen=True)
class StatedTokens:
    """What the files beside a tokenizer state."""

    eos: str | None
    numbered: tuple[tuple[int, Token], ...]  # in the order of the ids
    named: tuple[Token, ...]  # special tokens
    where: Path  # the file that states most of it, for errors


def read_stated_tokens(folder: Path) -> StatedTokens:
    """Read what `folder` states; nothing stated gives an empty result.

    Raises:
        DataError: a file is not JSON, or holds no tokens where it should.
    """
    where = folder / "tokenizer_config.json"
    config = read_json(where) if where.is_file() else {}
    numbered = config.get("added_tokens_decoder")
    try:
        if numbered is None:
            older = folder / "special_tokens_map.json"
            config |= read_json(older) if older.is_file() else {}
            named = _named(config)
            where = folder / "added_tokens.json" if (folder / "added_tokens.json").is_file() else where
            numbered = _of_added_tokens_file(where, {token["content"] for token in named})
        else:
            numbered = {int(index): _token(token) for index, token in numbered.items()}
            named = _named(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} does not state tokens as it should: {error!r}", hint="copy the file again") from error
    eos = _content(config.get("eos_token"))
    return StatedTokens(eos, tuple(sorted(numbered.items())), named, where)


def with_numbered_tokens(raw: dict[str, Any], stated: StatedTokens) -> dict[str, Any]:
    """Return a tokenizer.json's content with the numbered tokens added; `raw` itself when it has them all.

    Raises:
        DataError: a token would get another id than the stated one.
    """
    added = _with_tokens(raw, [token for _, token in stated.numbered])
    ids = {token["content"]: token["id"] for token in added.get("added_tokens", [])}
    for index, token in stated.numbered:
        if ids[token["content"]] != index:
            raise DataError(
                f"{stated.where} gives the token {token['content']!r} the id {index}, which would be "
                f"{ids[token['content']]} in this tokenizer",
                hint="save the tokenizer with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            )
    return added


def with_named_tokens(raw: dict[str, Any], stated: StatedTokens) -> dict[str, Any]:
    """Return a tokenizer.json's content in which every named special token is an added token."""
    known = {token["content"] for token in raw.get("added_tokens", [])}
    return _with_tokens(raw, [token for token in stated.named if token["content"] not in known])


def _content(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _with_tokens(raw: dict[str, Any], tokens: list[Token]) -> dict[str, Any]:
    known = {token["content"]: {flag: token.get(flag) for flag in _FLAGS} for token in raw.get("added_tokens", [])}
    stays = {content for content, flags in known.items() if flags["special"]}  # once special, always special
    tokens = [token | {"special": token["special"] or token["content"] in stays} for token in tokens]
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


def _token(stated: Any, *, special: bool = False) -> Token:
    """A token with all its flags; a bare string is a special token."""
    if isinstance(stated, str):
        stated = {"content": stated, "special": True}
    is_special = bool(stated.get("special", special))
    flags = {flag: bool(stated.get(flag, False)) for flag in _FLAGS}
    return {
        "content": str(stated["content"]),
        **flags,
        "normalized": bool(stated.get("normalized", not is_special)),
        "special": is_special,
    }


def _named(config: dict[str, Any]) -> tuple[Token, ...]:
    """Special tokens by name, in transformers' order; lists of further ones last."""
    values = [config.get(name) for name in _NAMED]
    for name in _LISTS:
        more = config.get(name) or []
        values += list(more.values()) if isinstance(more, dict) else list(more)
    tokens = [_token(value, special=True) | {"special": True} for value in values if value]
    return tuple({token["content"]: token for token in tokens}.values())


def _of_added_tokens_file(file: Path, special: set[str]) -> dict[int, Token]:
    if file.name != "added_tokens.json":
        return {}
    return {
        int(index): _token({"content": content, "special": content in special})
        for content, index in read_json(file).items()
    }
