"""What a batch script asks on the first node: may this start begin, which nodes are bad, what follows from its end.

    python3 -m megatron_cpt.slurm.attempt begin CONFIG [key=value ...]
    python3 -m megatron_cpt.slurm.attempt preflight CONFIG [key=value ...]
    python3 -m megatron_cpt.slurm.attempt end CONFIG [key=value ...]
    python3 -m megatron_cpt.slurm.attempt refuse CONFIG
The answer is a few shell assignments on stdout, for `eval`; what is meant for people goes to stderr. Slurm's facts
come from the environment of the job: SLURM_JOB_ID, SLURM_RESTART_COUNT and so on.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.config.load import load_config
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.config.trainable import trainable_of
from megatron_cpt.durable import write_atomically
from megatron_cpt.errors import CptError, LaunchError
from megatron_cpt.launch.origin import run_architecture
from megatron_cpt.runs.checkpoints import complete_checkpoints
from megatron_cpt.runs.exit_codes import DO_NOT_RESTART, FAILED, FINISHED, USER_ERROR
from megatron_cpt.runs.folder import RunFolder, count_attempts
from megatron_cpt.runs.metrics import read_rows
from megatron_cpt.runs.rank_errors import read_rank_errors
from megatron_cpt.slurm.decide import (
    MOST_STARTS_WITHOUT_PROGRESS,
    decide,
    ending_of,
    starts_without_progress,
    successors_of,
)
from megatron_cpt.slurm.journal import Event, read_journal, record, restarts
from megatron_cpt.slurm.preflight import exclude, judge
from megatron_cpt.slurm.time_limit import check_time_limit, parse_time_limit, save_seconds

logger = logging.getLogger("megatron_cpt.slurm")


@dataclass(frozen=True)
class SlurmJob:
    """The facts of the job that this process is a part of."""

    job: str
    name: str
    restart: int  # how often it was started again
    nodes: tuple[str, ...]
    most_restarts: int
    seconds_left: int | None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> SlurmJob:
        """Raises LaunchError outside of a batch job."""
        missing = [name for name in ("SLURM_JOB_ID", "SLURM_JOB_NAME", "JOB_NODES") if name not in environ]
        if missing:
            raise LaunchError(f"{', '.join(missing)} not set: this runs within a batch job", hint="megatron-cpt submit")
        left = environ.get("JOB_TIME_LEFT", "")
        return cls(
            environ["SLURM_JOB_ID"],
            environ["SLURM_JOB_NAME"],
            int(environ.get("SLURM_RESTART_COUNT", "0")),
            tuple(environ["JOB_NODES"].split()),
            int(environ.get("MAX_RESTARTS", "0")),
            parse_time_limit(left) if left[:1].isdigit() else None,
        )


@dataclass(frozen=True)
class Start:
    """One start of a run by a job."""

    config: RunConfig
    slurm: SlurmJob

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.folder))

    @property
    def logs(self) -> Path:
        """Logs of this start, one file per rank."""
        return self.folder.logs / f"job-{self.slurm.job}-{self.slurm.restart}"

    @property
    def finished_flag(self) -> Path:
        return self.folder.root / "FINISHED"

    def consumed_tokens(self) -> int:
        """Of the newest complete checkpoint."""
        saved = complete_checkpoints(self.folder.checkpoints)
        return saved[0][1].consumed_tokens if saved else 0


def begin(start: Start) -> dict[str, str]:
    """Check whether the ranks may start, and note that they do.

    Raises:
        CptError: they must not; the exit code says whether a successor may try.
    """
    folder, slurm, config = start.folder, start.slurm, start.config
    _check_nodes(start)
    try:
        start.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"cannot write the run folder {folder.root}: {error.strerror}",
            hint="set run_dir to a folder that this user may write on every node",
        ) from error
    if _is_finished(start):
        logger.info("%s is finished; raise budget.train_tokens to go on", folder.root)
        return {"action": "leave", "exit_code": str(FINISHED), "successors": _successors(slurm)}
    refused = _why_not(start)
    if refused is not None:
        logger.error("%s", refused)
        record(folder, "ended", job=slurm.job, restart=slurm.restart, cause=refused, action="leave", exit_code=76)
        return {"action": "leave", "exit_code": str(DO_NOT_RESTART), "successors": _successors(slurm)}
    _check_time(start)
    fields = {"nodes": list(slurm.nodes), "attempts": count_attempts(folder), "before": _before(read_journal(folder))}
    record(folder, "began", job=slurm.job, restart=slurm.restart, consumed_tokens=start.consumed_tokens(), **fields)
    logger.info("start %d of job %s on %s", slurm.restart, slurm.job, ", ".join(slurm.nodes))
    return {"action": "train", "logs": str(start.logs), "ranks_per_node": str(config.parallel.gpus_per_node)}


def _check_nodes(start: Start) -> None:
    wanted, given = start.config.parallel.nodes, len(start.slurm.nodes)
    if wanted != given:
        raise LaunchError(
            f"the job has {given} node{'s' if given > 1 else ''}, parallel.nodes = {wanted}",
            hint=f"submit it with --nodes={wanted}, or set parallel.nodes={given}",
        )


def _is_finished(start: Start) -> bool:
    """Whether the flag is there and covers the budget; a flag of a smaller budget is removed."""
    try:
        trained = int(json.loads(start.finished_flag.read_text(encoding="utf-8"))["consumed_tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if trained >= start.config.budget.train_tokens:
        return True
    start.finished_flag.unlink(missing_ok=True)
    return False


def _why_not(start: Start) -> str | None:
    slurm, folder = start.slurm, start.folder
    if folder.kill_switch.exists():
        return f"{folder.kill_switch} is there: remove it to let this run start"
    if slurm.restart > slurm.most_restarts:
        return f"started again {slurm.restart} times, MAX_RESTARTS = {slurm.most_restarts}"
    count = starts_without_progress(read_journal(folder), slurm.job, start.consumed_tokens())
    if count >= MOST_STARTS_WITHOUT_PROGRESS:
        return f"{count} starts of job {slurm.job} in a row completed no checkpoint"
    return None


def _check_time(start: Start) -> None:
    """Raise LaunchError when what is left of the time limit is shorter than one save."""
    config, rows = start.config, read_rows(start.folder.metrics)[0]
    arch = run_architecture(config)
    one = save_seconds(trainable_of(config, arch).checkpoint_bytes(), config.parallel.nodes, rows)
    check_time_limit(start.slurm.seconds_left, int(one), "what is left of the time limit")


def _before(events: Sequence[Event], environ: Mapping[str, str] = os.environ) -> str | None:
    """Why the start before this one was cut off, where its nodes tell; None when it ended by itself."""
    starts = restarts(list(events))
    if not starts or starts[-1]["cause"] is not None:
        return None
    down = set(environ.get("NODES_DOWN", "").split()) & set(starts[-1]["nodes"] or [])
    if down:
        return f"node {', '.join(sorted(down))} is down"
    return "cut off: its node failed for a while, or it was cancelled or preempted"


def preflight(start: Start) -> dict[str, str]:
    """Judge what was found on each node. Leave bad nodes out and start the job again, once."""
    slurm, folder = start.slurm, start.folder
    verdict = judge(start.logs / "preflight", slurm.nodes)
    if verdict.common is not None:
        logger.error("the preflight failed on every node: %s", verdict.common)
        return _ended(start, f"preflight: {verdict.common}", "leave", USER_ERROR) | {"successors": _successors(slurm)}
    if not verdict.bad:
        return {"action": "train"}
    exclude(folder, verdict.bad)
    for node, reason in verdict.bad.items():
        logger.error("%s must not train: %s", node, reason)
    cause = "preflight: " + "; ".join(f"{node}: {reason}" for node, reason in verdict.bad.items())
    before = [event for event in read_journal(folder) if event["event"] == "ended" and event["job"] == slurm.job]
    if any(event["cause"].startswith("preflight: ") for event in before):
        logger.error("this is the second preflight of job %s that fails: a person must look", slurm.job)
        return _ended(start, cause, "leave", DO_NOT_RESTART) | {"successors": _successors(slurm)}
    return _ended(start, cause, "requeue", FAILED) | {"exclude": ",".join(verdict.bad)}


def end(start: Start, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Say what follows from the end of the ranks, and note it."""
    slurm, folder = start.slurm, start.folder
    events = read_journal(folder)
    own = [e for e in events if (e["event"], e.get("job"), e.get("restart")) == ("began", slurm.job, slurm.restart)]
    began = own[-1] if own else {}
    attempt = count_attempts(folder)
    ranks_began = attempt > began.get("attempts", attempt)
    rows = [row for row in read_rows(folder.metrics)[0] if ranks_began and row.get("start") == attempt]
    ending = ending_of(int(environ.get("CODE", "1")), environ.get("ASKED", ""), rows, read_rank_errors(start.logs))
    tokens = start.consumed_tokens()
    if ending.kind == "finished" and tokens >= start.config.budget.train_tokens:
        _set_finished(start, tokens)
    successors = _successors(slurm, environ)
    decision = decide(
        ending,
        restarts=slurm.restart,
        most_restarts=slurm.most_restarts,
        starts_without_progress=starts_without_progress(events, slurm.job, tokens),
        successors=successors.split(),
    )
    log = logger.info if ending.kind in ("finished", "stopped") or decision.action != "leave" else logger.error
    log(
        "%s: %s",
        {"leave": "the end", "requeue": "to be started again"}.get(decision.action, "handed over"),
        decision.cause,
    )
    return _ended(start, decision.cause, decision.action, decision.exit_code) | {"successors": successors}


def _set_finished(start: Start, tokens: int) -> None:
    text = json.dumps({"consumed_tokens": tokens, "job": start.slurm.job, "time": round(time.time(), 3)})
    write_atomically(start.finished_flag, (text + "\n").encode())


def _ended(start: Start, cause: str, action: str, code: int) -> dict[str, str]:
    slurm = start.slurm
    record(start.folder, "ended", job=slurm.job, restart=slurm.restart, cause=cause, action=action, exit_code=code)
    return {"action": action, "exit_code": str(code)}


def refuse(slurm: SlurmJob, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Say what follows when a step before the ranks failed with CODE: nothing starts, the queued successors neither."""
    return {"action": "leave", "exit_code": environ.get("CODE", "1"), "successors": _successors(slurm, environ)}


def _successors(slurm: SlurmJob, environ: Mapping[str, str] = os.environ) -> str:
    return " ".join(successors_of(slurm.job, slurm.name, environ.get("JOB_QUEUE", "")))


QUESTIONS = {"begin": begin, "preflight": preflight, "end": end}


def main(arguments: Sequence[str]) -> int:
    """Answer one question. Return 0, or the exit code of the error that is on stderr."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    question, config_path, *overrides = arguments
    try:
        slurm = SlurmJob.from_environment()
        if question == "refuse":
            answer = refuse(slurm)
        else:
            answer = QUESTIONS[question](Start(load_config(config_path, overrides), slurm))
    except CptError as error:
        logger.error("%s", error)
        return error.exit_code
    sys.stdout.write("".join(f"{name}={shlex.quote(value)}\n" for name, value in answer.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
