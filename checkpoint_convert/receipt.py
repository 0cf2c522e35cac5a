"""What a receipt (`conversion.json`) says of the weights, and what an earlier one says of a source."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from checkpoint_convert.checkpoint import IndexedCheckpoint, MismatchError, StoredTensor
from checkpoint_convert.stream import TensorRecord
from megatron_cpt.errors import ConversionError

RECEIPT = "conversion.json"


def check_against_receipt(source: IndexedCheckpoint, records: dict[str, TensorRecord]) -> bool:
    """Check a source that we wrote against its receipt. Return whether it has one."""
    path = (source.path.parent if source.format == "legacy" else source.path) / RECEIPT
    if not path.is_file():
        return False
    try:
        receipt = json.loads(path.read_text(encoding="utf-8"))
        ours = receipt["target"]["format"] == source.format
        known = {tensor["name"]: tensor["target_sha256"] for tensor in receipt["tensors"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{path} is not a receipt: {error}", hint="damaged? delete it to do without") from error
    wrong = [name for name, record in records.items() if known.get(name, record.sha256) != record.sha256]
    if ours and wrong:
        raise MismatchError(
            f"{source.path}: {len(wrong)} tensors are not what {path} says, e.g. {wrong[0]}",
            hint=f"the files are damaged; if you changed them on purpose, delete {path}",
        )
    return bool(ours) and known.keys() == records.keys()


def integrity(source: IndexedCheckpoint, receipt: bool) -> str:
    """Return how the integrity of the source was checked, for the receipt."""
    if receipt:
        return f"sha256 of {RECEIPT}"
    tensors = source.weights.tensors.values()
    checked = sum(tensor.has_checksum for tensor in tensors)
    return f"crc32 of {checked} of {len(tensors)} tensors" if checked else "not checked: the files hold no checksum"


def shifted_gammas(records: dict[str, TensorRecord]) -> dict[str, Any]:
    """What was done to the norms' gammas where source or target stores them minus 1, and what it cost."""
    shifted = [record for record in records.values() if record.shifted_by]
    if not shifted:
        return {}
    sign = {1: "1 + stored", -1: "stored - 1"}[shifted[0].shifted_by]
    return {
        "arithmetic": f"{sign} in fp32, rounded to {shifted[0].target_dtype}",
        "tensors": len(shifted),
        "elements": sum(math.prod(record.shape) for record in shifted),
        "rounded_elements": sum(record.rounded_elements for record in shifted),
    }


def near_zero(records: dict[str, TensorRecord]) -> dict[str, int]:
    """Near-zero rows by tensor: never trained, or lost. Biases are left out: a fresh model's are all zero."""
    return {n: r.near_zero_rows for n, r in records.items() if r.near_zero_rows and not n.endswith(".bias")}


def fingerprint(entries: list[tuple[StoredTensor, str]]) -> str:
    """sha256 over name, dtype, shape and sha256 of every tensor: equal for equal weights in any format."""
    lines = [f"{t.name} {t.dtype} {list(t.shape)} {sha}" for t, sha in entries]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
