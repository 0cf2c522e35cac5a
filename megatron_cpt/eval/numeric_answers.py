"""Whether a generated answer is the right number, however it is written: $1,234.5, (12), 12.5 %, 0.125, 3.2 million.

The first number of an answer counts. It is right when it rounds to the true one at the digits that the true one is
written with; a percentage may be written as a share, and a scale such as "million" may be left out. An answer that is
no number, such as "yes", must be the first word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(
    r"(?P<open>\()?\s*(?P<sign>[-−–])?\s*[$€£¥]?\s*(?P<inner>[-−])?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"\s*(?P<scale>%|percent\b|thousand\b|million\b|billion\b|bn\b|[kKmMbB]\b)?\s*(?P<close>\))?"
)
_SCALES = {
    "%": -2, "percent": -2, "thousand": 3, "k": 3, "million": 6, "m": 6, "billion": 9, "bn": 9, "b": 9,
}  # fmt: skip


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one item for lm-eval: the generated text against `doc["answer"]`."""
    return {"numeric_match": float(is_right(results[0], str(doc["answer"])))}


def is_right(said: str, true: str) -> bool:
    """Whether the answer `said` is `true`; see the module."""
    wanted = _readings(true)
    if not wanted:
        words = said.lower().split()
        return bool(words) and words[0].strip(".,;:!") == true.strip().lower()
    return any(
        abs(found - number) <= half
        for found, _ in _readings(said)
        for number, half in wanted
    )  # fmt: skip


def _readings(text: str) -> list[tuple[Decimal, Decimal]]:
    """The first number of a text as it stands and, with a scale, as it is meant; each with half of its last digit."""
    match = _NUMBER.search(text)
    if match is None:
        return []
    number = Decimal(match["digits"].replace(",", ""))
    exponent = number.as_tuple().exponent
    half = Decimal(5).scaleb(int(exponent) - 1)
    if match["sign"] or match["inner"] or (match["open"] and match["close"]):
        number = -number
    readings = [(number, half)]
    if match["scale"]:
        shift = _SCALES[match["scale"].lower()]
        readings.append((number.scaleb(shift), half.scaleb(shift)))
    return readings
