"""PREFIX.report.html: one self-contained page per corpus, for the person who decides what to train on.

What was dropped, in the order of the pipeline, by source and with examples; what was kept, with samples; token shares
with advice on their balance; document lengths, languages, repeated passages and duplicates; the configuration. The
page has no script and loads nothing; report.html.jinja is its form, this module computes what it shows.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.dataset.indexed import open_indexed
from megatron_cpt.corpus.dataset.manifest import Manifest
from megatron_cpt.corpus.documents import BAD_INPUT_REASONS, unknown_text
from megatron_cpt.corpus.readers.metadata import json_value
from megatron_cpt.corpus.run.parts import UnitRecord
from megatron_cpt.durable import write_atomically

EXAMPLES_PER_REASON = 3
SAMPLES_PER_DATASET = 4
SAMPLE_TOKENS = 200
PASSAGES_SHOWN = 10
# Muennighoff et al. 2023, Scaling Data-Constrained Language Models: up to 4 epochs a repeat is worth nearly new data.
MAX_USEFUL_EPOCHS = 4
# Beginnings of reasons in the order in which a document meets them; the readers' own come before all of them.
_PIPELINE = (
    "empty", "too_slow", "too_short", "too_long", "language", "gopher_", "gopher_repeated_", "gopher_top_", "fineweb_",
    "c4_", "bad_words", "code_", "perplexity", "custom:", "contaminated", "repeated_passages", "special_token_in_text",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What the page is made from."""

    prefix: str
    datasets: Mapping[str, Manifest]
    records: Sequence[UnitRecord]
    documents_read: int
    rejects: Mapping[str, int]
    train_tokens: int | None
    decode: Callable[[Sequence[int]], str]  # token ids to text


def write_report(report: Report) -> Path:
    """Write PREFIX.report.html and return its path."""
    first = next(iter(report.datasets.values()))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        title=report.prefix,
        written=datetime.datetime.now(datetime.UTC),
        version=first.tool_version,
        datasets=report.datasets,
        tokenizer=first.tokenizer,
        documents_read=report.documents_read,
        funnel=_funnel(report),
        by_source=_by_source(report),
        examples=_examples(Path(f"{report.prefix}.rejects.jsonl")),
        sources=_sources(report),
        notes=[*_unknown_notes(report), *balance_notes(_source_tokens(report), report.train_tokens)],
        train_tokens=report.train_tokens,
        samples={prefix: list(_samples(prefix, report.decode)) for prefix in report.datasets},
        lengths=_lengths(report),
        languages=_languages(report.records),
        passages=_passages(report),
        duplicates=_duplicates(Path(f"{report.prefix}.duplicates.jsonl")),
        config=yaml.safe_dump(json_value(first.config), allow_unicode=True, sort_keys=False),
    )
    path = Path(f"{report.prefix}.report.html")
    write_atomically(path, page.encode(errors="backslashreplace"))
    return path


def _stage(reason: str) -> int:
    """Where in the pipeline a reason stands; duplicates, which have no entry, come last."""
    if reason in BAD_INPUT_REASONS:
        return -1
    places = [place for place, start in enumerate(_PIPELINE) if reason.startswith(start)]
    return places[-1] if places else len(_PIPELINE)


def _funnel(report: Report) -> list[dict[str, Any]]:
    """Reason by reason in the order of the pipeline: documents dropped and left."""
    left, rows = report.documents_read, []
    for reason, count in sorted(report.rejects.items(), key=lambda item: _stage(item[0])):
        left -= count
        rows.append({"reason": reason, "dropped": count, "left": left, "share": left / max(report.documents_read, 1)})
    return rows


def _by_source(report: Report) -> dict[str, dict[str, Any]]:
    """Per source: documents read and kept, and what its units rejected. Duplicates are found over all sources."""
    found: dict[str, dict[str, Any]] = {}
    for record in report.records:
        row = found.setdefault(record.source, {"read": 0, "kept": 0, "rejects": Counter()})
        row["read"] += record.documents_read
        row["rejects"].update(record.reject_counts)
    for manifest in report.datasets.values():
        for source in manifest.sources:
            found[source.name]["kept"] += source.documents
    for row in found.values():
        row["rejects"] = dict(sorted(row["rejects"].items(), key=lambda item: _stage(item[0])))
    return found


def _examples(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        with path.open(encoding="utf-8") as file:
            for reject in map(json.loads, file):
                shown = found.setdefault(reject["reason"], [])
                if len(shown) < EXAMPLES_PER_REASON:
                    shown.append(reject)
    return dict(sorted(found.items(), key=lambda item: _stage(item[0])))


def _samples(prefix: str, decode: Callable[[Sequence[int]], str]) -> Iterator[str]:
    """The beginnings of some documents, evenly spaced over the dataset."""
    reader = open_indexed(prefix)
    starts = np.concatenate(([0], np.cumsum(reader.sequence_lengths, dtype=np.int64)))
    bounds = np.asarray(reader.document_indices)
    count = len(bounds) - 1
    for index in dict.fromkeys(np.linspace(0, count - 1, SAMPLES_PER_DATASET).astype(int).tolist() if count else []):
        first, last = int(starts[bounds[index]]), int(starts[bounds[index + 1]])
        text = decode(reader.tokens[first : min(last, first + SAMPLE_TOKENS)].tolist())
        yield text + (" …" if last - first > SAMPLE_TOKENS else "")


def _source_tokens(report: Report) -> Counter[str]:
    tokens: Counter[str] = Counter()
    for manifest in report.datasets.values():
        for source in manifest.sources:
            tokens[source.name] += source.tokens
    return tokens


def _sources(report: Report) -> list[dict[str, Any]]:
    """Token shares, what square-root sampling would make of them, and epochs at the budget."""
    tokens, documents = _source_tokens(report), _by_source(report)
    total, roots = sum(tokens.values()), sum(n**0.5 for n in tokens.values())
    rows = []
    for name, count in tokens.most_common():
        damped = count**0.5 / max(roots, 1e-9)
        epochs = report.train_tokens * damped / max(count, 1) if report.train_tokens else None
        row = {"name": name, "documents": documents[name]["kept"], "tokens": count, "share": count / max(total, 1)}
        rows.append(row | {"damped": damped, "epochs": epochs})
    return rows


def _unknown_notes(report: Report) -> list[str]:
    """What the vocabulary could not say, by source."""
    by_source: dict[str, Counter[str]] = {}
    for record in report.records:
        by_source.setdefault(record.source, Counter()).update(record.notes)
    return [f"{source}: {text}." for source, notes in by_source.items() if (text := unknown_text(notes))]


def balance_notes(tokens: Mapping[str, int], train_tokens: int | None) -> list[str]:
    """Advice in words; each names its numbers."""
    total = sum(tokens.values())
    notes = [
        f"{name} is {count / total:.2%} of the tokens: in a blend by size it is hardly seen; weight it up or join it."
        for name, count in tokens.items()
        if len(tokens) > 1 and count < 0.01 * total
    ]
    notes += [
        f"{name} is {count / total:.0%} of the tokens: a blend by size is nearly this source alone."
        for name, count in tokens.items()
        if len(tokens) > 1 and count > 0.9 * total
    ]
    if train_tokens:
        epochs = train_tokens / max(total, 1)
        notes.append(f"The run's {train_tokens:,} tokens are {epochs:.2f} epochs of the {total:,} tokens here.")
        if epochs > MAX_USEFUL_EPOCHS:
            notes.append(f"Beyond {MAX_USEFUL_EPOCHS} epochs repeated data is worth much less than new data: add text.")
    return notes


def _lengths(report: Report) -> list[dict[str, Any]]:
    """Documents by the power of two of their tokens."""
    counts = sum((_length_histogram(prefix) for prefix in report.datasets), np.zeros(40, np.int64))
    used = np.flatnonzero(counts)
    if not len(used):
        return []
    return [
        {"from": 1 << i, "to": (1 << i + 1) - 1, "count": int(counts[i]), "share": float(counts[i] / counts.max())}
        for i in range(used[0], used[-1] + 1)
    ]


def _length_histogram(prefix: str) -> Array:
    """Documents by the power of two of their tokens."""
    reader = open_indexed(prefix)
    ends = np.concatenate(([0], np.cumsum(reader.sequence_lengths, dtype=np.int64)))
    lengths = np.diff(ends[np.asarray(reader.document_indices)])
    return np.bincount(np.log2(lengths[lengths > 0]).astype(np.int64), minlength=40)


def _languages(records: Sequence[UnitRecord]) -> list[dict[str, Any]]:
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.languages)
    seen = sum(total.values())
    return [{"code": code, "count": n, "share": n / seen} for code, n in total.most_common(20)]


def _passages(report: Report) -> dict[str, Any] | None:
    """What was removed within documents, if that was asked for: how much, where, and some of it."""
    first = next(iter(report.datasets.values()))
    if "passages_removed" not in first.config:
        return None
    counts, chars = Counter[str](), Counter[str]()
    for record in report.records:
        counts[record.source] += record.passages_removed
        chars[record.source] += record.passage_chars_removed
    examples = dict.fromkeys(text for record in report.records for text in record.passage_examples)
    rows = [{"source": name, "count": n, "chars": chars[name]} for name, n in counts.items()]
    return {"rows": rows, "examples": list(examples)[:PASSAGES_SHOWN]}


def _duplicates(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    largest: list[tuple[int, dict[str, Any]]] = []
    clusters = members = 0
    with path.open(encoding="utf-8") as file:
        for cluster in map(json.loads, file):
            clusters += 1
            members += len(cluster["dropped"])
            largest = sorted([*largest, (len(cluster["dropped"]), cluster["kept"])], key=lambda pair: -pair[0])[:10]
    shown = [{"kept": ", ".join(f"{v}" for v in kept.values()), "dropped": n} for n, kept in largest]
    return {"clusters": clusters, "members": members, "largest": shown}
