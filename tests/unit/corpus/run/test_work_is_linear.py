"""Nothing in the pipeline grows faster than the input: calls are counted, not seconds."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from megatron_cpt.corpus.readers import plan
from megatron_cpt.corpus.run.preprocess import preprocess
from tests.unit.corpus.conftest import write_jsonl


def calls_of(function: Any) -> Counter[str]:
    """Calls of the product's own functions, generators' steps included, while `function` runs."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and "megatron_cpt" in frame.f_code.co_filename:
            calls[f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname}"] += 1

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize(
    "keys", [{}, {"dedup": {"near": True, "passages": True}, "source": {"metadata": ["text"]}}], ids=["plain", "dedup"]
)
def test_twice_the_units_are_at_most_twice_the_work(
    tmp_path: Path, make_corpus: Any, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 300)
    monkeypatch.setattr(plan, "MAX_UNIT_BYTES", 300)
    seen: list[tuple[int, Counter[str]]] = []
    for count in (80, 160):  # more units than files that are kept open
        rows = [f"{random.Random(i).randbytes(20).hex()} {i}" for i in range(count * 6)]  # nothing is a duplicate
        corpus = make_corpus(
            write_jsonl(tmp_path / f"{count}.jsonl", rows), output_prefix=str(tmp_path / f"out{count}"), **keys
        )
        units = len(plan.plan_units(corpus))
        seen.append((units, calls_of(lambda corpus=corpus: preprocess(corpus, workers=1))))
    (few, before), (many, after) = seen
    assert few > 64 and many / few > 1.8
    # the constant part allows less than the ratio of units; a function called for all pairs would show four times
    grown = {name: (before[name], n) for name, n in after.items() if n > 1.15 * before[name] * many / few + 5}
    assert grown == {}


def test_small_files_share_a_unit(tmp_path: Path, make_corpus: Any) -> None:
    for i in range(300):
        write_jsonl(tmp_path / "in" / f"{i:03d}.jsonl", [f"document {i}", "second"])
    corpus = make_corpus(tmp_path / "in")
    (unit,) = plan.plan_units(corpus)
    assert len(unit.paths) == 300
    preprocess(corpus, workers=1)
    expected = Path(f"{corpus.output_prefix}.bin").read_bytes()
    whole = [text for i in range(300) for text in (f"document {i}", "second")]
    other = make_corpus(write_jsonl(tmp_path / "one.jsonl", whole), output_prefix=str(tmp_path / "one"))
    preprocess(other, workers=1)
    assert Path(f"{other.output_prefix}.bin").read_bytes() == expected


def test_small_files_of_several_formats_share_a_unit_in_their_order(tmp_path: Path, make_corpus: Any) -> None:
    folder, texts = tmp_path / "in", [f"document {i}" for i in range(60)]
    folder.mkdir()
    for i, text in enumerate(texts):
        if i % 3 == 0:
            write_jsonl(folder / f"{i:03d}.jsonl", [text])
        else:
            suffix, content = ("txt", text) if i % 3 == 1 else ("csv", f"text\n{text}\n")
            (folder / f"{i:03d}.{suffix}").write_text(content)
    corpus = make_corpus(folder)
    (unit,) = plan.plan_units(corpus)
    assert len(unit.paths) == 60 and len(set(unit.formats)) == 3
    preprocess(corpus, workers=1)
    other = make_corpus(write_jsonl(tmp_path / "one.jsonl", texts), output_prefix=str(tmp_path / "one"))
    preprocess(other, workers=1)
    assert Path(f"{corpus.output_prefix}.bin").read_bytes() == Path(f"{other.output_prefix}.bin").read_bytes()


def test_places_in_a_shared_unit_are_those_of_each_file(tmp_path: Path, make_corpus: Any) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "fine"}\n' * 40 + "{broken\n")
    outcome = preprocess(make_corpus(*sorted(tmp_path.glob("*.jsonl")), max_reject_ratio=0.1), workers=1)
    assert outcome.rejects == {"invalid_json": 3} and outcome.rejects_file is not None
    lines = Path(outcome.rejects_file).read_text().splitlines()
    assert [(f"{n}.jsonl" in line, '"line": 41' in line) for n, line in zip("abc", lines, strict=True)] == [
        (True, True)
    ] * 3
