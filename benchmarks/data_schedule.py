"""The blend function over 100 million samples: time and memory for a position, and for drawing samples in order.

python benchmarks/data_schedule.py [--samples 100000000]
"""

from __future__ import annotations

import argparse
import time
import tracemalloc

from megatron_cpt.data.blend import build_blend

WEIGHTS = {"domain": 0.60, "general": 0.25, "code": 0.10, "math": 0.04, "rare": 0.01}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000_000)
    samples = parser.parse_args().samples
    tracemalloc.start()
    started = time.perf_counter()
    blend = build_blend(WEIGHTS, seed=1234)
    counts = blend.counts(0, samples)
    seconds = time.perf_counter() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"position after {samples:,} samples of {len(WEIGHTS)} sources: {seconds * 1e3:.2f} ms, {peak:,} bytes")
    print("largest distance from the exact share:", max(abs(counts[n] - samples * w) for n, w in WEIGHTS.items()))
    started = time.perf_counter()
    drawn = sum(1 for _ in blend.sources(samples, samples + 1_000_000))
    print(f"drawing: {(time.perf_counter() - started) / drawn * 1e6:.2f} microseconds per sample")


if __name__ == "__main__":
    main()
