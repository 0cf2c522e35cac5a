"""What is checked before any rank starts."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_cpt.config.load import build_config
from megatron_cpt.errors import ConfigError
from megatron_cpt.launch import preflight


@pytest.mark.parametrize(
    ("log", "package"),
    [
        ({"tensorboard": True}, "tensorboard"),
        ({"wandb_project": "p"}, "wandb"),
        ({"mlflow_experiment": "p"}, "mlflow"),
        ({"trackio_project": "p"}, "trackio"),
        ({"report": True}, "matplotlib"),
    ],
)
def test_a_missing_package_is_said_before_anything_starts(
    log: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    raw = {"job_name": "t", "model": {"init_from": "m"}}
    with pytest.raises(ConfigError, match=f"needs the package {package}") as caught:
        preflight.refuse_missing_log_packages(build_config(raw | {"log": log}))
    assert f"megatron-cpt[{'plots' if package == 'matplotlib' else 'trackers'}]" in str(caught.value.hint)
    preflight.refuse_missing_log_packages(build_config(raw))
