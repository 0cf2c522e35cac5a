"""Floating point operations of a training token, and the share of the hardware's peak that they use (MFU)."""

from __future__ import annotations

from megatron_cpt.architecture.facts import Architecture

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


def flops_per_token(arch: Architecture, seq_length: int) -> float:
    """Forward and backward of one token: 6 per weight in a matrix product, 6 * seq_length * width in causal attention.

    The embedding is a look-up and costs nothing; the output layer does, tied or not. Recomputation is not counted.
    """
    embedding = arch.vocab_size * arch.hidden_size
    weights = arch.num_parameters - (0 if arch.tie_word_embeddings else embedding)
    attention = arch.num_layers * arch.num_attention_heads * arch.head_dim * seq_length
    return 6.0 * weights + 6.0 * attention


def peak_flops(device_name: str) -> float | None:
    """Peak of one device, None for a device that is not in the table (a CPU, say)."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)
