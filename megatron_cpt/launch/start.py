"""The one way into a run: one process checks and prepares it, every rank then works from what was prepared.

Command, Python API, torchrun and srun all come through `prepare`. Nothing is written before everything is checked, so
a refused start leaves no run folder behind.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_cpt.budget import format_count
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.data.datasets import SourcePlan, plan_sources
from megatron_cpt.data.ledger import Ledger
from megatron_cpt.errors import CheckpointError, ConfigError, CptError, LaunchError
from megatron_cpt.launch.fisher import check_fisher
from megatron_cpt.launch.identity import Identity, check_identity, identity_of, write_identity
from megatron_cpt.launch.kl_targets import check_targets
from megatron_cpt.launch.origin import side_files_dir
from megatron_cpt.launch.place import check_variables, check_world_size, under_launcher
from megatron_cpt.launch.preflight import (
    CheckedRun,
    branch_point,
    check_free_space,
    check_reference,
    check_run,
    check_weights,
    standing_ledger,
)
from megatron_cpt.runs.checkpoints import complete_checkpoints, faults
from megatron_cpt.runs.exit_codes import DO_NOT_RESTART
from megatron_cpt.runs.folder import (
    Change,
    RunFolder,
    changes_since_last_attempt,
    create_run_folder,
    read_resolved,
    record_attempt,
    refused_changes,
)
from megatron_cpt.runs.lease import refuse_or_clear
from megatron_cpt.runs.metrics import read_rows

logger = logging.getLogger(__name__)


class KillSwitchSet(CptError):
    """RUN/KILL is there: a person must remove it."""

    exit_code = DO_NOT_RESTART

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(f"{folder.kill_switch} is there", hint="remove it to let this run start")


@dataclass(frozen=True)
class PreparedRun:
    """A run whose folder is ready, with the place in the data to go on from."""

    checked: CheckedRun
    ledger: Ledger
    plans: tuple[SourcePlan, ...]
    finished: bool = False  # the budget is trained and saved: nothing was prepared, as there is nothing to do

    @property
    def folder(self) -> RunFolder:
        return self.checked.folder

    def describe_end(self) -> str:
        """What to say of a finished run."""
        return (
            f"{self.folder.root} is finished: {self.ledger.tokens:,} tokens trained, the last checkpoint is "
            f"{complete_checkpoints(self.folder.checkpoints)[0][0]}. Raise budget.train_tokens to go on."
        )


def load_run(config: RunConfig, named: str) -> PreparedRun:
    """Check `config` and find its place in the data; nothing is written.

    Raises:
        UserError: the config, the model's files or a dataset.
    """
    checked = check_run(config, named)
    ledger = standing_ledger(checked)
    return PreparedRun(checked, ledger, plan_sources(checked.config, checked.datasets, ledger))


def load_prepared(folder: RunFolder) -> PreparedRun:
    """The run that another process has prepared in `folder`, from its resolved.yaml alone."""
    return load_run(read_resolved(folder), str(folder.resolved))


def prepare(config: RunConfig, named: str, *, accept_changes: bool = False) -> PreparedRun:
    """Check everything, then make the run folder ready for one more attempt; one process per job calls this.

    Raises:
        KillSwitchSet: RUN/KILL keeps the run from starting.
        UserError: the config, the model, the data, the disk, the number of processes; or the folder is another run's or
            is being written.
    """
    run = load_run(config, named)
    _check_processes(config)
    folder = run.folder
    refuse_kill_switch(folder)
    changes = check_continues(run.checked, accept_changes)
    refuse_or_clear(folder.lease)
    if not under_launcher() and _is_finished(run):  # else the ranks are up, and loading it proves that it is whole
        return replace(run, finished=True)
    check_beginning(run.checked)
    check_reference(run.checked)
    check_fisher(run.checked)
    check_targets(run.checked, run.ledger, run.plans)
    check_free_space(run.checked)
    fresh = not complete_checkpoints(folder.checkpoints)
    create_run_folder(folder, run.checked.config, run.checked.model_dir if fresh else None)
    if fresh:
        write_identity(folder, _identity(run.checked))
    record_attempt(folder, changes)
    _announce(run, changes)
    return run


def refuse_kill_switch(folder: RunFolder) -> None:
    """Raise KillSwitchSet when a person has forbidden this run to start."""
    if folder.kill_switch.exists():
        raise KillSwitchSet(folder)


def _check_processes(config: RunConfig) -> None:
    if under_launcher():
        check_world_size(config.parallel.world_size)
        if config.parallel.world_size > 1:
            check_variables()
    elif config.parallel.nodes > 1:
        raise LaunchError(
            f"parallel.nodes = {config.parallel.nodes}: one machine cannot start the others",
            hint="submit it to Slurm with `megatron-cpt submit`, or run this command under torchrun on every node",
        )


def _is_finished(run: PreparedRun) -> bool:
    """Whether the budget is trained and its last checkpoint whole; from a damaged one the run goes back and repeats."""
    if run.ledger.tokens < run.checked.config.budget.train_tokens:
        return False
    newest = complete_checkpoints(run.folder.checkpoints)
    return bool(newest) and not faults(*newest[0])


def check_continues(run: CheckedRun, accept_changes: bool) -> list[Change]:
    """What changed since the last attempt, if there was one.

    Raises:
        CheckpointError: the folder holds another run, and `accept_changes` is off.
    """
    changes = changes_since_last_attempt(run.folder, run.config)
    content = check_identity(run.folder, _identity(run)) if _base_is_there(run) else []
    refused = [*refused_changes(changes), *content]
    if refused and (run.config.lora.on or not accept_changes):
        raise CheckpointError(
            f"{run.folder.root} holds another run; it differs in\n" + "\n".join(f"  {change}" for change in refused),
            hint="choose a new run_dir: adapters continue only on the model and with the settings they began with"
            if run.config.lora.on
            else "choose a new run_dir, or pass --accept-changes to continue this run all the same, with its own model",
        )
    return [*changes, *content]


def _base_is_there(run: CheckedRun) -> bool:
    try:
        side_files_dir(run.config.model)
    except ConfigError:  # gone: the run has a checkpoint and its own copy, else check_run had refused
        logger.warning("%s is gone; the run continues from its own files", run.config.model.init_from)
        return False
    return True


def _identity(run: CheckedRun) -> Identity:
    branch = branch_point(run.config) if run.config.checkpoint.branch_from is not None else None
    model = run.config.model
    return identity_of(side_files_dir(model), run.origin, branch and branch[0], model.rope_change)


def check_beginning(checked: CheckedRun) -> None:
    """Without a checkpoint the weights must be there, and a run that has trained before says that it begins again.

    A run of adapters reads the weights at every start.

    Raises:
        ConfigError: there are no weights to start from.
        CheckpointError: they are not whole.
    """
    folder = checked.folder
    goes_on = bool(complete_checkpoints(folder.checkpoints)) or checked.config.checkpoint.branch_from is not None
    if goes_on and not checked.config.lora.on:
        return
    if checked.origin.kind == "missing":
        raise ConfigError(
            f"model.init_from = {checked.config.model.init_from!r} does not exist",
            hint="name a Hugging Face directory, a torch_dist checkpoint or a run folder, or `random`",
        )
    check_weights(checked.config, checked.origin)
    if goes_on:
        return
    trained = max((row.get("consumed_tokens", 0) for row in read_rows(folder.metrics)[0]), default=0)
    if trained:
        logger.warning(
            "%s has trained %s tokens before and holds no complete checkpoint: it begins again at token 0",
            folder.root,
            f"{trained:,}",
        )


def _announce(run: PreparedRun, changes: Sequence[Change]) -> None:
    """Log what is about to be trained, what changed since the last attempt, and what the data gives."""
    config, derived = run.checked.config, run.checked.derived
    parallel = config.parallel
    logger.info(
        "%s: %s parameters on %d ranks (TP %d x PP %d x CP %d x DP %d)",
        config.job_name,
        f"{run.checked.arch.num_parameters:,}",
        derived.world_size,
        parallel.tp,
        parallel.pp,
        parallel.cp,
        derived.data_parallel_size,
    )
    logger.info(
        "%s tokens = %s steps of %s tokens, %d micro-batches per step and rank",
        format_count(derived.train_tokens),
        f"{derived.train_iters:,}",
        f"{derived.tokens_per_step:,}",
        derived.gradient_accumulation_steps,
    )
    for note in derived.notes:
        logger.info("note: %s", note)
    for change in changes:
        logger.info("changed since the last attempt: %s", change)
    for plan in run.plans:
        logger.info(
            "source %s: %s tokens needed, an epoch has %s; %.2f epochs at the end",
            plan.name,
            format_count(plan.needed_tokens),
            format_count(plan.available_tokens),
            plan.epochs_at_end,
        )
