"""Errors for a file that cannot be read, and for input of which too much cannot be read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from megatron_cpt.corpus.documents import BAD_INPUT_REASONS
from megatron_cpt.corpus.readers.encoding import iconv_hint
from megatron_cpt.errors import DataError

# What is said of a first line that is only `{`.
_OPEN = re.compile(r":1: invalid_json: unexpected end of data: line 1 column [23] ")


def unreadable_file(path: str, error: OSError) -> DataError:
    """The error of the operating system for a file or folder: not there, not permitted, a broken disk."""
    return DataError(f"{error.filename or path}: {error.strerror or error}", hint="check the file and its permissions")


def bad_input(reject_counts: Mapping[str, int]) -> dict[str, int]:
    """The rejects that mean unreadable input rather than a choice of the user."""
    return {reason: count for reason, count in reject_counts.items() if reason in BAD_INPUT_REASONS}


def unreadable_error(
    of_what: str, reject_counts: Mapping[str, int], documents_read: int, max_ratio: float, examples: Sequence[str]
) -> DataError:
    """Says how many documents `of_what` cannot be read and why, with examples, and what to do about it."""
    bad = bad_input(reject_counts)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in bad.items())
    return DataError(
        f"{sum(bad.values()):,} of {documents_read:,} documents{of_what} cannot be read ({reasons}), more than the "
        f"allowed {max_ratio:.3%}; nothing was written" + "".join(f"\n  {example}" for example in examples),
        hint=_hint(bad, examples),
    )


def _hint(bad: Mapping[str, int], examples: Sequence[str]) -> str:
    if guess := next(
        (found for example in examples if (found := re.search(r"it looks like ([\w-]+)$", example))), None
    ):
        return iconv_hint(guess[1])
    if "not_text" in bad or any(example.endswith("it looks like no text at all") for example in examples):
        return "leave binary files out: name the files by a pattern, such as files: [docs/**/*.txt]"
    if bad.keys() == {"invalid_utf8"}:
        return "it is not UTF-8; where you know its encoding: iconv -f ENCODING -t UTF-8 FILE > NEW_FILE"
    if bad and bad.keys() <= {"missing_key", "text_not_a_string"}:
        return "name the key that holds the text: --json-key KEY (`text:` of the source in corpus.yaml)"
    if bad.keys() <= {"invalid_json", "not_an_object"} and any(_OPEN.search(example) for example in examples):
        return "each line must be one JSON object; for objects over several lines: jq -c . FILE > FILE.jsonl"
    if bad.keys() == {"not_an_object"}:
        return "each line must be one JSON object; a file that is one array: jq -c '.[]' FILE > FILE.jsonl"
    return "fix the input, or accept the loss with --max-reject-ratio"
