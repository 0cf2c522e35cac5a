"""Which validation sets are the domain's and which are general text, for the commands that weigh both."""

from __future__ import annotations

from collections.abc import Sequence

import click

from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import ConfigError

domain_option = click.option(
    "--domain", multiple=True, help="Validation set of the domain.  [default: those that are not general]"
)
general_option = click.option(
    "--general", multiple=True, help="General validation set.  [default: those of forgetting.gate]"
)


def sets_by_kind(config: RunConfig, domain: Sequence[str], general: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the validation sets of the domain and of general text: those named, else by forgetting.gate.

    Raises:
        ConfigError: one is unknown, or a kind has none.
    """
    known, gate = list(config.data.validation), config.forgetting.gate
    general = list(general) or list(gate.general if gate is not None else ())
    domain = list(domain) or [name for name in known if name not in general]
    for name in (*domain, *general):
        if name not in known:
            hint = f"one of {', '.join(known)}" if known else "name held-out sets under data.validation"
            raise ConfigError(f"{name!r} is no set of data.validation", hint=hint)
    for kind, sets in (("general", general), ("domain", domain)):
        if not sets:
            raise ConfigError(
                f"no validation set is {kind} text, and both kinds are weighed",
                hint=f"--{kind} NAME, a set of data.validation",
            )
    return domain, list(general)
