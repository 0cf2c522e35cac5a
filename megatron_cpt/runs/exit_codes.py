"""Exit codes of `megatron-cpt train`: what a scheduler or a script may do next."""

from __future__ import annotations

FINISHED = 0
FAILED = 1  # unexpected; starting again may help
USER_ERROR = 2  # nothing was started; fix what the message says
STOPPED = 75  # asked to stop by a signal, a file or the wall-time limit; saved; starting again continues
DO_NOT_RESTART = 76  # diverged, the kill switch is set, or failed twice before a step: a person must look
HUNG = 77  # the watchdog ended a rank that made no progress; starting again continues

# code -> (meaning, whether the same command may simply be started again)
MEANING: dict[int, tuple[str, bool]] = {
    FINISHED: ("the budget is trained and saved", False),
    FAILED: ("an unexpected error", True),
    USER_ERROR: ("a mistake in the config, the data or the environment", False),
    STOPPED: ("stopped on request after saving", True),
    DO_NOT_RESTART: ("diverged, the kill switch is set, or two attempts in a row failed before a step", False),
    HUNG: ("no progress: ended by the watchdog", True),
}
