"""Slurm's way of writing time limits, and how long before the limit a job must be told to save."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_cpt.errors import LaunchError
from megatron_cpt.runs.metrics import Row

ASSUMED_BYTES_PER_SECOND = 2**30  # that one node writes to shared storage; a measured save replaces the assumption
LEAST_NOTICE_SECONDS = 120  # Slurm looks at time limits twice a minute, and a step must end first
START_SECONDS = 60  # a job that gets less than this before its notice trains nothing
_FORM = re.compile(r"(?:(?P<days>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")


def parse_time_limit(text: str) -> int | None:
    """Seconds of `30`, `30:00`, `12:00:00`, `7-0`, `7-00:00:00`; None for UNLIMITED and what squeue prints as such.

    Raises:
        LaunchError: it is none of Slurm's forms.
    """
    if text.strip().upper() in ("UNLIMITED", "INFINITE", "NOT_SET", "-1"):
        return None
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise LaunchError(
            f"{text!r} is not a time limit", hint="write it as Slurm does: 12:00:00, or 7-00:00:00 for seven days"
        )
    a, b, c = (int(found[name] or 0) for name in "abc")
    if found["days"] is not None:
        return ((int(found["days"]) * 24 + a) * 60 + b) * 60 + c
    if found["c"] is not None:
        return (a * 60 + b) * 60 + c
    return a * 60 + b  # minutes, or minutes:seconds


def format_time_limit(seconds: int) -> str:
    """`7-00:00:00`."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02}:{minutes:02}:{seconds:02}"


def save_seconds(checkpoint_bytes: int, nodes: int, rows: Sequence[Row] = ()) -> float:
    """How long one save takes: the longest of `rows` (metrics of the run so far), else an estimate from its size."""
    began: dict[int, tuple[float, float]] = {}
    longest = 0.0
    for row in rows:
        if row.get("event") == "save" and "blocked_seconds" in row:
            began[row["iteration"]] = (row["time"], row["blocked_seconds"])
        elif row.get("event") == "saved" and row.get("checkpoint_iteration") in began:
            called, blocked = began.pop(row["checkpoint_iteration"])
            longest = max(longest, row["time"] - called + blocked)
    return longest or checkpoint_bytes / (ASSUMED_BYTES_PER_SECOND * nodes)


def notice_seconds(one_save_seconds: float) -> int:
    """How long before the time limit the job is told to save, in whole minutes."""
    wanted = max(LEAST_NOTICE_SECONDS, 60 + 2 * one_save_seconds)
    return -(-int(wanted) // 60) * 60


def check_time_limit(limit_seconds: int | None, notice: int, what: str) -> None:
    """Raise LaunchError when a job of `limit_seconds` would be told to save before it has trained; `what` names it."""
    if limit_seconds is None or limit_seconds >= notice + START_SECONDS:
        return
    least = format_time_limit(-(-(notice + START_SECONDS) // 60) * 60)
    raise LaunchError(
        f"{what} is {format_time_limit(limit_seconds)}, shorter than a start and one save: the job is told to save "
        f"{notice} s before its end",
        hint=f"ask for --time={least} or more",
    )
