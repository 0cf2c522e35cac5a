"""Four-choice items out of the held-out documents of the quickstart, with the task files that ask them.

    python examples/quickstart/items.py .quickstart/SIZE

Of the domain: which term has this definition? Of the general text: which piece follows this one? The documents are read
from the datasets that training never saw; wrong answers are those of other held-out documents of about the same length.
Nothing is drawn at random, so every run asks the same.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from megatron_cpt.cli import run
from megatron_cpt.corpus.dataset.indexed import open_indexed
from megatron_cpt.corpus.tokenizers.load import load_tokenizer
from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import DataError

logger = logging.getLogger(__name__)

Item = dict[str, Any]
TASKS = ("hpo_terms", "factbook_next")  # TASK.yaml lies beside this script
CHOICES = 4
MOST_ITEMS = 100  # of a task
ITEMS_PER_DOCUMENT = 4
PIECE_CHARACTERS = range(40, 200)


class Pair(NamedTuple):
    """A question, its answer and the document that both are of."""

    given: str
    answer: str
    document: str


def term_items(documents: Iterable[str]) -> list[Item]:
    """Definition -> term; a definition that names its term is left out."""
    pairs = []
    for document in documents:
        term, _, rest = document.partition("\n")
        definition = rest.partition("\n")[0]
        if 40 <= len(definition) <= 400 and term.lower() not in definition.lower():
            pairs.append(Pair(definition, term, document))
    return _items("definition", pairs)


def next_items(documents: Iterable[str]) -> list[Item]:
    """A piece of text -> the one that follows it in its document."""
    pairs = []
    for document in documents:
        pieces = [piece.strip() for piece in re.split(r"(?<=[.;])\s+|\n+", document)]
        good = [
            Pair(first, second, document)
            for first, second in itertools.pairwise(pieces)
            if len(first) in PIECE_CHARACTERS and len(second) in PIECE_CHARACTERS
        ]
        step = max(1, len(good) // ITEMS_PER_DOCUMENT)
        pairs += good[::step][:ITEMS_PER_DOCUMENT]
    return _items("text", pairs)


def _items(name: str, pairs: Sequence[Pair]) -> list[Item]:
    items = []
    once = {pair.given: pair for pair in pairs}
    for pair in sorted(once.values(), key=lambda pair: _order(pair.given))[:MOST_ITEMS]:
        size, given = len(pair.answer), pair.given
        wrong = {other.answer for other in pairs if other.answer not in pair.document}
        alike = sorted(wrong, key=lambda text: (abs(len(text) - size), _order(given + text)))[:24]
        near = sorted(alike, key=lambda text: _order(given + text))[: CHOICES - 1]
        choices = sorted([pair.answer, *near], key=lambda text: _order(text + given))
        if len(choices) == CHOICES:
            items.append({name: given, "choices": choices, "answer": choices.index(pair.answer)})
    return items


def _order(text: str) -> str:
    """An order that depends on the text alone and says nothing about it."""
    return hashlib.sha256(text.encode()).hexdigest()


def held_out(prefix: Path, model: Path) -> list[str]:
    """The documents of a dataset as text."""
    tokenizer = load_tokenizer(model)
    documents = (document[document != tokenizer.eod_id].tolist() for document in open_indexed(prefix))
    return [tokenizer.decode(ids) for ids in documents]


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
def main(work: Path) -> None:
    """Write WORK/tasks: a task file and its items for the domain and for general text."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder, model = work / "tasks", work / "model"
    folder.mkdir(parents=True, exist_ok=True)
    made = {
        "hpo_terms": term_items(held_out(work / "data" / "medical_valid", model)),
        "factbook_next": next_items(held_out(work / "data" / "general_valid", model)),
    }
    for task in TASKS:
        if not made[task]:
            raise DataError(f"no items for {task}", hint="the held-out documents have changed")
        lines = [json.dumps(item, ensure_ascii=False) for item in made[task]]
        write_atomically(folder / f"{task}.jsonl", ("\n".join(lines) + "\n").encode())
        shutil.copyfile(Path(__file__).parent / f"{task}.yaml", folder / f"{task}.yaml")
        logger.info("wrote %s, %s items", folder / f"{task}.jsonl", f"{len(lines):,}")


if __name__ == "__main__":
    run(main, prog="items.py")
