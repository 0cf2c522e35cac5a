"""Which source gives the next sample: time of a draw, far into a run and from its beginning, and the distance from due.

    python benchmarks/data_schedule.py [--samples 1000000]

Five sources, whose shares are constant or move along a line. Prints one markdown table; about a minute.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from fractions import Fraction

from megatron_cpt.config.mix import MixPiece, normalised
from megatron_cpt.data.blend import Blend
from megatron_cpt.data.ledger import Ledger

SEQ = 4096
FIRST = normalised(
    {"domain": Fraction(60), "general": Fraction(25), "code": Fraction(10), "math": Fraction(4), "rare": Fraction(1)}
)
LAST = normalised(
    {"domain": Fraction(90), "general": Fraction(5), "code": Fraction(3), "math": Fraction(1), "rare": Fraction(1)}
)
FAR = 10**12  # tokens


def begun(blend: Blend) -> Ledger:
    return Ledger().with_sources(dict.fromkeys(FIRST, "manifest"), SEQ).in_blend(blend.key)


def far_into(blend: Blend) -> Ledger:
    """Half of the line later, with what is due given."""
    samples = FAR // 2 // SEQ
    due = blend.due_tokens(begun(blend), samples * SEQ)
    given = {name: round(tokens / SEQ) for name, tokens in due.items() if name != "domain"}
    return begun(blend).advanced({**given, "domain": samples - sum(given.values())}, SEQ)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    samples = parser.parse_args().samples
    print("| shares | from token | microseconds per sample | largest distance from due after it, samples |")
    print("|---|---|---|---|")
    for label, mix in {
        "constant": (MixPiece(0, None, FIRST, FIRST),),
        "on a line": (MixPiece(0, FAR, FIRST, LAST), MixPiece(FAR, None, LAST, LAST)),
    }.items():
        blend = Blend(mix)
        for ledger in (begun(blend), far_into(blend)):
            started = time.perf_counter()
            drawn = Counter(blend.draw(ledger, samples, SEQ))
            seconds = time.perf_counter() - started
            left = blend.due_tokens(ledger.advanced(drawn, SEQ), ledger.tokens + samples * SEQ)
            furthest = max(abs(tokens) for tokens in left.values()) / SEQ
            print(f"| {label} | {ledger.tokens:,} | {seconds / samples * 1e6:.1f} | {float(furthest):.3f} |")


if __name__ == "__main__":
    main()
