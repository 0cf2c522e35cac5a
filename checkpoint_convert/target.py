"""What a writer plans: files of known size, the bytes around the weights, and where each tensor goes."""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint_convert.checkpoint import StoredTensor
from megatron_cpt.errors import ConversionError


@dataclass
class Target:
    """A planned output folder. Nothing is written until `allocate`.

    `tensors[name].extents` may hold the same rows several times (a norm on each tensor parallel rank).
    `hollow` are files that torch.save makes at full size; the others are made here and get `skeleton`.
    """

    folder: Path
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    file_bytes: dict[Path, int] = field(default_factory=dict)
    skeleton: list[tuple[Path, int, bytes]] = field(default_factory=list)
    small_files: dict[Path, bytes] = field(default_factory=dict)  # written last, when all weights are in place

    def add_file(self, path: Path, size: int) -> None:
        assert path not in self.file_bytes, path
        self.file_bytes[path] = size

    @property
    def nbytes(self) -> int:
        return sum(self.file_bytes.values())

    def allocate(self) -> None:
        """Make the files at full size with their disk space reserved, and write the skeleton."""
        for path, size in self.file_bytes.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # less what the umask takes
            try:
                os.ftruncate(fd, size)
                _reserve(fd, size)
            except OSError as error:
                raise ConversionError(
                    f"cannot reserve {size / 2**30:.2f} GiB for {path}: {error.strerror}", hint="free some disk space"
                ) from error
            finally:
                os.close(fd)
        for path, offset, data in self.skeleton:
            with path.open("r+b") as file:
                file.seek(offset)
                file.write(data)


def _reserve(fd: int, size: int) -> None:
    """Have the file system set the space aside, where it can.

    Not os.posix_fallocate: where the file system cannot (NFS, Lustre), libc would write to every block instead.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None or not size:
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(fd, 0, 0, size) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))
