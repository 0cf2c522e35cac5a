"""Items are made of the documents they are given, always the same, with one right answer."""

from __future__ import annotations

import items

TERMS = [f"Term {n} of length\nA definition of some forty characters, number {n} of them." for n in range(30)]
PIECES = [
    "; ".join(f"piece {n} of document {document} is as long as it must be" for n in range(9)) for document in range(8)
]


def test_a_definition_asks_for_its_term() -> None:
    made = items.term_items([*TERMS, "Leak\nA leak is named in this definition, which is therefore left out."])
    assert len(made) == 30
    truth = {text.split("\n")[1]: text.split("\n")[0] for text in TERMS}
    for item in made:
        assert item["choices"][item["answer"]] == truth[item["definition"]]
        assert len(set(item["choices"])) == 4
    assert len({item["answer"] for item in made}) == 4
    assert made == items.term_items(reversed(TERMS))


def test_a_piece_asks_for_the_one_that_follows_it() -> None:
    made = items.next_items(PIECES)
    assert len(made) == 8 * items.ITEMS_PER_DOCUMENT
    for item in made:
        document = next(text for text in PIECES if item["text"] in text)
        assert f"{item['text']} {item['choices'][item['answer']]}" in document
        assert sum(choice in document for choice in item["choices"]) == 1
