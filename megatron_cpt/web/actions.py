"""What a page may do: prepare and start jobs, and stop, save, continue and kill runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_cpt.config.yaml_file import parse_yaml
from megatron_cpt.errors import UserError
from megatron_cpt.presets import find_preset, layout
from megatron_cpt.presets.starter import Starter, config_text
from megatron_cpt.runs.folder import RunFolder
from megatron_cpt.runs.state import is_running
from megatron_cpt.web.forms import run_form
from megatron_cpt.web.jobs import Job, Jobs
from megatron_cpt.web.prepare import (
    Allowed,
    Prepared,
    prepare_corpus,
    prepare_export,
    prepare_perplexity,
    prepare_run,
)
from megatron_cpt.web.run_list import RunList
from megatron_cpt.web.values import entered_of

Body = Mapping[str, Any]


class Refused(UserError):
    """Something that a page asked for cannot be done."""


class Actions:
    """Everything that changes something. Paths come from ids that were looked up, or are below allowed folders."""

    def __init__(self, root: Path, known_runs: RunList, jobs: Jobs, allowed: Allowed) -> None:
        self.root = root
        self.known_runs = known_runs
        self.jobs = jobs
        self.allowed = allowed

    def preset(self, body: Body) -> dict[str, Any]:
        """A known model's config, as it would be entered."""
        preset, gpus = find_preset(_text(body, "name")), body.get("gpus", 1)
        if not isinstance(gpus, int) or not 1 <= gpus <= 100_000:
            raise Refused("the number of GPUs is not one", hint="1, 8, 16, 32, ...")
        arch = preset.architecture
        starter = Starter(preset.name, arch, gpus, f"/models/{preset.name}", None, None, layout(arch, gpus))
        return {"values": entered_of(run_form(), parse_yaml(config_text(starter)))}

    def preview(self, body: Body) -> dict[str, Any]:
        """What would be started, and what speaks against it."""
        return self._prepare(body).to_json()

    def start(self, body: Body) -> dict[str, Any]:
        """Start it. Return the job, or the problems that keep it from starting."""
        prepared = self._prepare(body)
        if prepared.problems:
            return prepared.to_json() | {"job": None}
        if prepared.kind == "train" and prepared.target is not None and is_running(RunFolder(prepared.target)):
            raise Refused(f"{prepared.target.name} is running already", hint="watch it, or choose another job_name")
        job = self.jobs.start(prepared.kind, prepared.title, prepared.arguments, prepared.target, dict(prepared.files))
        return prepared.to_json() | {"job": job.to_json()}

    def on_run(self, path: Path, action: str, body: Body) -> dict[str, Any]:
        """Stop, save, kill, continue or verify a run."""
        known: dict[str, Callable[[Path, Body], dict[str, Any]]] = {
            "stop": self._stop,
            "save": self._save,
            "kill": self._kill,
            "continue": self._continue,
            "verify": self._verify,
        }
        if action not in known:
            raise Refused(f"a run cannot {action}")
        return known[action](path, body)

    def job(self, job_id: str, offset: int) -> dict[str, Any]:
        """A job and what it printed behind `offset`."""
        job = self._job(job_id)
        text, after = self.jobs.log(job, offset)
        run = self.known_runs.id_of(Path(job.target)) if job.kind == "train" and job.target is not None else None
        known = run is not None and self.known_runs.path(run) is not None
        return job.to_json() | {"text": text, "offset": after, "run": run if known else None}

    def stop_job(self, job_id: str, body: Body) -> dict[str, Any]:
        """End a job, as Ctrl-C does or, with `hard`, at once."""
        return {"stopped": self.jobs.stop(self._job(job_id), hard=body.get("hard") is True)}

    def _prepare(self, body: Body) -> Prepared:
        kind, entered = _text(body, "kind"), body.get("values")
        if not isinstance(entered, Mapping):
            raise Refused("there are no values")
        if kind in ("train", "submit"):
            wanted = body.get("layouts") is True
            return prepare_run(entered, self.root, self.allowed, submit=kind == "submit", layouts=wanted)
        if kind == "preprocess":
            return prepare_corpus(entered, self.allowed)
        texts = {name: str(value) for name, value in entered.items()}
        run = self.known_runs.path(texts.get("run", ""))
        if run is None:
            raise Refused("there is no such run (any more)")
        if kind == "convert":
            checkpoint, to, output = texts.get("checkpoint", ""), texts.get("to", ""), texts.get("output", "")
            return prepare_export(run, checkpoint, to, output, self.allowed)
        if kind == "eval":
            return prepare_perplexity(run, texts.get("data", ""), self.allowed)
        raise Refused(f"{kind!r} is not a kind of job")

    def _stop(self, path: Path, body: Body) -> dict[str, Any]:
        return _switch(path, "STOP", "saves at the end of the step and stops")

    def _save(self, path: Path, body: Body) -> dict[str, Any]:
        return _switch(path, "SAVE", "saves at the end of the step and goes on")

    def _kill(self, path: Path, body: Body) -> dict[str, Any]:
        if body.get("sure") is not True:
            raise Refused("killing a run loses what it has not saved", hint="confirm it")
        return _switch(path, "KILL", "ends at the end of the step without saving")

    def _continue(self, path: Path, body: Body) -> dict[str, Any]:
        folder = RunFolder(path)
        if is_running(folder):
            raise Refused(f"{path.name} is running already")
        with contextlib.suppress(FileNotFoundError):  # the person asks for it: that takes the switch back
            folder.kill_switch.unlink()
        arguments = ("train", str(folder.resolved), f"run_dir={path}")
        return {"job": self.jobs.start("train", path.name, arguments, path.resolve()).to_json()}

    def _verify(self, path: Path, body: Body) -> dict[str, Any]:
        job: Job = self.jobs.start("verify", f"checkpoints of {path.name}", ("checkpoints", str(path), "--verify"))
        return {"job": job.to_json()}

    def _job(self, job_id: str) -> Job:
        job = self.jobs.get(job_id)
        if job is None:
            raise Refused("there is no such job")
        return job


def _switch(path: Path, name: str, effect: str) -> dict[str, Any]:
    """Lay a switch file into a run's folder, if there is somebody to read it."""
    if not is_running(RunFolder(path)):
        raise Refused(f"{path.name} is not running")
    (path / name).touch()
    return {"effect": f"{path.name} {effect}"}


def _text(body: Body, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise Refused(f"{name} is not a text")
    return value
