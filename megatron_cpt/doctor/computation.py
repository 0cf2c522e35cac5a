"""A small computation on every GPU of this machine: allocates, multiplies and compares with the exact result."""

from __future__ import annotations

from megatron_cpt.doctor.check import Check
from megatron_cpt.launch.environment import count_nvidia_gpus

SIZE = 4096  # of a square matrix of ones: every element of its product with itself is SIZE, exact in fp32
ROUNDS = 20


def check_computation() -> Check:
    """Multiply matrices on every GPU; imports torch only where the driver shows GPUs."""
    looked_at = f"{ROUNDS} products of {SIZE} x {SIZE} ones in bf16 on every GPU"
    if not count_nvidia_gpus():
        return Check("computation", looked_at, "not checked", "no GPU here: the CPU trains")
    import torch

    hint = "take this machine out of the job and have its GPUs checked"
    try:
        wrong = [device for device in range(torch.cuda.device_count()) if not _computes(device)]
    except RuntimeError as error:  # torch.cuda.OutOfMemoryError and CUDA's own errors
        detail = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        return Check("computation", looked_at, "error", detail, hint)
    if wrong:
        return Check("computation", looked_at, "error", f"wrong result on GPU {', '.join(map(str, wrong))}", hint)
    return Check("computation", looked_at, "ok", f"exact on {torch.cuda.device_count()} GPUs")


def _computes(device: int) -> bool:
    import torch

    ones = torch.ones(SIZE, SIZE, dtype=torch.bfloat16, device=torch.device("cuda", device))
    return all(bool((ones @ ones == SIZE).all()) for _ in range(ROUNDS))
