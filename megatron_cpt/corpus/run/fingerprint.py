"""The identity of a run: the same fingerprint means the same datasets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_cpt.corpus.dataset.manifest import FORMAT_VERSION, manifest_hash, read_manifest
from megatron_cpt.corpus.filters.language import model_file, model_sha256
from megatron_cpt.corpus.readers.unit import Unit
from megatron_cpt.corpus.schema import Corpus
from megatron_cpt.corpus.tokenizers.record import TokenizerRecord

# Changes when a staging folder of an older version cannot be continued.
STAGING_FORMAT = 3
# Begins every fingerprint made by these rules, so that one made by older rules is not taken for another input.
PREFIX = "v2-"
# Keys of a corpus that do not change what is in its datasets.
_WITHOUT_EFFECT = {"output_prefix", "tokenizer", "max_reject_ratio", "warn_filter_ratio", "train_tokens"}


def output_fingerprint(corpus: Corpus, units: Sequence[Unit], tokenizer: TokenizerRecord) -> str:
    """Identity of the datasets: input files with sizes and times, what the corpus states, the tokenizer."""
    filters = [corpus.filters, *(source.filters for source in corpus.sources if source.filters)]
    models = sorted({Path(chosen.perplexity.model) for chosen in filters if chosen.perplexity})
    lists = sorted({chosen.bad_words.file for chosen in filters if chosen.bad_words})
    evaluation_sets = corpus.decontaminate.files if corpus.decontaminate else ()
    content: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "corpus": corpus.model_dump(mode="json", exclude=_WITHOUT_EFFECT, exclude_defaults=True),
        "tokenizer": [tokenizer.fingerprint, tokenizer.eod_id],
        "files": _sizes_and_times(sorted({path for unit in units for path in unit.paths})),
        "evaluation sets": [(path, Path(path).stat().st_size) for path in evaluation_sets if Path(path).is_file()],
        "models": _sizes_and_times(path for folder in models for path in sorted(folder.iterdir()) if path.is_file()),
        "bad_words": [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in lists],
        "against": [manifest_hash(read_manifest(prefix)) for prefix in (corpus.dedup.against if corpus.dedup else ())],
    }
    own_models = [model_file(chosen.language) for chosen in filters if chosen.language and chosen.language.model]
    if own_models:
        content["language models"] = sorted(model_sha256(path) for path in own_models)
    return PREFIX + _digest(content)


def is_comparable(fingerprint: str) -> bool:
    """False for a fingerprint that an older version made by other rules."""
    return fingerprint.startswith(PREFIX)


def staging_fingerprint(output: str, units: Sequence[Unit]) -> str:
    """Identity of what lies in a staging folder: it also depends on how the input was cut into units."""
    return _digest([STAGING_FORMAT, output, [list(asdict(unit).values()) for unit in units]])


def _sizes_and_times(paths: Iterable[str | Path]) -> list[tuple[str, int, int]]:
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path in paths for stat in (Path(path).stat(),)]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
