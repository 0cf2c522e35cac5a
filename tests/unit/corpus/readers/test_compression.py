"""Compressed input: whole files give their text; whatever is cut, damaged or appended anywhere is one clear error."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cpt.corpus.readers.compression import open_input
from megatron_cpt.errors import DataError

TEXT = b"".join(b'{"text": "document %d of a shard that was written in pieces"}\n' % i for i in range(300))


def lz4(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd, ".zstd": zstd, ".lz4": lz4}


def read(folder: Path, suffix: str, data: bytes) -> bytes:
    path = folder / f"a.jsonl{suffix}"
    path.write_bytes(data)
    with open_input(str(path)) as file:
        return file.read()


@pytest.mark.parametrize("suffix", COMPRESS)
def test_all_members_of_a_file_are_read(tmp_path: Path, suffix: str) -> None:
    member = COMPRESS[suffix](TEXT)
    assert read(tmp_path, suffix, member) == TEXT
    assert read(tmp_path, suffix.upper(), member * 3) == TEXT * 3


@pytest.mark.parametrize("suffix", COMPRESS)
def test_what_does_not_belong_there_is_an_error(tmp_path: Path, suffix: str) -> None:
    member = COMPRESS[suffix](TEXT)
    second = bytearray(COMPRESS[suffix](TEXT))
    second[len(second) // 2] ^= 0xFF
    damaged = {
        "empty": b"",
        "no end": member[:-3],
        "a second member without an end": member + member[: len(member) // 2],
        "a damaged second member of three": member + bytes(second) + member,
        "a second member without its first bytes": member + member[4:],
        "trailing garbage": member + b"garbage",
    }
    if suffix == ".lz4":  # this writer leaves no checksum of the content
        del damaged["a damaged second member of three"]
    for name, data in damaged.items():
        with pytest.raises(DataError, match="damaged or cut short") as caught:
            read(tmp_path, suffix, data)
        assert caught.value.hint, name


def test_padding_with_zeros_is_accepted_where_the_format_has_it(tmp_path: Path) -> None:
    assert read(tmp_path, ".gz", gzip.compress(TEXT) + b"\0" * 3) == TEXT
    assert read(tmp_path, ".xz", lzma.compress(TEXT) + b"\0" * 8 + lzma.compress(TEXT)) == TEXT * 2
    for suffix, padding in ((".xz", 3), (".bz2", 4), (".zst", 4)):
        with pytest.raises(DataError, match="damaged"):
            read(tmp_path, suffix, COMPRESS[suffix](TEXT) + b"\0" * padding)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_content_that_is_compressed_otherwise_than_the_name_says_is_told(tmp_path: Path, suffix: str) -> None:
    data = COMPRESS[suffix](TEXT)
    found = suffix.replace(".zstd", ".zst")
    for name in ("", *(other for other in COMPRESS if other.replace(".zstd", ".zst") != found)):
        with pytest.raises(DataError, match=f"is a {found} file by its content") as caught:
            read(tmp_path, name, data)
        assert caught.value.hint == f"rename it to a.jsonl{found}"
    with pytest.raises(DataError) as caught:
        read(tmp_path, suffix, TEXT)
    assert f"take {suffix} off its name" in str(caught.value.hint)
    assert read(tmp_path, "", b"BZh7 is how a text may begin") == b"BZh7 is how a text may begin"


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=st.integers(1, 3), cut=st.integers(1, 10_000))
def test_a_cut_anywhere_is_never_a_shorter_text(tmp_path: Path, suffix: str, members: int, cut: int) -> None:
    member = COMPRESS[suffix](TEXT)
    data = (member * members)[: -(cut % (len(member) * members)) or None]
    whole, rest = divmod(len(data), len(member))
    if rest or not data:
        with pytest.raises(DataError):
            read(tmp_path, suffix, data)
    else:
        assert read(tmp_path, suffix, data) == TEXT * whole


def test_a_member_of_one_long_run_is_read_in_linear_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Handing out what was decoded must not copy the rest of it each time."""
    data = zstd(b"a" * (64 << 20))
    assert len(data) < 1 << 16
    assert read(tmp_path, ".zst", data).count(b"a") == 64 << 20  # minutes, if each read copies what is left
