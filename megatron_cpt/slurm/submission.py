"""From a config, a corpus or a command to jobs in the queue: everything is checked before anything is written."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import megatron_cpt
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.trainable import trainable_of
from megatron_cpt.corpus.readers.input_files import find_files
from megatron_cpt.corpus.readers.registry import resolve_datasets
from megatron_cpt.corpus.schema import Corpus
from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import CheckpointError, CptError, LaunchError
from megatron_cpt.launch.survey import raise_findings, survey
from megatron_cpt.runs.folder import RunFolder, create_run_folder, resolved_yaml
from megatron_cpt.runs.metrics import read_rows
from megatron_cpt.slurm.client import cancel, check_client, check_script, submit_script
from megatron_cpt.slurm.journal import record
from megatron_cpt.slurm.preflight import excluded_nodes
from megatron_cpt.slurm.queue import script_path, waiting_jobs
from megatron_cpt.slurm.script import (
    MOST_RESTARTS,
    ArrayJob,
    CommandJob,
    Place,
    TrainJob,
    array_script,
    command_script,
    literal,
    train_script,
)
from megatron_cpt.slurm.site import Site
from megatron_cpt.slurm.time_limit import check_time_limit, notice_seconds, parse_time_limit, save_seconds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submission:
    """Batch scripts with the options of their sbatch, in order; `after` may name the job before as {previous}."""

    folder: Path  # of the scripts and logs
    scripts: tuple[tuple[Path, str, tuple[str, ...]], ...]  # path, text, options
    check: Callable[[Site], None] = lambda site: None  # raises where Slurm already has such a job
    prepare: Callable[[], None] = lambda: None  # writes what the scripts need beside them
    note: Callable[[str, Path], None] = lambda job, script: None  # called with each job that was submitted

    @property
    def text(self) -> str:
        """The scripts as `--dry-run` prints them."""
        return "\n".join(dict.fromkeys(text for _, text, _ in self.scripts))


def submit(submission: Submission, site: Site) -> list[str]:
    """Check the scripts with Slurm, write them, and call sbatch. Return the ids of the jobs.

    Raises:
        LaunchError: Slurm does not accept a job; then none of this submission stays in the queue.
        CheckpointError: the folder cannot be written.
    """
    check_client(site)
    submission.check(site)
    for text in dict.fromkeys(text for _, text, _ in submission.scripts):
        check_script(text, site)
    try:
        submission.folder.mkdir(parents=True, exist_ok=True)
        (submission.folder / "logs").mkdir(exist_ok=True)
        submission.prepare()
        for path, text, _ in submission.scripts:
            write_atomically(path, text.encode())
    except OSError as error:
        raise CheckpointError(
            f"cannot write {submission.folder}: {error.strerror}", hint="choose a folder that you may write"
        ) from error
    jobs: list[str] = []
    try:
        for path, _, options in submission.scripts:
            previous = jobs[-1] if jobs else ""
            jobs.append(submit_script(path, site, [option.format(previous=previous) for option in options]))
            submission.note(jobs[-1], path)
    except CptError:
        _take_back(jobs, site)
        raise
    return jobs


def _take_back(jobs: Sequence[str], site: Site) -> None:
    """Cancel the jobs of a submission that failed; say which stay in the queue if that fails too."""
    try:
        cancel(jobs, site)
    except LaunchError as error:
        logger.error("jobs %s stay in the queue (%s): scancel %s", ", ".join(jobs), error.message, " ".join(jobs))


def training(
    config: RunConfig, named: str, site: Site, *, chain: int = 1, max_restarts: int = MOST_RESTARTS
) -> Submission:
    """Check the run of `config` as its start and `plan --strict` do, and make its submission; nothing is written.

    Args:
        config: the run.
        named: says in errors where it is from.
        site: the cluster.
        chain: jobs to queue one after another, for a budget that is longer than a time limit.
        max_restarts: how often a job starts itself again.

    Raises:
        UserError: all that would stop the run, at once; a time limit shorter than one save.
    """
    found = survey(config, named)
    raise_findings(found.blocking(strict=True, packages_are_here=site.container_image is None), named)
    folder = RunFolder(Path(config.folder))
    one_save = save_seconds(
        trainable_of(config, found.arch).checkpoint_bytes(), config.parallel.nodes, read_rows(folder.metrics)[0]
    )
    limit, notice = _limit(site), notice_seconds(one_save)
    check_time_limit(limit, notice, "the time limit")
    root = folder.root.absolute()
    job = TrainJob(
        config.job_name,
        str(root / "submitted.yaml"),
        config.parallel.nodes,
        config.parallel.gpus_per_node,
        limit,
        notice,
        max_restarts,
    )
    script = script_path(folder).absolute()
    place = Place(
        str(script), literal(str(root / "logs" / "slurm-")) + "%j.log", str(Path.cwd()), tuple(excluded_nodes(folder))
    )
    text = train_script(job, site, place)
    successors = [(script, text, ("--dependency=afterany:{previous}",))] * (chain - 1)

    def prepare() -> None:
        if not folder.resolved.exists():
            create_run_folder(folder, config, None)
        write_atomically(folder.root / "submitted.yaml", resolved_yaml(config).encode())
        _write_code_snapshot(folder.root)

    def note(job_id: str, path: Path) -> None:
        record(folder, "submitted", job=job_id, script=path.name)

    return Submission(
        root, ((script, text, ()), *successors), lambda site: _refuse_a_second_job(folder, site), prepare, note
    )


def _refuse_a_second_job(folder: RunFolder, site: Site) -> None:
    waiting = waiting_jobs(folder, site)
    if waiting:
        raise LaunchError(
            f"{folder.root} has a job in the queue: {', '.join(waiting)}",
            hint=f"it continues by itself; to submit it anew: scancel {' '.join(waiting)}",
        )


def preprocessing(corpus: Corpus, path: Path, site: Site, *, tasks: int, cpus_per_task: int) -> Submission:
    """The submission of a corpus: an array, and the job that joins its parts. A passage filter needs two arrays.

    Raises:
        UserError: a source without files, or of a dataset that the registry does not have.
    """
    for source in resolve_datasets(corpus).sources:
        find_files(source)
    root = Path(f"{corpus.output_prefix}.slurm").absolute()
    limit = _limit(site)

    def script(stage: str) -> tuple[Path, str]:
        name = root / f"{stage}.sbatch"
        output = literal(str(root / "logs")) + ("/%x-%A_%a.log" if stage == "parts" else "/%x-%j.log")
        job = ArrayJob(
            f"preprocess-{stage}" if stage == "join" else "preprocess",
            str(path.absolute()),
            tasks,
            cpus_per_task,
            limit,
            stage,
        )
        return name, array_script(job, site, Place(str(name), output, str(Path.cwd())))

    after = ("--dependency=afterany:{previous}",)
    arrays = 2 if corpus.dedup is not None and corpus.dedup.passages is not None else 1
    parts = [(*script("parts"), after if number else ()) for number in range(arrays)]
    return Submission(root, (*parts, (*script("join"), after)))


def command(
    words: Sequence[str],
    arguments: Sequence[str],
    site: Site,
    *,
    folder: Path,
    cpus_per_task: int,
    memory_gib: int,
    gpus: int,
    takes_workers: bool,
) -> Submission:
    """The submission of one `megatron-cpt` command, with its script and log in `folder`."""
    root = folder.absolute()
    script = root / "submit.sbatch"
    job = CommandJob(
        words[0],
        words,
        arguments,
        cpus_per_task,
        memory_gib,
        gpus,
        _limit(site),
        takes_workers=takes_workers,
    )
    place = Place(str(script), literal(str(root / "logs")) + "/%x-%j.log", str(Path.cwd()))
    return Submission(root, ((script, command_script(job, site, place), ()),))


def with_options(site: Site, **options: str | None) -> Site:
    """`site` with the values that the command line gives."""
    given = {name: value for name, value in options.items() if value is not None}
    return replace(site, **given)  # type: ignore[arg-type]


def _limit(site: Site) -> int | None:
    return None if site.time_limit is None else parse_time_limit(site.time_limit)


def _write_code_snapshot(root: Path) -> None:
    """RUN/code.txt: version and commit of this program; RUN/code.patch: what differs from the commit."""
    package = Path(megatron_cpt.__file__).resolve().parents[1]
    commit, changes = _git(package, "rev-parse", "HEAD"), _git(package, "diff", "HEAD")
    where = "installed without its repository" if commit is None else f"commit {commit.strip()}"
    state = "" if commit is None else (", with the changes of code.patch" if changes else ", unchanged")
    write_atomically(root / "code.txt", f"megatron-cpt {megatron_cpt.__version__}, {where}{state}\n".encode())
    patch = root / "code.patch"
    if changes:
        write_atomically(patch, changes.encode())
    else:
        patch.unlink(missing_ok=True)


def _git(folder: Path, *arguments: str) -> str | None:
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], text=True, capture_output=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
