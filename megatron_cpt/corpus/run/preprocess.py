"""The whole run: plan units, load the tokenizer, let workers make parts, assemble the datasets."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_cpt.corpus.dataset.manifest import Manifest, bin_path, manifest_path, read_manifest
from megatron_cpt.corpus.dedup.passage_stage import find_repeated, is_cleaned
from megatron_cpt.corpus.dedup.stage import remove_duplicates
from megatron_cpt.corpus.filters.steps import Step
from megatron_cpt.corpus.readers.blocks import forget_stale_blocks
from megatron_cpt.corpus.readers.registry import resolve_datasets
from megatron_cpt.corpus.readers.standard_input import standard_input_as_file
from megatron_cpt.corpus.readers.units import Unit, plan_units
from megatron_cpt.corpus.run.assemble import Assembly, write_dataset
from megatron_cpt.corpus.run.html_report import Report, write_report
from megatron_cpt.corpus.run.map_stage import (
    StartProgress,
    Work,
    check_rejects,
    clean_units,
    process_units,
    units_in_order,
)
from megatron_cpt.corpus.run.parts import UnitRecord
from megatron_cpt.corpus.run.rejects import (
    absolute_metadata,
    absolute_rejects,
    count_rejects,
    lines_before,
    write_json_lines,
)
from megatron_cpt.corpus.run.staging import plan_fingerprint, shared_staging_folder, staging_folder, staging_path
from megatron_cpt.corpus.run.unit import (
    WHOLE,
    Job,
    sample_texts,
    steps_by_source,
    worker_count,
)
from megatron_cpt.corpus.schema import Corpus
from megatron_cpt.corpus.tokenizers.tokenizer import CorpusTokenizer, load_tokenizer
from megatron_cpt.errors import CptError, DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a run left: the manifest of each dataset by prefix, and its rejects."""

    datasets: dict[str, Manifest]
    documents_read: int
    rejects: dict[str, int]
    rejects_file: str | None
    already_done: bool = False


def preprocess(
    corpus: Corpus,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    start_progress: StartProgress | None = None,
) -> Outcome:
    """Make the datasets of `corpus`. The files are the same for any number of workers and shards.

    A killed run continues when called again with the same input; a finished one returns at once.
    `start_progress(total_bytes)` gives a function that is called with each finished unit.
    Raises DataError for bad input, a second writer, or other datasets under the same prefix.
    """
    with standard_input_as_file(resolve_datasets(corpus)) as resolved, _disk_full_explained(corpus.output_prefix):
        plan = _plan(resolved)
        prefixes = dataset_prefixes(resolved)
        if not overwrite and (done := _already_done(resolved, prefixes, plan.fingerprint)):
            return done
        with staging_folder(resolved.output_prefix, plan.fingerprint) as staging:
            forget_stale_blocks(staging)
            work = Work(plan.job(staging), plan.units, worker_count(workers), start_progress)
            if work.job.passages:
                clean_units(work)
                _find_repeated(work)
            return _finish(work, prefixes, plan.fingerprint)


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
    units; when it finds those of all shards cleaned, it goes on to their parts. Returns its number of units.
    """
    if any("-" in source.files for source in corpus.sources):
        raise DataError("standard input cannot be shared by shards", hint="write it to a file first")
    with _disk_full_explained(corpus.output_prefix):
        plan = _plan(resolve_datasets(corpus))
        with shared_staging_folder(corpus.output_prefix, plan.fingerprint) as staging:
            work = Work(plan.job(staging), plan.units, worker_count(workers), start_progress, shard, shards)
            if work.job.passages:
                cleaned = clean_units(work)
                if not _find_repeated(replace(work, shard=0, shards=1)):
                    log.info("cleaned; shards are still at work: run this one again after them, or the joining run")
                    return cleaned
            return len(process_units(work)[0])


def _find_repeated(work: Work) -> bool:
    """The join stage of passages; False when not all units are cleaned."""
    job, units = work.job, units_in_order(work)
    if units is None or any(not is_cleaned(job.staging, unit.index, True) for unit in units):
        return False
    assert job.passages is not None
    find_repeated(job.staging, [unit.index for unit in units], job.passages, work.workers)
    return True


@dataclass(frozen=True)
class _Plan:
    """A run before it starts: the same plan gives the same bytes."""

    corpus: Corpus
    units: list[Unit]
    tokenizer: CorpusTokenizer
    fingerprint: str
    steps: dict[str, list[Step]]

    def job(self, staging: Path) -> Job:
        return Job(self.corpus, self.tokenizer, staging, self.steps)


def _plan(corpus: Corpus) -> _Plan:
    units = plan_units(corpus)
    tokenizer = load_tokenizer(
        corpus.tokenizer,
        eod_token=corpus.eod_token,
        special_tokens_in_text=corpus.special_tokens_in_text,
        post_processor=corpus.post_processor,
        sample=sample_texts(units, corpus.max_document_bytes),
    )
    steps = steps_by_source(corpus)  # first: it names what cannot be loaded
    return _Plan(corpus, units, tokenizer, plan_fingerprint(corpus, units, tokenizer.record()), steps)


@contextmanager
def _disk_full_explained(prefix: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            where = f" ({error.filename})" if error.filename else ""
            raise DataError(
                f"cannot write {prefix}: {error.strerror or error}{where}",
                hint="check the folder, its permissions and the disk; the same command continues",
            ) from error
        raise CptError(
            f"the disk of {prefix} is full ({error.strerror}); nothing was written under the final name",
            hint="about 2x the size of the .bin is needed; free some space and run the same command again",
        ) from error


def dataset_prefixes(corpus: Corpus) -> dict[str, str]:
    """Split name -> prefix of its dataset."""
    if not corpus.split:
        return {WHOLE: corpus.output_prefix}
    return {name: f"{corpus.output_prefix}_{name}" for name in corpus.split}


def _already_done(corpus: Corpus, prefixes: dict[str, str], fingerprint: str) -> Outcome | None:
    """The outcome of an earlier run of the same plan; DataError when other datasets are in the way."""
    if not any(bin_path(p).exists() or manifest_path(p).exists() for p in prefixes.values()):
        return None
    datasets = {}
    for prefix in prefixes.values():
        if not manifest_path(prefix).exists():
            if staging_path(corpus.output_prefix).exists():  # killed between two of the final renames
                return None
            raise _in_the_way(prefix, "")
        manifest = read_manifest(prefix)
        if manifest.config.get("plan") != fingerprint:
            raise _in_the_way(prefix, " of another input, configuration or tokenizer")
        datasets[prefix] = manifest
    first = next(iter(datasets.values()))
    rejects_file = Path(f"{corpus.output_prefix}.rejects.jsonl")
    return Outcome(
        datasets, int(first.config["documents_read"]), first.rejects,
        str(rejects_file) if rejects_file.exists() else None, already_done=True,
    )  # fmt: skip


def _in_the_way(prefix: str, what: str) -> DataError:
    return DataError(
        f"{prefix}: there is already a dataset{what}", hint="choose another --output-prefix, or give --overwrite"
    )


def _finish(work: Work, prefixes: dict[str, str], fingerprint: str) -> Outcome:
    """Make what parts are missing, check the whole, remove duplicates, write the rejects file and the datasets."""
    job, corpus = work.job, work.job.corpus
    units, records = process_units(work)
    check_rejects(job, units, records, corpus.max_reject_ratio)
    documents_read = sum(record.documents_read for record in records)
    duplicates = remove_duplicates(job, units, records, lines_before(units, records), work.workers)
    rejects = count_rejects(records) | duplicates.counts
    _check_not_empty(records, prefixes, documents_read, rejects)
    rejects_file = Path(f"{corpus.output_prefix}.rejects.jsonl")
    write_json_lines(rejects_file, absolute_rejects(job.staging, units, records))
    write_json_lines(Path(f"{corpus.output_prefix}.duplicates.jsonl"), duplicates.clusters())
    assembly = Assembly(
        staging=job.staging,
        records=records,
        tokenizer=job.tokenizer.record(),
        dtype=job.tokenizer.dtype,
        append_eod=corpus.append_eod,
        files_per_source=_files_per_source(units),
        rejects=rejects,
        config=corpus.model_dump(mode="json")
        | {"plan": fingerprint, "documents_read": documents_read}
        | _removed_passages(job, records),
        keep=duplicates.keep,
    )
    for split, prefix in prefixes.items():
        rows = absolute_metadata(job.staging, units, records, split, duplicates.keep)
        write_json_lines(Path(f"{prefix}.documents.jsonl"), rows)
    datasets = {prefix: write_dataset(assembly, split, prefix) for split, prefix in prefixes.items()}
    write_report(Report(corpus.output_prefix, datasets, records, documents_read, rejects, corpus.train_tokens))
    return Outcome(datasets, documents_read, rejects, str(rejects_file) if rejects_file.exists() else None)


def _removed_passages(job: Job, records: Sequence[UnitRecord]) -> dict[str, int]:
    """The account of the passages removed, where that was asked for."""
    if not job.passages:
        return {}
    return {
        "passages_removed": sum(record.passages_removed for record in records),
        "passage_chars_removed": sum(record.passage_chars_removed for record in records),
    }


def _check_not_empty(
    records: list[UnitRecord], prefixes: dict[str, str], documents_read: int, rejects: dict[str, int]
) -> None:
    for split in prefixes:
        if not sum(record.parts[split].tokens for record in records):
            what = "the corpus" if split == WHOLE else f"split {split!r}"
            raise DataError(
                f"{what} has no token: {documents_read:,} documents read, rejects {rejects or 'none'}",
                hint="check the input and the filters" if split == WHOLE else "give it a larger fraction",
            )


def _files_per_source(units: Sequence[Unit]) -> dict[str, int]:
    files: dict[str, set[str]] = {}
    for unit in units:
        files.setdefault(unit.source, set()).update(unit.paths)
    return {name: len(paths) for name, paths in files.items()}
