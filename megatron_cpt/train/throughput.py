"""The hardware's peak, of which a run uses a share (MFU)."""

from __future__ import annotations

# dense bf16 peak of one device in FLOP/s, by a part of its name; vendors' data sheets
PEAK_FLOPS: dict[str, float] = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "4090": 165e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak of one device, None for a device that is not in the table (a CPU, say)."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)
