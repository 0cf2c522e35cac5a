"""The schema of cleaning, filters, duplicates and decontamination; defaults of published rules are the papers'."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from megatron_cpt.config.section import Section


def switch(value: Any) -> Any:
    """`true` switches a group of rules on with its defaults, `false` off."""
    return {} if value is True else None if value is False else value


def _list_file(value: Any) -> Any:
    return {"file": value} if isinstance(value, str) else value


class GopherQuality(Section):
    """Rae et al. 2021 (Gopher), quality rules of table A1."""

    min_words: int = Field(50, description="Words of a document, at least.")
    max_words: int = Field(100_000, description="Words of a document, at most.")
    min_mean_word_length: float = Field(3, description="Mean word length in characters, at least.")
    max_mean_word_length: float = Field(10, description="Mean word length in characters, at most.")
    max_symbol_word_ratio: float = Field(0.1, description="Hash signs and ellipses per word, at most.")
    max_bullet_line_ratio: float = Field(0.9, description="Lines that begin with a bullet, at most.")
    max_ellipsis_line_ratio: float = Field(0.3, description="Lines that end with an ellipsis, at most.")
    min_alphabetic_word_ratio: float = Field(0.8, description="Words with a letter, at least.")
    min_stop_words: int = Field(2, description="Different stop words that occur, at least.")
    stop_words: tuple[str, ...] = Field(
        ("the", "be", "to", "of", "and", "that", "have", "with"), description="The stop words; empty: no such rule."
    )


class GopherRepetition(Section):
    """Rae et al. 2021 (Gopher), repetition rules of table A1. Shares of lines, paragraphs and characters."""

    max_repeated_lines: float = Field(0.30, description="Lines that occurred before, at most.")
    max_repeated_paragraphs: float = Field(0.30, description="Paragraphs that occurred before, at most.")
    max_repeated_line_chars: float = Field(0.20, description="Characters in repeated lines, at most.")
    max_repeated_paragraph_chars: float = Field(0.20, description="Characters in repeated paragraphs, at most.")
    max_top_ngram_chars: dict[int, float] = Field(
        {2: 0.20, 3: 0.18, 4: 0.16}, description="n -> characters in the most covering n-gram, at most."
    )
    max_repeated_ngram_chars: dict[int, float] = Field(
        {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10},
        description="n -> characters in repeated n-grams, at most.",
    )


class FineWeb(Section):
    """Penedo et al. 2024 (FineWeb), the three filters of section 3.6."""

    min_terminal_line_ratio: float = Field(0.12, description="Lines that end with punctuation, more than this.")
    max_repeated_line_chars: float = Field(0.1, description="Characters in repeated lines, less than this.")
    short_line_chars: int = Field(30, description="A line with fewer characters is short.")
    max_short_line_ratio: float = Field(0.67, description="Short lines, less than this.")


class Language(Section):
    """Language by a fastText model, offline. The sha256 of its file stands in the dataset's manifest."""

    keep: tuple[str, ...] = Field(min_length=1, description="ISO 639-1 codes to keep, such as en and zh.")
    min_score: float = Field(0.65, ge=0, le=1, description="Confidence, at least (FineWeb's value).")
    model: str | None = Field(
        None,
        description="A fastText model file with labels such as `__label__en`; default: lid.176.ftz (CC-BY-SA 3.0), "
        "which the extra `corpus` installs.",
    )

    @model_validator(mode="after")
    def _keeps_codes(self) -> Language:
        """A model of the user's may have labels of any kind."""
        wrong = [code for code in self.keep if not re.fullmatch("[a-z]{2,3}", code)]
        if wrong and self.model is None:
            raise ValueError(f"keep: {wrong[0]!r} is no language code such as en or zh")
        return self


class CodeQuality(Section):
    """Rules for source files; the line limits are those of StarCoder (Li et al. 2023, section 3.1)."""

    max_line_chars: int = Field(1000, description="Longest line, at most.")
    max_mean_line_chars: float = Field(100, description="Mean line length, at most.")
    min_alphanumeric_ratio: float = Field(0.25, description="Alphanumeric characters, at least.")
    min_comment_ratio: float = Field(0.0, description="Comment lines among lines with text, at least.")
    max_comment_ratio: float = Field(0.8, description="Comment lines among lines with text, at most.")
    python_must_parse: bool = Field(False, description="Drop documents that Python's `ast` cannot parse.")


class BadWords(Section):
    """C4's rule of bad words (Raffel et al. 2020, section 2.2) with a list of your own."""

    file: str = Field(description="UTF-8 text file, one word or phrase per line; case does not count.")
    substrings: bool = Field(
        False, description="Find entries inside words too, as C4 does for zh, ja, th (theirs are always found so)."
    )


class Perplexity(Section):
    """Perplexity by a small Hugging Face model on the CPU (needs the extra `eval`)."""

    model: str = Field(description="Folder of a causal language model with its tokenizer.json.")
    max_perplexity: float = Field(gt=1, description="Perplexity, at most. It depends on the model: look at rejects.")
    max_tokens: int = Field(512, ge=2, description="Tokens of the model's tokenizer, from the start, that are scored.")


PiiKind = Literal["email", "phone", "ip", "ssn", "card"]


class Clean(Section):
    """Changes to the text, in this order. Each is off unless it is set."""

    html: bool | Literal["article"] = Field(
        False, description="HTML to text; `article`: its main content only (needs the extra `corpus`)."
    )
    unicode: bool = Field(False, description="Repair mojibake (ftfy), drop control characters, normalise to NFC.")
    whitespace: bool = Field(False, description="No trailing spaces, at most one blank line in a row.")
    c4_lines: bool = Field(False, description="C4: keep lines of 3 words or more that end with punctuation.")
    drop_lines: tuple[str, ...] = Field((), description="Regular expressions; a line that one finds is dropped.")
    pii: tuple[PiiKind, ...] = Field((), description="Masked kinds: email, phone, ip, ssn, card.")

    @field_validator("drop_lines")
    @classmethod
    def _compiles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return value


class Near(Section):
    """Near-duplicates by MinHash; candidates are verified by their exact similarity."""

    similarity: float = Field(
        0.6, gt=0.3, le=1, description="Jaccard similarity of token 5-grams from which two documents are duplicates."
    )


class Passages(Section):
    """Lines or paragraphs that many documents share; the first occurrence in input order stays."""

    unit: Literal["lines", "paragraphs"] = Field("lines", description="Paragraphs are cut at blank lines.")
    min_chars: int = Field(20, ge=1, description="Shorter passages always stay (white space counts once).")
    min_documents: int = Field(2, ge=2, description="Documents that hold a passage from which it is removed.")


class Dedup(Section):
    """Duplicate documents, across all sources; the first in input order stays."""

    exact: bool = Field(True, description="Same text without regard to case and white space.")
    near: Annotated[Near | None, BeforeValidator(switch)] = Field(None, description="Nearly the same text.")
    passages: Annotated[Passages | None, BeforeValidator(switch)] = Field(
        None, description="Lines or paragraphs within documents, removed before documents are compared."
    )
    id_key: str | None = Field(
        None, description="Same value of this key, which `metadata` must list; not where it is null or empty."
    )
    against: tuple[str, ...] = Field((), description="PREFIXes of datasets whose documents are duplicates here.")

    @model_validator(mode="after")
    def _something(self) -> Dedup:
        if not (self.exact or self.near or self.id_key or self.passages):
            raise ValueError("nothing to look for: set exact, near, passages or id_key")
        if self.against and not self.compares_documents:
            raise ValueError("against compares documents: set exact or near")
        return self

    @property
    def compares_documents(self) -> bool:
        return bool(self.exact or self.near or self.id_key)


class Decontaminate(Section):
    """Documents that share n-grams of words with evaluation sets (Brown et al. 2020, GPT-3, appendix C)."""

    files: tuple[str, ...] = Field(description="Evaluation sets: jsonl, parquet or text files.")
    text: str = Field("text", description="Key or template of their text.")
    ngram_words: int = Field(13, ge=5, description="Words of an n-gram.")
    min_matches: int = Field(1, ge=1, description="Shared n-grams from which a document is dropped.")


# What a kind of text needs; a key stated beside `preset` replaces the preset's. docs/corpus.md has the evidence.
PRESETS: dict[str, dict[str, Any]] = {
    "web": {"min_chars": 200, "gopher_quality": True, "gopher_repetition": True, "fineweb": True},
    "technical": {
        "min_chars": 200,
        "gopher_quality": {
            "min_words": 20, "min_mean_word_length": 2, "max_mean_word_length": 15, "max_symbol_word_ratio": 0.5,
            "min_alphabetic_word_ratio": 0.5, "min_stop_words": 1,
        },
        "gopher_repetition": {
            "max_repeated_lines": 0.6, "max_repeated_line_chars": 0.4,
            "max_top_ngram_chars": {2: 0.4, 3: 0.36, 4: 0.32},
            "max_repeated_ngram_chars": {5: 0.6, 6: 0.55, 7: 0.5, 8: 0.45, 9: 0.4, 10: 0.35},
        },
    },
    "code": {"code": True},
    "books": {
        "min_chars": 1000,
        "gopher_quality": {"max_words": 10_000_000},
        "gopher_repetition": {"max_repeated_ngram_chars": {}},
    },
}  # fmt: skip


class Filters(Section):
    """Which documents stay, in this order. Each is off unless it is set."""

    preset: Literal["web", "technical", "code", "books"] | None = Field(
        None, description="Filters for a kind of text; a filter stated beside it replaces the preset's."
    )
    min_chars: int | None = Field(None, ge=0, description="Characters of a document, at least.")
    max_chars: int | None = Field(None, gt=0, description="Characters of a document, at most.")
    language: Language | None = Field(None, description="Language by fastText.")
    gopher_quality: Annotated[GopherQuality | None, BeforeValidator(switch)] = Field(
        None, description="Quality rules of Gopher."
    )
    gopher_repetition: Annotated[GopherRepetition | None, BeforeValidator(switch)] = Field(None, description="Gopher.")
    c4: bool = Field(False, description="C4: no lorem ipsum, no curly bracket, 5 sentences or more.")
    bad_words: Annotated[BadWords | None, BeforeValidator(_list_file)] = Field(
        None, description="Drop documents with an entry of a list: {file: FILE}, or just FILE."
    )
    fineweb: Annotated[FineWeb | None, BeforeValidator(switch)] = Field(None, description="Rules of FineWeb.")
    code: Annotated[CodeQuality | None, BeforeValidator(switch)] = Field(None, description="Rules for source files.")
    perplexity: Perplexity | None = Field(None, description="Perplexity by a small model.")
    custom: tuple[str, ...] = Field(
        (), description="module:function, called with the text; returns True, False, or the text to go on with."
    )

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("preset") in PRESETS:
            return PRESETS[value["preset"]] | value
        return value
