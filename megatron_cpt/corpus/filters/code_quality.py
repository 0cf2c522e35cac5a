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
        problems = [code_problem(text, limits) for text in batch.texts]
        return tally.reject_for(batch, problems)

    return Step("code", check_code)


def code_problem(text: str, limits: CodeQuality) -> str | None:
    """The first rule a source file breaks, or None."""
    lines = text.splitlines() or [""]
    filled = [line for line in lines if line and not line.isspace()]
    if max(map(len, lines)) > limits.max_line_chars:
        return "code_long_line"
    if sum(map(len, lines)) / len(lines) > limits.max_mean_line_chars:
        return "code_mean_line_length"
    if sum(map(str.isalnum, text)) < limits.min_alphanumeric_ratio * max(len(text), 1):
        return "code_alphanumeric_ratio"
    comments = sum(_COMMENT_LINE.match(line) is not None for line in filled) / max(len(filled), 1)
    if not limits.min_comment_ratio <= comments <= limits.max_comment_ratio:
        return "code_comment_ratio"
    return "code_does_not_parse" if limits.python_must_parse and not _parses(text) else None


def _parses(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes and the like are the author's business
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True
