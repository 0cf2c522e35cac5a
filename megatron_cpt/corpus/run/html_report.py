"""PREFIX.report.html: one self-contained page per corpus, for the person who decides what to train on.

What was dropped and why with examples, document lengths, languages, duplicates, token shares per source with advice on
their balance, and the tokens against the budget of the run if `train_tokens` is stated.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.corpus.arrays import Array
from megatron_cpt.corpus.dataset.indexed import open_indexed
from megatron_cpt.corpus.dataset.manifest import Manifest
from megatron_cpt.corpus.run.parts import UnitRecord
from megatron_cpt.durable import write_atomically

EXAMPLES_PER_REASON = 3
PASSAGES_SHOWN = 10
# Muennighoff et al. 2023, Scaling Data-Constrained Language Models: up to 4 epochs a repeat is worth nearly new data.
MAX_USEFUL_EPOCHS = 4

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0 1.5em}
td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}.bar{background:#4a7ab5;height:.9em;display:inline-block}
details{margin:.2em 0 .2em 1em}pre{white-space:pre-wrap;background:#f5f5f5;padding:.5em;font-size:13px}
.note{color:#664}
"""


@dataclass(frozen=True)
class Report:
    """What the page is made from."""

    prefix: str
    datasets: Mapping[str, Manifest]
    records: Sequence[UnitRecord]
    documents_read: int
    rejects: Mapping[str, int]
    train_tokens: int | None


def write_report(report: Report) -> Path:
    """Write PREFIX.report.html and return its path."""
    sections = [
        _datasets(report),
        _funnel(report),
        _sources(report),
        _lengths(report),
        _languages(report.records),
        _passages(report),
        _duplicates(Path(f"{report.prefix}.duplicates.jsonl")),
    ]
    title = html.escape(f"Corpus {report.prefix}")
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
    path = Path(f"{report.prefix}.report.html")
    write_atomically(path, (head + f"<h1>{title}</h1>" + "".join(sections) + "</html>\n").encode())
    return path


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already."""
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>" + "".join(lines) + "</table>"


def _bar(share: float) -> str:
    return f'<span class=bar style="width:{max(share, 0) * 20:.2f}em"></span>'


def _datasets(report: Report) -> str:
    rows = [
        [html.escape(prefix), f"{m.document_count:,}", f"{m.token_count:,}", f"{m.bin_bytes / 1e6:,.1f} MB", m.dtype]
        for prefix, m in report.datasets.items()
    ]
    first = next(iter(report.datasets.values()))
    tokenizer = html.escape(
        f"Tokenizer {first.tokenizer.name}, vocabulary {first.tokenizer.vocab_size:,}, "
        f"end of document {first.tokenizer.eod_token} = {first.tokenizer.eod_id}."
    )
    return "<h2>Datasets</h2>" + _table(["dataset", "documents", "tokens", "size", "ids"], rows) + f"<p>{tokenizer}</p>"


def _funnel(report: Report) -> str:
    """Documents read, then what each reason took away, then what stayed; examples can be unfolded."""
    left = report.documents_read
    rows = [["read", "", f"{left:,}", _bar(1.0)]]
    for reason, count in report.rejects.items():
        left -= count
        rows.append([html.escape(reason), f"-{count:,}", f"{left:,}", _bar(left / max(report.documents_read, 1))])
    examples = _examples(Path(f"{report.prefix}.rejects.jsonl"))
    folded = "".join(
        f"<details><summary>{html.escape(reason)}: examples</summary>"
        + "".join(f"<pre>{html.escape(text)}</pre>" for text in texts)
        + "</details>"
        for reason, texts in examples.items()
    )
    table = _table(["step", "dropped", "left", ""], rows)
    return f"<h2>What was dropped and why</h2>{table}{folded}"


def _examples(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    if path.exists():
        with path.open(encoding="utf-8") as file:
            for reject in map(json.loads, file):
                texts = found.setdefault(reject["reason"], [])
                if len(texts) < EXAMPLES_PER_REASON:
                    texts.append(f"{reject['file']}:{reject['line']}\n{reject['detail']}")
    return found


def _sources(report: Report) -> str:
    """Token shares, what square-root sampling would make of them, and epochs at the budget."""
    tokens: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    for manifest in report.datasets.values():
        for source in manifest.sources:
            tokens[source.name] += source.tokens
            documents[source.name] += source.documents
    total, roots = sum(tokens.values()), sum(n**0.5 for n in tokens.values())
    header = ["source", "documents", "tokens", "share", "", "share by square root"]
    rows = []
    for name, count in tokens.most_common():
        share, damped = count / max(total, 1), count**0.5 / max(roots, 1e-9)
        row = [html.escape(name), f"{documents[name]:,}", f"{count:,}", f"{share:.1%}", _bar(share), f"{damped:.1%}"]
        if report.train_tokens:
            row.append(f"{report.train_tokens * damped / max(count, 1):.1f}")
        rows.append(row)
    if report.train_tokens:
        header.append("epochs at that share")
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in balance_notes(tokens, report.train_tokens))
    return "<h2>Sources</h2>" + _table(header, rows) + notes


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


def _lengths(report: Report) -> str:
    counts = np.zeros(40, np.int64)
    for prefix in report.datasets:
        counts += _length_histogram(prefix)
    used = np.flatnonzero(counts)
    if not len(used):
        return ""
    rows = [
        [f"{1 << i:,} to {(1 << i + 1) - 1:,}", f"{int(counts[i]):,}", _bar(counts[i] / counts.max())]
        for i in range(used[0], used[-1] + 1)
    ]
    return "<h2>Document lengths</h2>" + _table(["tokens", "documents", ""], rows)


def _length_histogram(prefix: str) -> Array:
    """Documents by the power of two of their tokens."""
    reader = open_indexed(prefix)
    ends = np.concatenate(([0], np.cumsum(reader.sequence_lengths, dtype=np.int64)))
    lengths = np.diff(ends[np.asarray(reader.document_indices)])
    return np.bincount(np.log2(lengths[lengths > 0]).astype(np.int64), minlength=40)


def _languages(records: Sequence[UnitRecord]) -> str:
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.languages)
    if not total:
        return ""
    seen = sum(total.values())
    rows = [[html.escape(code), f"{n:,}", _bar(n / seen)] for code, n in total.most_common(20)]
    return "<h2>Languages before the filter</h2>" + _table(["language", "documents", ""], rows)


def _passages(report: Report) -> str:
    """What was removed within documents, if that was asked for: how much, where, and some of it."""
    first = next(iter(report.datasets.values()))
    if "passages_removed" not in first.config:
        return ""
    counts, chars = Counter[str](), Counter[str]()
    for record in report.records:
        counts[record.source] += record.passages_removed
        chars[record.source] += record.passage_chars_removed
    rows = [[html.escape(name), f"{n:,}", f"{chars[name]:,}"] for name, n in counts.items()]
    examples = dict.fromkeys(text for record in report.records for text in record.passage_examples)
    shown = "".join(f"<pre>{html.escape(text)}</pre>" for text in list(examples)[:PASSAGES_SHOWN])
    folded = f"<details><summary>examples</summary>{shown}</details>" if shown else ""
    return "<h2>Repeated passages removed</h2>" + _table(["source", "passages", "characters"], rows) + folded


def _duplicates(path: Path) -> str:
    if not path.exists():
        return ""
    largest: list[tuple[int, dict[str, Any]]] = []
    clusters = members = 0
    with path.open(encoding="utf-8") as file:
        for cluster in map(json.loads, file):
            clusters += 1
            members += len(cluster["dropped"])
            largest = sorted([*largest, (len(cluster["dropped"]), cluster["kept"])], key=lambda pair: -pair[0])[:10]
    rows = [[html.escape(", ".join(f"{v}" for v in kept.values())), f"{n:,}"] for n, kept in largest]
    text = f"<p>{members:,} documents repeat {clusters:,} others. The most repeated:</p>"
    return "<h2>Duplicates</h2>" + text + _table(["kept", "dropped"], rows)
