"""Everything that a start of training checks, looked at together, on a machine that need not be the one that trains.

`prepare` stops at the first fault; a plan wants all of them at once. The checks are the same functions. What is only
absent here (a dataset, the weights, a package, disk space) may be there on the cluster, so it is kept apart from what
is wrong anywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.derive import Derived, derive
from megatron_cpt.config.mix import shares_at
from megatron_cpt.config.phases import phase_at
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.data.datasets import (
    Dataset,
    Datasets,
    SourcePlan,
    check_dataset,
    check_together,
    model_fingerprint,
    needed_tokens,
    plan_sources,
)
from megatron_cpt.data.ledger import Ledger
from megatron_cpt.data.phase_budgets import with_token_budgets
from megatron_cpt.errors import ConfigError, CptError, UserError
from megatron_cpt.launch.base_model import refuse_instruct_model
from megatron_cpt.launch.engine import check_engine
from megatron_cpt.launch.environment import refuse_broken_environment
from megatron_cpt.launch.fisher import check_fisher
from megatron_cpt.launch.kl_targets import check_targets
from megatron_cpt.launch.origin import model_dir, resolve_origin, run_architecture
from megatron_cpt.launch.preflight import (
    CheckedRun,
    check_free_space,
    check_reference,
    check_weights,
    refuse_missing_log_packages,
    standing_ledger,
)
from megatron_cpt.launch.start import check_beginning, check_continues, refuse_kill_switch
from megatron_cpt.runs.checkpoints import complete_checkpoints
from megatron_cpt.runs.lease import refuse_if_held


@dataclass(frozen=True)
class Finding:
    """One thing that would stop the run."""

    message: str
    hint: str | None
    only_here: bool  # it is absent on this machine, which says nothing of the one that trains
    exit_code: int = UserError.exit_code  # with which a start ends for it
    of_packages: bool = False  # of this Python's, which do not matter to a run in a container


@dataclass(frozen=True)
class SourceNeed:
    """What the rest of the budget takes from one source. Epochs count from the beginning of the source."""

    name: str
    needed_tokens: int
    available_tokens: int | None  # of one epoch; None while the dataset is not here or not sound
    epochs_at_end: float | None
    first_share: float  # of the tokens, where the run stands
    last_share: float  # at its end


@dataclass(frozen=True)
class Survey:
    """A config that can be planned, and what stands between it and a start."""

    config: RunConfig
    arch: Architecture
    derived: Derived
    ledger: Ledger  # where the run stands; empty for a new one
    sources: tuple[SourceNeed, ...]
    validation_tokens: dict[str, int | None]  # read at each validation of a set; None while it is not here
    findings: tuple[Finding, ...]

    def blocking(self, *, strict: bool, packages_are_here: bool = True) -> list[Finding]:
        """Return what stops a start: what is wrong anywhere, and with `strict` what is missing on this machine.

        `packages_are_here`: False where the run has packages of its own, in a container.
        """
        found = [finding for finding in self.findings if strict or not finding.only_here]
        return [finding for finding in found if packages_are_here or not finding.of_packages]


@dataclass
class _Findings:
    found: list[Finding] = field(default_factory=list)

    @contextlib.contextmanager
    def of(self, *, only_here: bool = False, of_packages: bool = False) -> Iterator[None]:
        """Keep what the code inside refuses."""
        try:
            yield
        except CptError as error:
            self.found.append(Finding(error.message, error.hint, only_here, error.exit_code, of_packages))


def survey(config: RunConfig, named: str) -> Survey:
    """Check everything that `train` checks. `named` says in errors where `config` is from.

    Raises:
        UserError: there is no model that the config names, or a rule of the config itself is broken; all that is wrong
            anywhere is listed with it.
    """
    findings = _Findings()
    _look_at_machine(config, findings)
    with findings.of():
        config = with_token_budgets(config)
    folder = model_dir(config)
    arch = run_architecture(config)
    with findings.of():
        refuse_instruct_model(config, folder)
    origin = resolve_origin(config.model.init_from)
    if not complete_checkpoints(Path(config.folder) / "checkpoints"):  # a new run needs its first weights whole
        with findings.of():
            check_weights(config, origin)
    datasets = _look_at_datasets(config, arch, folder, findings)
    try:
        derived = derive(config, arch, origin=named)
    except ConfigError as error:
        wrong = [finding for finding in findings.found if not finding.only_here]
        if not wrong:
            raise
        raise _combined([Finding(error.message, error.hint, only_here=False), *wrong], named) from error
    run = CheckedRun(config, arch, derived, datasets, origin, folder)
    ledger = _look_at_run_folder(run, findings)
    sources = _sources(run, ledger, findings)
    return Survey(config, arch, derived, ledger, sources, _validation_tokens(run), tuple(findings.found))


def raise_findings(findings: list[Finding], named: str) -> None:
    """Raise one UserError that lists `findings`; return when there is none."""
    if findings:
        raise _combined(findings, named)


def _combined(findings: list[Finding], named: str) -> UserError:
    if len(findings) == 1:
        error = UserError(findings[0].message, hint=findings[0].hint)
    else:
        listed = "\n".join(
            f"  - {finding.message}" + (f"\n    hint: {finding.hint}" if finding.hint else "") for finding in findings
        )
        error = UserError(
            f"{named}: {len(findings)} things would stop this run:\n{listed}",
            hint="correct all of them, then plan again",
        )
    error.exit_code = max(finding.exit_code for finding in findings)
    return error


def _look_at_machine(config: RunConfig, findings: _Findings) -> None:
    with findings.of(only_here=True, of_packages=True):
        refuse_broken_environment()
        check_engine()
    with findings.of(only_here=True, of_packages=True):
        refuse_missing_log_packages(config)


def _look_at_datasets(config: RunConfig, arch: Architecture, folder: Path, findings: _Findings) -> Datasets:
    """The sound datasets; what is wrong with the others is among the findings."""
    sound: dict[str, list[Dataset]] = {"train": [], "validation": []}
    named = [("train", source.name, source.prefix) for source in config.data.train]
    named += [("validation", name, prefix) for name, prefix in config.data.validation.items()]
    fingerprint: str | None = None
    if not all(_is_absent(prefix) for _, _, prefix in named):
        with findings.of():
            fingerprint = model_fingerprint(folder)
    for kind, name, prefix in named:
        with findings.of(only_here=_is_absent(prefix)):
            sound[kind].append(check_dataset(name, prefix, config, arch, fingerprint))
    datasets = Datasets(tuple(sound["train"]), tuple(sound["validation"]))
    with findings.of():
        check_together(config, datasets)
    return datasets


def _is_absent(prefix: str) -> bool:
    """Whether nothing of a dataset is here, not even a part that would be a fault."""
    endings = (".bin", ".idx", ".manifest.json", ".partial")
    return not any(Path(prefix + ending).exists() for ending in endings)


def _look_at_run_folder(run: CheckedRun, findings: _Findings) -> Ledger:
    """Where the run stands, and whether its folder lets it start."""
    ledger = Ledger()
    with findings.of():
        ledger = standing_ledger(run)
    with findings.of():
        check_continues(run, accept_changes=False)
    with findings.of():
        refuse_kill_switch(run.folder)
    with findings.of(only_here=True):
        refuse_if_held(run.folder.lease)
    if run.origin.kind == "missing":
        with findings.of(only_here=True):
            check_beginning(run)
    if run.origin.kind == "missing" or complete_checkpoints(run.folder.checkpoints):  # else looked at above
        with findings.of(only_here=run.origin.kind == "missing"):
            check_reference(run)
    asked = run.config.forgetting.active_ewc
    with findings.of(only_here=asked is not None and asked.folder is not None and not asked.folder.exists()):
        check_fisher(run)
    with findings.of(only_here=True):
        check_free_space(run)
    return ledger


def _sources(run: CheckedRun, ledger: Ledger, findings: _Findings) -> tuple[SourceNeed, ...]:
    """Tokens needed of every source, and epochs of those that are here."""
    if not run.config.data.train:
        return ()
    needed, phase = needed_tokens(run.config, ledger), phase_at(run.config, ledger.tokens)
    first, last = shares_at(phase.mix, ledger.tokens), shares_at(phase.mix, phase.end_tokens)
    if run.config.phases:  # what each gives over all of them
        whole = max(1, sum(needed.values()))
        first = last = {name: tokens / whole for name, tokens in needed.items()}
    known: Mapping[str, SourcePlan] = {}
    long_enough = tuple(d for d in run.datasets.train if d.tokens > run.config.batch.seq_length)
    with findings.of():
        plans = plan_sources(run.config, Datasets(long_enough, ()), ledger)
        known = {plan.name: plan for plan in plans}
        check_targets(run, ledger, plans)
    return tuple(
        SourceNeed(
            name,
            tokens,
            known[name].available_tokens if name in known else None,
            known[name].epochs_at_end if name in known else None,
            first[name],
            last[name],
        )
        for name, tokens in needed.items()
    )


def _validation_tokens(run: CheckedRun) -> dict[str, int | None]:
    """Tokens of each validation set that one validation reads."""
    wanted, known = run.config.eval.tokens, {dataset.name: dataset.tokens for dataset in run.datasets.validation}
    read: dict[str, int | None] = {}
    for name in run.config.data.validation:
        read[name] = min(wanted or known[name], known[name]) if name in known else wanted
    return read
