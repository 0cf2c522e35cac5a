"""The encoding of bytes that are not UTF-8, guessed for the message; nothing is ever decoded by a guess."""

from __future__ import annotations

import codecs

_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32LE", codecs.BOM_UTF32_BE: "UTF-32BE",  # before UTF-16, whose mark they begin with
    codecs.BOM_UTF16_LE: "UTF-16LE", codecs.BOM_UTF16_BE: "UTF-16BE",
}  # fmt: skip
_SAMPLE_BYTES = 4096


def likely_encoding(data: bytes) -> str | None:
    """A name that iconv knows, or None when nothing is likely."""
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            return name
    sample = data[:_SAMPLE_BYTES]
    # in UTF-16 every other byte of western text is zero
    if len(sample) >= 4 and sample[1::2].count(0) > len(sample) // 3:
        return "UTF-16LE"
    if len(sample) >= 4 and sample[::2].count(0) > len(sample) // 3:
        return "UTF-16BE"
    if _is_utf8(data):
        return None
    high = sum(byte >= 0x80 for byte in sample)
    if b"\x00" in sample or high > len(sample) // 3:  # as many high bytes are another script's or no text at all
        return None
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return None
    return "WINDOWS-1252"


def not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    """What is wrong with `data`, for a reject's detail."""
    guess = likely_encoding(data)
    return f"{error}" + (f"; it looks like {guess}" if guess else "")


def iconv_hint(encoding: str) -> str:
    return f"convert it first: iconv -f {encoding} -t UTF-8 FILE > NEW_FILE"


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
