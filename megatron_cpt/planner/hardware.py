"""What a GPU can do at its best, read from hardware.yaml, which names the source of each number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_cpt.config.problems import near_match
from megatron_cpt.config.yaml_file import read_yaml
from megatron_cpt.errors import ConfigError

DEFAULT = "h100-80g"
_GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU in nodes of its usual making. Bandwidths in bytes per second, per GPU and direction."""

    name: str
    peak_flops: Mapping[str, float]  # dense, by number format: bf16, fp8, fp32
    memory_bytes: int  # that a process can allocate
    hbm_bytes_per_s: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float
    efficiency: Mapping[str, float]  # share of a peak that is reached: number formats, attention, hbm, link; overlap
    source: str


@cache
def known_hardware() -> Mapping[str, Hardware]:
    """Every known GPU by its name."""
    entries = read_yaml(Path(__file__).with_name("hardware.yaml"), what="GPUs")
    return {
        name: Hardware(
            name,
            {precision: 1e12 * tflops for precision, tflops in entry["tflops"].items()},
            int(entry["memory_gib"] * _GIB),
            1e9 * entry["hbm_gb_s"],
            1e9 * entry["nvlink_gb_s"],
            1e9 * entry["network_gb_s"],
            entry["efficiency"],
            entry["source"],
        )
        for name, entry in entries.items()
    }


def find_hardware(name: str) -> Hardware:
    """Return the GPU of a name, in any case.

    Raises:
        ConfigError: there is none; the hint says which there are.
    """
    known = known_hardware()
    if (found := known.get(name.lower())) is not None:
        return found
    begins = [candidate for candidate in known if candidate.startswith(name.lower())]
    near = begins[0] if begins else near_match(name.lower(), known)
    question = f"did you mean {near!r}? " if near else ""
    raise ConfigError(f"there is no hardware {name!r}", hint=f"{question}known are {', '.join(known)}")
