"""Norms of the rows of an embedding, read a few rows at a time: a row near zero is a token that was never trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoint_convert.checkpoint import StoredTensor
from checkpoint_convert.rows import Bytes, Files, read_rows

EMBEDDING = "model.embed_tokens.weight"
ROWS_PER_READ = 4096


def row_norms(tensor: StoredTensor) -> npt.NDArray[Any]:
    """Return the norm of each row of `tensor`, float32 [rows]."""
    norms = np.empty(tensor.shape[0], np.float32)
    with Files() as files:
        for start in range(0, tensor.shape[0], ROWS_PER_READ):
            stop = min(start + ROWS_PER_READ, tensor.shape[0])
            rows = np.empty((stop - start, tensor.row_bytes), np.uint8)
            read_rows(files, tensor, start, stop, rows)
            norms[start:stop] = np.linalg.norm(_as_float(rows, tensor.dtype), axis=1)
    return norms


def _as_float(rows: Bytes, dtype: str) -> npt.NDArray[Any]:
    if dtype == "bfloat16":  # the upper half of a float32
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return rows.view({"float16": np.float16, "float32": np.float32}[dtype]).astype(np.float32)
