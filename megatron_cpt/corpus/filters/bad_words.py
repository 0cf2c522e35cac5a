"""C4's rule of bad words (Raffel et al. 2020, section 2.2): a document with an entry of the list is dropped.

The list is the user's: a UTF-8 file with one word or phrase per line. Case does not count. An entry counts where no
word character stands on either side of it; an entry in a script written without spaces (Han, kana, Thai, Lao, Khmer,
Burmese), and every entry when the user asks for it, counts anywhere, as C4 has it for Chinese, Japanese and Thai.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_cpt.corpus.documents import Batch, UnitTally
from megatron_cpt.corpus.schema_processing import BadWords
from megatron_cpt.errors import DataError

_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_WORD = re.compile(r"\w+")


class BadWordFilter:
    """A step that rejects documents with an entry of the list; the detail of the reject is the entry."""

    def __init__(self, settings: BadWords) -> None:
        entries = read_entries(settings.file)
        anywhere = [entry for entry in entries if settings.substrings or _UNSPACED.search(entry)]
        apart = [entry for entry in entries if entry not in set(anywhere)]
        # a word is found among the words of the text; only what is more than a word needs an expression
        self._words = frozenset(entry for entry in apart if _WORD.fullmatch(entry))
        phrases = [re.escape(entry) for entry in apart if entry not in self._words]
        self._phrases = re.compile(rf"(?<!\w)(?:{'|'.join(phrases)})(?!\w)") if phrases else None
        self._anywhere = re.compile("|".join(map(re.escape, anywhere))) if anywhere else None

    def __call__(self, batch: Batch, tally: UnitTally) -> Batch:
        found = [self.find(text) for text in batch.texts]
        for place, entry in zip(batch.places, found, strict=True):
            if entry is not None:
                tally.reject(batch.path, place, "bad_words", entry)
        return batch.keep([entry is None for entry in found])

    def find(self, text: str) -> str | None:
        """An entry that the text has, or None."""
        text = text.lower()
        if hits := self._words.intersection(_WORD.findall(text)):
            return min(hits)
        for expression in (self._phrases, self._anywhere):
            if expression is not None and (match := expression.search(text)):
                return match[0]
        return None


def read_entries(path: str) -> list[str]:
    """The entries of a list in lower case. Raises DataError for a file that cannot be read or has none."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(
            f"filters.bad_words: {path}: {error.strerror}", hint="give a text file with one word or phrase per line"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"filters.bad_words: {path} is not UTF-8: {error}", hint="save it as UTF-8") from error
    entries = [line.strip().lower() for line in lines]
    if not any(entries):
        raise DataError(f"filters.bad_words: {path} has no entry", hint="write one word or phrase per line")
    return list(dict.fromkeys(entry for entry in entries if entry))
