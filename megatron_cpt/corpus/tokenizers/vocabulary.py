"""New tokens for a domain: find them, add them to a Hugging Face tokenizer, give the model rows for them.

A new row is the mean of the rows of the pieces that the word had before (Hewitt 2021, Initializing New Word
Embeddings), in the input embedding and, if it is not tied, in the output layer. numpy only; weights stream
through memory one tensor at a time.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.tokenizers.tokenizer import read_json
from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import DataError

EMBEDDING_NAMES = ("model.embed_tokens.weight", "lm_head.weight")
_WORD = re.compile(r"[^\W\d_]{3,}")
_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
}


@dataclass(frozen=True)
class Extension:
    """Tokens that were added, in order of their ids, and the old pieces of each."""

    tokens: tuple[str, ...]
    pieces: tuple[tuple[int, ...], ...]
    old_vocab_size: int

    @property
    def vocab_size(self) -> int:
        return self.old_vocab_size + len(self.tokens)


def propose_tokens(texts: Iterable[str], tokenizer_dir: Path, count: int, min_occurrences: int = 20) -> list[str]:
    """Whole words that would save the most tokens: occurrences x (pieces - 1), the best `count` of them.

    A word is taken with the space before it, as byte-level vocabularies have it, so that it is one token in
    running text.
    """
    tokenizer = _tokenizer(tokenizer_dir)
    words = Counter(match for text in texts for match in _WORD.findall(text))
    frequent = [(word, n) for word, n in words.items() if n >= min_occurrences]
    encodings = tokenizer.encode_batch([f" {word}" for word, _ in frequent], add_special_tokens=False)
    gains = [(n * (len(e.ids) - 1), f" {word}") for (word, n), e in zip(frequent, encodings, strict=True)]
    return [word for gain, word in sorted(gains, key=lambda pair: (-pair[0], pair[1])) if gain > 0][:count]


def extend_tokenizer(tokenizer_dir: Path, tokens: Sequence[str], output_dir: Path) -> Extension:
    """Save the tokenizer with `tokens` added to `output_dir`; raises DataError for tokens it has already."""
    from tokenizers import AddedToken

    tokenizer = _tokenizer(tokenizer_dir)
    known = tokenizer.get_vocab(with_added_tokens=True)
    if repeated := [token for token in tokens if token in known or len(tokenizer.encode(token).ids) == 1]:
        raise DataError(f"{repeated[0]!r} is one token already", hint="leave it out of the new tokens")
    pieces = tuple(tuple(tokenizer.encode(token, add_special_tokens=False).ids) for token in tokens)
    old_size = max(known.values()) + 1
    tokenizer.add_tokens([AddedToken(token, normalized=True, special=False) for token in tokens])
    output_dir.mkdir(parents=True, exist_ok=True)
    for path in tokenizer_dir.glob("*token*.json"):
        if path.name != "tokenizer.json":
            shutil.copyfile(path, output_dir / path.name)
    write_atomically(output_dir / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    ids = [tokenizer.token_to_id(token) for token in tokens]
    if ids != list(range(old_size, old_size + len(tokens))):
        raise DataError(f"the tokenizer gave the new tokens the ids {ids[:3]}...", hint="tokens must be distinct")
    return Extension(tuple(tokens), pieces, old_size)


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").is_file():
        raise DataError(f"{folder} has no tokenizer.json", hint="give a Hugging Face model folder")
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{folder}/tokenizer.json is not a tokenizer: {error}", hint="copy the model again") from error


def extend_rows(rows: Array, extension: Extension) -> Array:
    """The embedding matrix with the new tokens' rows set; it grows when it has no padding rows left for them.

    `rows` is float32 [at least old_vocab_size, hidden]. Every old row stays as it is.
    """
    out = np.zeros((max(len(rows), extension.vocab_size), rows.shape[1]), np.float32)
    out[: len(rows)] = rows
    for index, pieces in enumerate(extension.pieces):
        out[extension.old_vocab_size + index] = rows[list(pieces)].mean(axis=0)
    return out


def extend_model(model_dir: Path, extension: Extension, output_dir: Path) -> int:
    """Copy a Hugging Face model folder with the new rows in its weights and config.json; returns its vocab_size.

    Everything but the embedding, the output layer and `vocab_size` is copied byte for byte; tokenizer files that are in
    `output_dir` already (from `extend_tokenizer`) stay.
    """
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise DataError(f"{model_dir} has no .safetensors weights", hint="give a Hugging Face model folder")
    output_dir.mkdir(parents=True, exist_ok=True)
    config = read_json(model_dir / "config.json")
    rows = 0
    for file in files:
        try:
            rows = max(rows, _extend_file(file, output_dir / file.name, extension))
        except (ValueError, KeyError, TypeError, EOFError, OverflowError, MemoryError) as error:
            raise DataError(f"{file} is damaged: {error!r}", hint="copy the model again") from error
    if rows == 0:
        raise DataError(f"{model_dir} has no {EMBEDDING_NAMES[0]}", hint="only Llama- and Qwen-like models are known")
    config["vocab_size"] = rows
    for path in model_dir.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and not (output_dir / path.name).exists():
            shutil.copyfile(path, output_dir / path.name)
    write_atomically(output_dir / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    return rows


def _extend_file(source: Path, target: Path, extension: Extension) -> int:
    """Copy one weights file, tensor by tensor, with longer embeddings; returns their rows, 0 if it has none."""
    with source.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(header_bytes))
        data_start = 8 + header_bytes
        metadata = header.pop("__metadata__", None)
        order = sorted(header, key=lambda name: int(header[name]["data_offsets"][0]))
        new_header, offset, rows = {}, 0, 0
        for name in order:
            entry = dict(header[name])
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            if name in EMBEDDING_NAMES:
                old_rows, hidden = entry["shape"]
                rows = max(old_rows, extension.vocab_size)
                size = size // old_rows * rows
                entry["shape"] = [rows, hidden]
            new_header[name] = entry | {"data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(({"__metadata__": metadata} if metadata else {}) | new_header).encode()
        text += b" " * (-len(text) % 8)
        partial = target.with_name(target.name + ".partial")
        with partial.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                begin, end = header[name]["data_offsets"]
                file.seek(data_start + begin)
                data = file.read(end - begin)
                if len(data) != end - begin:
                    raise EOFError(f"{name} is cut short")
                out.write(_longer(data, header[name], extension) if name in EMBEDDING_NAMES else data)
        partial.replace(target)
    return rows


def _longer(data: bytes, entry: dict[str, Any], extension: Extension) -> bytes:
    """The bytes of an embedding with the new rows; old rows keep their bits."""
    dtype = _NUMPY_DTYPES[entry["dtype"]]
    old = np.frombuffer(data, dtype).reshape(entry["shape"])
    is_bf16 = entry["dtype"] == "BF16"
    values = (old.astype(np.uint32) << 16).view(np.float32) if is_bf16 else old.astype(np.float32)
    new = extend_rows(values, extension)[extension.old_vocab_size :]
    new_rows = _to_bf16(new) if is_bf16 else new.astype(dtype)
    return bytes(old[: extension.old_vocab_size].tobytes() + new_rows.tobytes())


def _to_bf16(values: Array) -> Array:
    """Round float32 to bfloat16 bits, half to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
