"""How text became the ids of a dataset, beyond the tokenizer: what its manifest says, and whether two agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_cpt.corpus.dataset.manifest import Manifest


@dataclass(frozen=True)
class TextRules:
    """Rules under which a dataset was written; None where its manifest does not tell."""

    special_tokens_in_text: str | None = None  # "literal", "parse" or "reject"
    prefix_ids: tuple[int, ...] | None = None  # before each text, such as a beginning of sequence
    suffix_ids: tuple[int, ...] | None = None  # after it, the EOD that `append_eod` adds not counted

    @property
    def text_gives_special_ids(self) -> bool | None:
        """Whether a special token spelled in the text became one: the part of the first rule that is in the ids."""
        return None if self.special_tokens_in_text is None else self.special_tokens_in_text == "parse"

    def to_json(self) -> dict[str, Any]:
        """Return the rules as they stand in a manifest."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def text_rules(manifest: Manifest) -> TextRules:
    """Read the rules from a manifest, of this version or an older one."""
    config = manifest.config
    stated = config.get("text_rules")
    if isinstance(stated, dict):
        known = {field.name for field in fields(TextRules)}
        return TextRules(**{name: _frozen(value) for name, value in stated.items() if name in known})
    adds_nothing = config.get("post_processor") is False
    return TextRules(config.get("special_tokens_in_text"), () if adds_nothing else None, () if adds_nothing else None)


def difference(one: TextRules, other: TextRules) -> str | None:
    """Return in which rule two datasets differ, None when they agree in all that is known of both."""
    pairs = {
        "special tokens spelled in the text": (one.text_gives_special_ids, other.text_gives_special_ids),
        "ids before each text": (one.prefix_ids, other.prefix_ids),
        "ids after each text": (one.suffix_ids, other.suffix_ids),
    }
    shown = {True: "parsed", False: "plain text"}
    for rule, (a, b) in pairs.items():
        if a is not None and b is not None and a != b:
            left, right = (shown[x] if isinstance(x, bool) else list(x) or "none" for x in (a, b))
            return f"{rule}: {left} against {right}"
    return None


def common_rules(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Return the rules of a dataset made of others that agree, for its manifest; None where one does not tell."""
    rules = [text_rules(manifest) for manifest in manifests]
    return (rules[0] if all(rule == rules[0] for rule in rules) else _known_of_all(rules)).to_json()


def _known_of_all(rules: Sequence[TextRules]) -> TextRules:
    columns = {field.name: {getattr(rule, field.name) for rule in rules} for field in fields(TextRules)}
    merged = {name: values.pop() if len(values) == 1 else None for name, values in columns.items()}
    parsed = {rule.text_gives_special_ids for rule in rules}
    if merged["special_tokens_in_text"] is None and parsed == {False}:  # literal and reject together
        merged["special_tokens_in_text"] = "literal"
    return TextRules(**merged)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
