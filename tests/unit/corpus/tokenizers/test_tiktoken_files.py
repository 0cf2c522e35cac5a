"""tiktoken files that are damaged: one clear error, never a traceback and never other ids."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.corpus.tokenizers.tiktoken import KNOWN
from megatron_cpt.errors import DataError
from tests.unit.corpus.conftest import TEXTS

RANKS = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" the": 258}
LINES = [base64.b64encode(token) + b" %d" % rank for token, rank in RANKS.items()]
SETTINGS: dict[str, Any] = {"pattern": KNOWN["qwen"]["pattern"], "special_tokens": {"<|endoftext|>": 259}}


def ranks_file(folder: Path, lines: list[bytes], **settings: Any) -> Path:
    file = folder / "mine.tiktoken"
    file.write_bytes(b"\n".join(lines) + b"\n")
    file.with_suffix(".json").write_text(json.dumps(SETTINGS | settings))
    return file


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*LINES, b"!!!! 259"], ":260 is no line of tiktoken ranks"),
        ([*LINES, b"dGhl"], ":260 is no line"),
        ([*LINES, b"dGhleQ== 2x"], ":260 is no line"),
        ([*LINES, b"dGhl 300"], ":260 repeats the token b'the'"),
        ([*LINES, b"dGhleQ== 258"], "two tokens have one rank"),
        ([*LINES[:-2], LINES[-1]], "the rank 257 is missing"),
        ([*LINES, b"dGhleQ== 4294967296"], "the rank 4294967296 is no id"),
        ([*LINES, b"dGhleQ== 2000000000"], "the rank 260 is missing"),
        ([*LINES, b"dGhleQ== -1"], "the rank -1 is no id"),
        (LINES[1:], "the byte 0x00 is no token"),
        ([*LINES, b"dGhleQ== 259"], "has the rank 259 of another token"),
        ([], "the byte 0x00 is no token"),
    ],
)
def test_a_damaged_ranks_file_is_refused(tmp_path: Path, lines: list[bytes], message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_tokenizer(ranks_file(tmp_path, lines))
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "("}, "the split pattern is no expression"),
        ({"normalize": "NFX"}, "normalize 'NFX'"),
        ({"special_tokens": {"<|endoftext|>": "259"}}, "an id of its own"),
        ({"special_tokens": {"<|endoftext|>": True}}, "an id of its own"),
        ({"special_tokens": {"<|endoftext|>": 259, "<|pad|>": 259}}, "an id of its own"),
        ({"special_tokens": {"<|endoftext|>": -5}}, "an id of its own"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_tokenizer(ranks_file(tmp_path, LINES, **settings))
    assert message in caught.value.message
    assert caught.value.hint


def test_a_special_token_fills_a_gap_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    lines = [*LINES, b"", b"dGhleQ== 260"]
    assert load_tokenizer(ranks_file(tmp_path, lines)).vocab_size == 261


def test_a_flipped_byte_is_an_error_or_another_whole_file_and_no_traceback(tmp_path: Path) -> None:
    whole, rng, refused = b"\n".join(LINES) + b"\n", random.Random(5), 0
    for _ in range(40):
        data = bytearray(whole)
        data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            tokenizer = load_tokenizer(ranks_file(tmp_path, bytes(data).split(b"\n")), backend="reference")
            tokenizer.encode_batch(list(TEXTS))
        except DataError as error:
            refused += 1
            assert error.hint
    assert refused > 30
