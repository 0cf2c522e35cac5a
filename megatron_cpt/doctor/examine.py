"""All checks of one machine, and of the machines of a job, in the order in which a job would meet the faults."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.config.derive import Derived, derive
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.data.datasets import check_datasets, plan_sources
from megatron_cpt.doctor.board import StoreBoard
from megatron_cpt.doctor.check import Check, failed
from megatron_cpt.doctor.computation import check_computation
from megatron_cpt.doctor.data import check_data
from megatron_cpt.doctor.gpus import check_gpus
from megatron_cpt.doctor.network import check_meeting_place
from megatron_cpt.doctor.nodes import ANSWER_SECONDS, EXAMINATION_SECONDS, Node
from megatron_cpt.doctor.preflight import check_start_of_training
from megatron_cpt.doctor.storage import check_storage, existing_parent
from megatron_cpt.doctor.versions import check_versions
from megatron_cpt.errors import CptError
from megatron_cpt.launch.base_model import refuse_instruct_model
from megatron_cpt.launch.origin import model_dir, resolve_origin, run_architecture
from megatron_cpt.launch.place import rank_here, under_launcher
from megatron_cpt.launch.preflight import CheckedRun, refuse_missing_log_packages, standing_ledger


def examine(config: RunConfig, named: str, *, preflight: bool) -> list[Check]:
    """Check this machine, or under torchrun or srun all machines; with `preflight` also the start of training.

    Return all checks, on rank 0 alone. `named` says in errors where `config` is from.

    Raises:
        UserError: on rank 0 the config is wrong or there is no model that it names; the ranks cannot meet.
    """
    if not (under_launcher() and int(os.environ["WORLD_SIZE"]) > 1):
        alone = examine_machine(config, named)
        return [*alone, *_start(config, named, wanted=not failed(alone))] if preflight else alone
    meeting = check_meeting_place()  # before a rank listens there itself
    node = Node(StoreBoard(), rank_here(), int(os.environ["WORLD_SIZE"]), socket.gethostname())
    checks: list[Check] = []
    try:
        checks = _examine_together(node, meeting, config, named)
    finally:
        if node.rank == 0:
            node.board.put("preflight", "yes" if checks and not failed(checks) else "no")
    if preflight:
        wanted = node.board.get("preflight", EXAMINATION_SECONDS + 2 * ANSWER_SECONDS) == "yes"
        checks += _start(config, named, wanted=wanted)
    return checks if node.rank == 0 else []


def examine_alone(read_config: Callable[[], RunConfig], named: str, *, preflight: bool) -> list[Check]:
    """Check this machine as one of a job, without meeting the others; with `preflight` also compute on its GPUs.

    What keeps this machine from reading the config or the model is an error of it like any other.
    """
    try:
        config = read_config()
        checks = examine_machine(config, named, read_weights=False)
    except CptError as error:
        return [Check("config", f"{named} and its model", "error", error.message, error.hint)]
    return [*checks, check_computation()] if preflight else checks


def _start(config: RunConfig, named: str, *, wanted: bool) -> list[Check]:
    if not wanted:
        return [Check("start of training", "nothing", "not checked", "there are errors above: repair them first")]
    return check_start_of_training(config, named)


def _examine_together(node: Node, meeting: Check, config: RunConfig, named: str) -> list[Check]:
    """Return the checks of all machines on rank 0, nothing on the others."""
    clocks, shared = node.clocks(), node.shared_folder(existing_parent(config))
    if not node.speaks:
        return []
    try:
        mine = examine_machine(config, named, read_weights=node.rank == 0, meeting=meeting)
    except CptError as error:
        if node.rank == 0:
            raise
        mine = [meeting, Check("config", f"{named} and its model", "error", error.message, error.hint)]
    found = node.collect(mine)
    return [node.presence(), *clocks, *shared, *found] if node.rank == 0 else []


def examine_machine(
    config: RunConfig, named: str, *, read_weights: bool = True, meeting: Check | None = None
) -> list[Check]:
    """Check this machine and the data that it sees; imports no torch. `named` says in errors where `config` is from.

    `read_weights`: also check the embedding; one machine of a job is enough. `meeting`: the check of the port, where it
    was made before.

    Raises:
        UserError: the config is wrong, or there is no model that it names.
    """
    folder, origin = model_dir(config), resolve_origin(config.model.init_from)
    arch = run_architecture(config)
    derived = derive(config, arch, origin=named)
    return [
        *check_versions(),
        _trackers(config),
        *check_gpus(config.parallel.gpus_per_node),
        meeting or check_meeting_place(),
        *check_storage(config, arch, derived),
        _allowed("base model", f"{folder}/config.json", lambda: refuse_instruct_model(config, folder)),
        *check_data(config, arch, folder, origin if read_weights else None),
        _epochs(config, arch, derived),
    ]


def _epochs(config: RunConfig, arch: Architecture, derived: Derived) -> Check:
    looked_at = f"budget.train_tokens, weights of the sources, data.max_epochs = {config.data.max_epochs:g}"
    try:
        folder, origin = model_dir(config), resolve_origin(config.model.init_from)
        run = CheckedRun(config, arch, derived, check_datasets(config, arch, folder), origin, folder)
        plans = plan_sources(config, run.datasets, standing_ledger(run))
    except CptError as error:
        return Check("epochs", looked_at, "error", error.message, error.hint)
    found = ", ".join(f"{plan.name} {plan.epochs_at_end:.2f}" for plan in plans)
    return Check("epochs", looked_at, "ok", f"at the end of the budget: {found}")


def _trackers(config: RunConfig) -> Check:
    log = config.log
    looked_at = (
        f"log.tensorboard = {log.tensorboard}, log.wandb_project = {log.wandb_project}, "
        f"log.mlflow_experiment = {log.mlflow_experiment}, log.trackio_project = {log.trackio_project}"
    )
    return _allowed("trackers", looked_at, lambda: refuse_missing_log_packages(config))


def _allowed(name: str, looked_at: str, refuse: Callable[[], None]) -> Check:
    try:
        refuse()
    except CptError as error:
        return Check(name, looked_at, "error", error.message, error.hint)
    return Check(name, looked_at, "ok", "nothing against it")
