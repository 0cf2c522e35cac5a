"""All checks of one machine, in the order in which a job would meet the faults."""

from __future__ import annotations

from collections.abc import Callable

from megatron_cpt.architecture.facts import Architecture
from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.config.derive import Derived, derive
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.data.datasets import check_datasets, plan_sources
from megatron_cpt.doctor.check import Check
from megatron_cpt.doctor.data import check_data
from megatron_cpt.doctor.gpus import check_gpus
from megatron_cpt.doctor.network import check_meeting_place
from megatron_cpt.doctor.storage import check_storage
from megatron_cpt.doctor.versions import check_versions
from megatron_cpt.errors import CptError
from megatron_cpt.launch.base_model import refuse_instruct_model
from megatron_cpt.launch.origin import model_dir, resolve_origin
from megatron_cpt.launch.preflight import CheckedRun, refuse_missing_trackers, standing_ledger


def examine_machine(config: RunConfig, named: str) -> list[Check]:
    """Check this machine and the data that it sees; imports no torch. `named` says in errors where `config` is from.

    Raises:
        UserError: the config is wrong, or there is no model that it names.
    """
    folder, origin = model_dir(config), resolve_origin(config.model.init_from)
    arch = read_architecture(folder)
    derived = derive(config, arch, origin=named)
    return [
        *check_versions(),
        _trackers(config),
        *check_gpus(config.parallel.gpus_per_node),
        check_meeting_place(),
        *check_storage(config, arch, derived.train_iters, derived.tokens_per_step),
        _allowed("base model", f"{folder}/config.json", lambda: refuse_instruct_model(config, folder)),
        *check_data(config, arch, folder, origin),
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
    looked_at = f"log.tensorboard = {config.log.tensorboard}, log.wandb_project = {config.log.wandb_project}"
    return _allowed("trackers", looked_at, lambda: refuse_missing_trackers(config))


def _allowed(name: str, looked_at: str, refuse: Callable[[], None]) -> Check:
    try:
        refuse()
    except CptError as error:
        return Check(name, looked_at, "error", error.message, error.hint)
    return Check(name, looked_at, "ok", "nothing against it")
