"""The errors a user can meet, each one sentence with what, where and why, and a hint.

CptError                exit 1
|- UserError            exit 2: the user can fix it
|  |- ConfigError       the run's YAML or an override
|  |- DataError         a corpus, a tokenizer, a .bin/.idx dataset or its manifest
|  |- CheckpointError   a checkpoint or a run folder
|  |- ConversionError   a checkpoint conversion
|  `- LaunchError       processes, nodes, the environment of the job
"""

from __future__ import annotations


class CptError(Exception):
    """Base of all expected failures. `hint` is one line telling what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class UserError(CptError):
    exit_code = 2


class ConfigError(UserError):
    pass


class DataError(UserError):
    pass


class CheckpointError(UserError):
    pass


class ConversionError(UserError):
    pass


class LaunchError(UserError):
    pass
