"""Quality of source files: line lengths, share of letters and digits, comments, syntax."""

from __future__ import annotations

import ast
import re
import warnings

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.filters.step import Step
from megatron_cpt.corpus.schema_processing import CodeQuality

_COMMENT_LINE = re.compile(r"^\s*(?:#|//|/\*|\*|--|%|;|\"\"\"|''')")


def code_step(limits: CodeQuality) -> Step:
    """Reject source files that break a rule."""

    def check_code(batch: Batch, tally: UnitTally) -> Batch:
        broken = [_broken_rule(text, limits) for text in batch.texts]
        for text, place, found in zip(batch.texts, batch.places, broken, strict=True):
            if found is not None:
                tally.reject(batch.path, place, found[0], f"{found[1]}: {text}")
        return batch.keep([found is None for found in broken])

    return Step("code", check_code)


def code_problem(text: str, limits: CodeQuality) -> str | None:
    """The first rule a source file breaks, or None."""
    found = _broken_rule(text, limits)
    return found and found[0]


def _broken_rule(text: str, limits: CodeQuality) -> tuple[str, str] | None:
    """The first rule a source file breaks, with the value and the limit."""
    lines = text.splitlines() or [""]
    if (longest := max(map(len, lines))) > limits.max_line_chars:
        return "code_long_line", f"{longest:,} characters, allowed at most {limits.max_line_chars:,}"
    if (mean := sum(map(len, lines)) / len(lines)) > limits.max_mean_line_chars:
        return "code_mean_line_length", f"{mean:.1f} characters, allowed at most {limits.max_mean_line_chars:g}"
    letters = sum(map(str.isalnum, text))
    if letters < limits.min_alphanumeric_ratio * max(len(text), 1):
        ratio = letters / max(len(text), 1)
        return "code_alphanumeric_ratio", f"{ratio:.3g}, allowed at least {limits.min_alphanumeric_ratio:g}"
    filled = [line for line in lines if line and not line.isspace()]
    comments = sum(_COMMENT_LINE.match(line) is not None for line in filled) / max(len(filled), 1)
    if not limits.min_comment_ratio <= comments <= limits.max_comment_ratio:
        allowed = f"allowed from {limits.min_comment_ratio:g} to {limits.max_comment_ratio:g}"
        return "code_comment_ratio", f"{comments:.3g}, {allowed}"
    if limits.python_must_parse and not _parses(text):
        return "code_does_not_parse", "not Python"
    return None


def _parses(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like are the author's business
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True
