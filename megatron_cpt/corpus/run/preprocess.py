"""The whole run: open the corpus, let workers make parts, assemble the datasets."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_cpt.corpus.dataset.manifest import Manifest, bin_path, manifest_path, read_manifest
from megatron_cpt.corpus.dataset.writer import in_the_way
from megatron_cpt.corpus.dedup.passage_stage import find_repeated, is_cleaned
from megatron_cpt.corpus.readers.registry import resolve_datasets
from megatron_cpt.corpus.readers.standard_input import standard_input_as_file
from megatron_cpt.corpus.readers.streams import forget_stale_pieces
from megatron_cpt.corpus.run.assemble import Assembly
from megatron_cpt.corpus.run.corpus_run import WHOLE, CorpusRun, Shard, StartProgress, open_run
from megatron_cpt.corpus.run.duplicates import DedupResult, check_references, remove_duplicates
from megatron_cpt.corpus.run.filter_shares import filter_warnings
from megatron_cpt.corpus.run.fingerprint import is_comparable, staging_fingerprint
from megatron_cpt.corpus.run.finished import FinishedUnits
from megatron_cpt.corpus.run.html_report import Report, write_report
from megatron_cpt.corpus.run.map_stage import UnitStage, map_units
from megatron_cpt.corpus.run.rejects import (
    absolute_metadata,
    absolute_rejects,
    check_rejects,
    source_warnings,
    write_json_lines,
)
from megatron_cpt.corpus.run.unit import clean_unit, cleaned_record, process_unit, processed_record
from megatron_cpt.corpus.schema import Corpus
from megatron_cpt.corpus.staging import shared_staging_folder, staging_folder, staging_path, write_errors_told
from megatron_cpt.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a run left: the manifest of each dataset by prefix, and its rejects."""

    datasets: dict[str, Manifest]
    documents_read: int
    rejects: dict[str, int]
    rejects_file: str | None
    notes: dict[str, int] = field(default_factory=dict)  # documents kept of which something is to be said
    already_done: bool = False
    files: tuple[str, ...] = ()  # all that lies there now, datasets first


def preprocess(
    corpus: Corpus,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    start_progress: StartProgress | None = None,
) -> Outcome:
    """Make the datasets of `corpus`. The files are the same for any number of workers and shards.

    A killed run continues when called again with the same input; a finished one returns at once.
    `start_progress(stage, total_bytes)` gives a function that is called with each finished unit; a stage of 0 bytes is
    only named.
    Raises DataError for bad input, a second writer, or other datasets under the same prefix.
    """
    with standard_input_as_file(resolve_datasets(corpus)) as resolved, write_errors_told(corpus.output_prefix):
        if start_progress is not None:
            start_progress("finding the files and loading the tokenizer", 0)
        run = open_run(resolved, workers, start_progress)
        prefixes = dataset_prefixes(resolved)
        if not overwrite and (done := _already_done(run, prefixes)):
            return done
        check_references(run)
        with staging_folder(resolved.output_prefix, staging_fingerprint(run.fingerprint, run.planned)) as staging:
            forget_stale_pieces(staging)
            if run.passages:
                _clean(run)
                _find_repeated(run)
            return _finish(run, prefixes)


def preprocess_shard(
    corpus: Corpus,
    shard: int,
    shards: int,
    *,
    workers: int | None = None,
    start_progress: StartProgress | None = None,
) -> int:
    """Do every `shards`-th unit, from number `shard` on, and leave the parts in the staging folder.

    Any number of shards may run at the same time on machines that share the file system. `preprocess` on the
    same corpus afterwards finds their parts and finishes. Where passages are deduplicated, a shard cleans its
    units; when it finds those of all shards cleaned, it goes on to their parts. Return its number of units.
    """
    if any("-" in source.files for source in corpus.sources):
        raise DataError("standard input cannot be shared by shards", hint="write it to a file first")
    with write_errors_told(corpus.output_prefix):
        run = open_run(resolve_datasets(corpus), workers, start_progress, Shard(shard, shards))
        check_references(run)
        with shared_staging_folder(corpus.output_prefix, staging_fingerprint(run.fingerprint, run.planned)):
            if run.passages:
                cleaned = _clean(run)
                if not _find_repeated(run.of_all_shards()):
                    log.info("cleaned; shards are still at work: run this one again after them, or the joining run")
                    return len(cleaned.units)
            return len(_process(run).units)


def _clean(run: CorpusRun) -> FinishedUnits:
    """The first half of all units, where passages are deduplicated."""
    return map_units(run, UnitStage("clean", clean_unit, cleaned_record, reads_input=True))


def _process(run: CorpusRun) -> FinishedUnits:
    """The parts of all units."""
    return map_units(run, UnitStage("tokenise", process_unit, processed_record, reads_input=run.passages is None))


def _find_repeated(run: CorpusRun) -> bool:
    """The join stage of passages. Return False when not all units are cleaned."""
    units = run.units_in_order()
    if units is None or any(not is_cleaned(run.staging, unit.name, True) for unit in units):
        return False
    assert run.passages is not None
    find_repeated(run.staging, [unit.name for unit in units], run.passages, run.workers)
    return True


def dataset_prefixes(corpus: Corpus) -> dict[str, str]:
    """Split name -> prefix of its dataset."""
    if not corpus.split:
        return {WHOLE: corpus.output_prefix}
    return {name: f"{corpus.output_prefix}_{name}" for name in corpus.split}


def _already_done(run: CorpusRun, prefixes: Mapping[str, str]) -> Outcome | None:
    """The outcome of an earlier run of the same plan; DataError when other datasets are in the way."""
    if not any(bin_path(p).exists() or manifest_path(p).exists() for p in prefixes.values()):
        return None
    output_prefix, datasets = run.corpus.output_prefix, {}
    for prefix in prefixes.values():
        if not manifest_path(prefix).exists():
            if staging_path(output_prefix).exists():  # killed between two of the final renames
                return None
            raise in_the_way(prefix)
        manifest = read_manifest(prefix)
        plan = str(manifest.config.get("plan", ""))
        if plan != run.fingerprint:
            older = " by an older version, which cannot be compared with this input"
            raise in_the_way(prefix, " of another input, configuration or tokenizer" if is_comparable(plan) else older)
        datasets[prefix] = manifest
    first = next(iter(datasets.values()))
    rejects_file = _rejects_file(output_prefix)
    return Outcome(
        datasets, int(first.config["documents_read"]), first.rejects,
        str(rejects_file) if rejects_file.exists() else None, first.config.get("notes", {}), already_done=True,
        files=_files(run.corpus.output_prefix, prefixes),
    )  # fmt: skip


def _rejects_file(output_prefix: str) -> Path:
    return Path(f"{output_prefix}.rejects.jsonl")


def _finish(run: CorpusRun, prefixes: Mapping[str, str]) -> Outcome:
    """Process what is missing, check the whole, and write the datasets with the files beside them."""
    corpus, done = run.corpus, _process(run)
    check_rejects(run.staging, done, corpus.max_reject_ratio)
    _check_metadata(run, done)
    names = [source.name for source in corpus.sources]
    warnings = source_warnings(names, done, corpus.max_reject_ratio)
    for line in (*warnings, *filter_warnings(run.staging, done, corpus.warn_filter_ratio)):
        log.warning("%s", line)
    duplicates = remove_duplicates(run, done)
    rejects = done.reject_counts | duplicates.counts
    _check_not_empty(done, prefixes, rejects)
    run.begin("write", ", ".join(prefixes.values()))
    _write_lists(run, done, duplicates, prefixes)
    assembly = Assembly(run, done, duplicates.keep, rejects)
    datasets = {prefix: assembly.write(split, prefix) for split, prefix in prefixes.items()}
    write_report(
        Report(
            corpus.output_prefix, datasets, done.records, done.documents_read, rejects, corpus.train_tokens,
            run.tokenizer.decode,
        )
    )  # fmt: skip
    rejects_file = _rejects_file(corpus.output_prefix)
    written = str(rejects_file) if rejects_file.exists() else None
    files = _files(corpus.output_prefix, prefixes)
    return Outcome(datasets, done.documents_read, rejects, written, done.notes, files=files)


def _files(output_prefix: str, prefixes: Mapping[str, str]) -> tuple[str, ...]:
    """The files of a finished run."""
    of_dataset = ("bin", "idx", "manifest.json", "documents.jsonl")
    names = [f"{prefix}.{suffix}" for prefix in prefixes.values() for suffix in of_dataset]
    names += [f"{output_prefix}.{suffix}" for suffix in ("report.html", "rejects.jsonl", "duplicates.jsonl")]
    return tuple(name for name in names if Path(name).exists())


def _check_metadata(run: CorpusRun, done: FinishedUnits) -> None:
    """Say which kept keys no document of a source has. Raises DataError for `id_key` when no document at all has it."""
    found = done.metadata_found()
    for source in run.corpus.sources:
        own = found.get(source.name, Counter())
        if absent := [key for key in source.metadata if not own.get(key)]:
            log.warning("source %r: no document has the metadata key %s", source.name, ", ".join(map(repr, absent)))
    key = run.corpus.dedup.id_key if run.corpus.dedup else None
    if key is not None and done.documents_read and not any(own.get(key) for own in found.values()):
        raise DataError(
            f"dedup.id_key: no document has the key {key!r}, so it would remove nothing",
            hint="name a key of the documents, such as id or meta.id",
        )


def _write_lists(run: CorpusRun, done: FinishedUnits, duplicates: DedupResult, prefixes: Mapping[str, str]) -> None:
    """The rejects, the clusters of duplicates, and the metadata of each split's documents, as JSON lines."""
    output_prefix = run.corpus.output_prefix
    write_json_lines(_rejects_file(output_prefix), absolute_rejects(run.staging, done))
    write_json_lines(Path(f"{output_prefix}.duplicates.jsonl"), duplicates.clusters())
    for split, prefix in prefixes.items():
        rows = absolute_metadata(run.staging, done, split, duplicates.keep)
        write_json_lines(Path(f"{prefix}.documents.jsonl"), rows)


def _check_not_empty(done: FinishedUnits, prefixes: Mapping[str, str], rejects: Mapping[str, int]) -> None:
    anything = any(part.tokens for record in done.records for part in record.parts.values())
    for split in prefixes:
        if not sum(record.parts[split].tokens for record in done.records):
            what = f"split {split!r}" if anything else "the corpus"
            raise DataError(
                f"{what} has no token: {done.documents_read:,} documents read, rejects {dict(rejects) or 'none'}",
                hint="give it a larger fraction" if anything else "check the input and the filters",
            )
