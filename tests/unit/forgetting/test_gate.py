from __future__ import annotations

import json
import math

import pytest

from megatron_cpt.config.load import build_config
from megatron_cpt.config.sections.forgetting import GateConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.forgetting.gate import Gate

ASKED = GateConfig(general=("facts", "prose"), max_general_perplexity_increase=0.03)


def test_each_set_is_compared_with_its_first_value() -> None:
    gate, judgement = Gate().after(ASKED, {"facts": 2.0, "prose": 3.0, "domain": 5.0})
    assert judgement.within and set(judgement.increases.values()) == {0.0}
    gate, judgement = gate.after(ASKED, {"facts": 2.02, "prose": 2.9, "domain": 4.0})
    assert judgement.within and gate.within
    assert judgement.increases == pytest.approx({"facts": math.exp(0.02) - 1, "prose": math.exp(-0.1) - 1})
    gate, judgement = gate.after(ASKED, {"facts": 2.0, "prose": 3.0 + math.log(1.0301), "domain": 4.0})
    assert not judgement.within and not gate.within and judgement.worst == "prose"
    assert "prose is +3.0% against its first, more than the limit of 3.0%" in judgement.describe()
    assert gate.first == {"facts": 2.0, "prose": 3.0}


@pytest.mark.parametrize("loss", [math.nan, math.inf, 5000.0])
def test_a_loss_that_is_no_number_or_enormous_is_beyond_every_limit(loss: float) -> None:
    gate, _ = Gate().after(ASKED, {"facts": 2.0, "prose": 3.0})
    gate, judgement = gate.after(ASKED, {"facts": 2.5, "prose": loss})
    assert not judgement.within and judgement.worst == "prose"


def test_the_first_value_of_a_set_that_joins_later_is_its_own_first() -> None:
    one = GateConfig(general=("facts",))
    gate, _ = Gate().after(one, {"facts": 2.0})
    gate, judgement = gate.after(ASKED, {"facts": 2.0, "prose": 9.0})
    assert judgement.within and gate.first == {"facts": 2.0, "prose": 9.0}


def test_what_it_remembers_survives_json() -> None:
    gate, _ = Gate().after(ASKED, {"facts": 2.0, "prose": 3.0})
    gate = gate.rolled_back(ASKED).rolled_back(ASKED)
    assert (gate.rate_factor, gate.rollbacks) == (0.25, 2)
    assert Gate.from_json(json.loads(json.dumps(gate.to_json()))) == gate


def config(**gate: object) -> GateConfig:
    tree = {
        "job_name": "a",
        "model": {"init_from": "m"},
        "data": {"validation": {"facts": "f"}},
        "eval": {"every": "5 iters"},
        "forgetting": {"gate": {"general": ["facts"], **gate}},
    }
    found = build_config(tree).forgetting.gate
    assert found is not None
    return found


@pytest.mark.parametrize(("written", "share"), [("3 %", 0.03), ("3%", 0.03), ("2.5 %", 0.025), (0.03, 0.03), (0, 0.0)])
def test_a_limit_is_per_cent_or_a_share(written: object, share: float) -> None:
    assert config(max_general_perplexity_increase=written).limit == share


@pytest.mark.parametrize("written", [3, "3", "x %", -0.1, "-3 %", "nan %"])
def test_a_limit_that_could_mean_two_things_or_none_is_refused(written: object) -> None:
    with pytest.raises(ConfigError, match="max_general_perplexity_increase") as error:
        config(max_general_perplexity_increase=written)
    assert error.value.hint
