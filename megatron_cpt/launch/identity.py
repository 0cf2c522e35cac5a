"""What makes a run the run it is, by content: a folder may be moved or renamed, but not hold another model.

RUN/identity.json is written by the first attempt and compared by the later ones with what the config names then. The
data's identity is in the ledger (`Ledger.with_sources`), seed and dtype are in RUN/resolved.yaml.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.architecture.rope import RopeChange
from megatron_cpt.corpus.tokenizers.load import tokenizer_fingerprint
from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import CheckpointError, CptError
from megatron_cpt.launch.origin import Origin
from megatron_cpt.runs.folder import Change, RunFolder
from megatron_cpt.runs.marker import MARKER

_WEIGHTS = ("*.safetensors", "*.distcp", "*.bin", "*.pt")
_TOKENIZERS = ("tokenizer.model", "vocab.json", "merges.txt", "tekken.json")  # where there is no tokenizer.json
_SAMPLES, _SAMPLE_BYTES = 16, 4096  # of each file of weights: enough to tell two models apart, and soon read


@dataclass(frozen=True)
class Identity:
    """Content of the model that a run started from. None: unknown, and then equal to anything."""

    architecture: dict[str, Any]
    tokenizer: str | None
    weights: str | None
    branch: str | None = None  # of the checkpoint that the run branched off

    def differences(self, other: Identity) -> list[Change]:
        """What differs in `other`, named as a person would look for it."""
        changes = []
        for key in sorted(self.architecture.keys() | other.architecture.keys()):
            old, new = self.architecture.get(key), other.architecture.get(key)
            if old != new and not (key == "dtype" and None in (old, new)):
                changes.append(Change(f"model: {key}", old, new))
        for name in ("tokenizer", "weights", "branch"):
            old, new = getattr(self, name), getattr(other, name)
            if None not in (old, new) and old != new:
                changes.append(Change(f"{name} (sha256)", old[:12], new[:12]))
        return changes


def identity_of(
    side_files: Path, origin: Origin | None = None, branch: Path | None = None, rope: RopeChange | None = None
) -> Identity:
    """The identity of the model whose side files and weights lie there, with the positions of `rope`."""
    facts = json.loads(json.dumps(dataclasses.asdict(read_architecture(side_files, rope))))  # as they are read back
    weights = None if origin is None or origin.kind != "hf" else weights_fingerprint(origin.weights)
    marker = None if branch is None else hashlib.sha256((branch / MARKER).read_bytes()).hexdigest()
    return Identity(facts, _tokenizer_fingerprint(side_files), weights, marker)


def check_identity(folder: RunFolder, now: Identity) -> list[Change]:
    """Return what differs between the run in `folder` and `now`; nothing for a run that has not started.

    Raises:
        CheckpointError: identity.json is damaged.
    """
    path = folder.root / "identity.json"
    if path.is_file():
        try:
            return Identity(**json.loads(path.read_text(encoding="utf-8"))).differences(now)
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is damaged: {error}",
                hint="restore it from a copy, or delete it: the run is then known by RUN/hf alone",
            ) from error
    if (folder.hf / "config.json").is_file():  # a run of before there were identities
        return identity_of(folder.hf).differences(now)
    return []


def write_identity(folder: RunFolder, identity: Identity) -> None:
    text = json.dumps(dataclasses.asdict(identity), indent=1)
    write_atomically(folder.root / "identity.json", (text + "\n").encode())


def _tokenizer_fingerprint(folder: Path) -> str | None:
    if (folder / "tokenizer.json").is_file():
        try:
            return tokenizer_fingerprint(folder)
        except CptError:  # the check of the datasets says what is wrong with it
            return None
    digest = hashlib.sha256()
    found = [folder / name for name in _TOKENIZERS if (folder / name).is_file()]
    for path in found:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest() if found else None


def weights_fingerprint(folder: Path) -> str | None:
    """A digest of the sizes of all files of weights and of samples of their bytes; names of shards do not enter."""
    paths = [path for pattern in _WEIGHTS for path in folder.glob(pattern)]
    if not paths:
        return None
    return hashlib.sha256("".join(sorted(_sampled(path) for path in paths)).encode()).hexdigest()


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(number * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
