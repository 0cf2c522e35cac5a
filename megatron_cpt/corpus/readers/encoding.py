"""The encoding of bytes that are not UTF-8, guessed for the message; nothing is ever decoded by a guess."""

from __future__ import annotations

import codecs

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32LE", codecs.BOM_UTF32_BE: "UTF-32BE",  # before UTF-16, whose mark they begin with
    codecs.BOM_UTF16_LE: "UTF-16LE", codecs.BOM_UTF16_BE: "UTF-16BE",
}  # fmt: skip
_SAMPLE_BYTES = 4096


# Control characters that no text has: all but backspace (printed manuals), tab, line ends, form feed and escape.
_NO_TEXT = bytes({*range(32), 127} - {8, 9, 10, 11, 12, 13, 27})
_BINARY_SHARE = 0.02  # of the sample


class NotUtf8(Exception):
    """The message says what is wrong with the bytes, for a reject's detail."""


def likely_encoding(data: bytes) -> str | None:
    """A name that iconv knows, or None when nothing is likely."""
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            return name
    sample = data[:_SAMPLE_BYTES]
    if wide := _wide_encoding(sample):
        return wide
    if _is_utf8(data):
        return None
    high = sum(byte >= 0x80 for byte in sample)
    if (
        b"\0" in sample or is_binary(sample) or high > len(sample) // 3
    ):  # as many high bytes are another script's or no text at all
        return None
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    return "WINDOWS-1252"


def _wide_encoding(sample: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark: of western text every other byte is zero, or three of four are."""
    if len(sample) < 4:
        return None
    zeros = "".join("0" if sample[place::4].count(0) > len(sample) // 6 else "x" for place in range(4))
    return {"x000": "UTF-32LE", "000x": "UTF-32BE", "x0x0": "UTF-16LE", "0x0x": "UTF-16BE"}.get(zeros)


def is_binary(data: bytes) -> bool:
    """Whether the start of the data has many control characters, zero bytes among them, as pictures and programs do."""
    sample = data[:_SAMPLE_BYTES]
    found = len(sample) - len(sample.translate(None, _NO_TEXT))
    return found > _BINARY_SHARE * len(sample)


def decoded(data: bytes) -> str:
    """Text of UTF-8, without a byte order mark.

    Raises NotUtf8 also for UTF-16 that is valid UTF-8 by chance: Latin letters with zero bytes between them.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotUtf8(not_utf8(data, error)) from error
    if "\0" in text and (guess := _wide_encoding(data[:_SAMPLE_BYTES])):
        raise NotUtf8(f"every other byte is zero; it looks like {guess}")
    return text


def not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with `data`, for a reject's detail."""
    if guess := likely_encoding(data):
        return f"{error}; it looks like {guess}"
    return f"{error}" + ("; it looks like no text at all" if is_binary(data) else "")


def iconv_hint(encoding: str) -> str:
    return f"convert it first: iconv -f {encoding} -t UTF-8 FILE > NEW_FILE"


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
