"""What a job does when its ranks have ended: start again, or leave it to a person. Facts in, decision out.

srun's exit code alone does not tell: it is the highest of all ranks, and ranks that were ended because a peer failed
hide the peer's own. So the run's last word in metrics.jsonl comes first, then the errors that the ranks left.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_cpt.runs.exit_codes import DO_NOT_RESTART, FAILED, FINISHED, HUNG, MEANING, STOPPED, USER_ERROR
from megatron_cpt.runs.metrics import Row
from megatron_cpt.runs.rank_errors import RankError
from megatron_cpt.slurm.journal import Event

MOST_STARTS_WITHOUT_PROGRESS = 3

Kind = Literal["finished", "stopped", "give_up", "restart"]


@dataclass(frozen=True)
class Ending:
    """How a start ended. `restart`: starting again continues the run."""

    kind: Kind
    cause: str
    exit_code: int


@dataclass(frozen=True)
class Decision:
    """`requeue`: this job again; `hand_over`: a queued successor continues; `leave`: nobody does."""

    action: Literal["requeue", "hand_over", "leave"]
    cause: str
    exit_code: int


def ending_of(code: int, asked: str, rows: Sequence[Row], errors: Sequence[RankError]) -> Ending:
    """Say how the ranks ended.

    Args:
        code: srun's exit code.
        asked: the signal that Slurm sent to this job, empty without one.
        rows: of metrics.jsonl, those of this start.
        errors: what the ranks of this start left.
    """
    last = next((row for row in reversed(rows) if row.get("event") in _LAST_WORDS), None)
    if last is not None:
        return _by_last_word(last)
    grave = next((error for error in errors if error.exit_code in (USER_ERROR, DO_NOT_RESTART)), None)
    if grave is not None:
        return Ending("give_up", grave.message, grave.exit_code)
    if not errors and code in (USER_ERROR, DO_NOT_RESTART):
        return Ending("give_up", MEANING[code][0], code)
    if code == FINISHED:
        return Ending("finished", MEANING[FINISHED][0], FINISHED)
    if asked:
        return Ending("restart", f"SIG{asked} before the first step", STOPPED)
    hung = next((error for error in errors if error.exit_code == HUNG), None)
    if (first := hung or next(iter(errors), None)) is not None:
        return Ending("restart", first.message, first.exit_code)
    return Ending("restart", _describe_code(code), code)


_LAST_WORDS = ("finished", "stopped", "killed", "diverged")


def _by_last_word(last: Row) -> Ending:
    event, reason = last["event"], last.get("reason", "")
    if event == "finished":
        return Ending("finished", MEANING[FINISHED][0], FINISHED)
    if event in ("killed", "diverged"):
        return Ending("give_up", reason or event, DO_NOT_RESTART)
    if last.get("by_person"):
        return Ending("stopped", f"stopped by {reason}", STOPPED)
    return Ending("restart", f"saved and stopped after {reason or 'a request'}", STOPPED)


def _describe_code(code: int) -> str:
    if code in MEANING:
        return f"exit code {code}: {MEANING[code][0]}"
    if code > 128:
        try:
            return f"a rank was ended by {signal.Signals(code - 128).name}"
        except ValueError:
            pass
    return f"srun ended with exit code {code}"


def decide(
    ending: Ending, *, restarts: int, most_restarts: int, starts_without_progress: int, successors: Sequence[str]
) -> Decision:
    """Say what the job does after `ending`.

    Args:
        restarts: how often this job was started again before.
        most_restarts: how often it may be.
        starts_without_progress: starts of this job in a row, with this one, that completed no checkpoint.
        successors: queued jobs that begin when this one ends.
    """
    if ending.kind != "restart":
        return Decision("leave", ending.cause, ending.exit_code)
    if starts_without_progress >= MOST_STARTS_WITHOUT_PROGRESS:
        cause = f"{starts_without_progress} starts in a row completed no checkpoint; the last: {ending.cause}"
        return Decision("leave", cause, DO_NOT_RESTART)
    if successors:
        return Decision("hand_over", ending.cause, FAILED if ending.exit_code != STOPPED else STOPPED)
    if restarts >= most_restarts:
        return Decision("leave", f"started again {restarts} times, the limit; the last: {ending.cause}", DO_NOT_RESTART)
    return Decision("requeue", ending.cause, ending.exit_code)


def starts_without_progress(events: Sequence[Event], job: str, consumed_tokens: int) -> int:
    """Starts of `job` in a row that began at `consumed_tokens`, the tokens of the newest complete checkpoint now."""
    count = 0
    for event in reversed([e for e in events if e["event"] == "began" and e.get("job") == job]):
        if event.get("consumed_tokens") != consumed_tokens:
            break
        count += 1
    return count


def successors_of(job: str, name: str, queue: str) -> list[str]:
    """Ids of the queued jobs of the same name that begin when `job` or one of them ends.

    `queue` has a line `id|name|dependencies` per pending job of this user, as `squeue -o '%i|%j|%E'` prints it.
    """
    waiting = [line.split("|", 2) for line in queue.splitlines() if line.count("|") >= 2]
    chain = {job}
    while True:
        more = {
            own
            for own, other_name, dependencies in waiting
            if other_name == name and own not in chain and (_names(dependencies, chain) or "singleton" in dependencies)
        }
        if not more:
            return sorted(chain - {job}, key=lambda text: (len(text), text))
        chain |= more


def _names(dependencies: str, jobs: set[str]) -> bool:
    """Whether `afterany:12(unfulfilled),afterok:13_*(...)` names one of `jobs`."""
    words = dependencies.replace(",", " ").replace("?", " ").replace(":", " ").split()
    return any(word.split("(")[0].split("_")[0].split("+")[0] in jobs for word in words)
