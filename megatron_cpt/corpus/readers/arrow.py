"""pyarrow, which reads Parquet, Arrow and lz4: an extra of the package, so its absence is an error with its name.

Import this where a file needs it and not at the head of a module: pyarrow takes a while to import.
"""

from __future__ import annotations

from megatron_cpt.errors import DataError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise DataError(
        "Parquet, Arrow and lz4 inputs need the package pyarrow", hint="pip install 'megatron-cpt[parquet]'"
    ) from error

__all__ = ["pa", "pq"]
