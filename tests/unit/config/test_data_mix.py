"""`data`: from weights, roles and points to shares over the tokens, and what contradicts itself."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from megatron_cpt.config.derive import derive
from megatron_cpt.config.load import build_config
from megatron_cpt.config.mix import shares_at
from megatron_cpt.config.run_config import RunConfig
from megatron_cpt.errors import ConfigError

TRAIN = [
    {"name": "medical", "prefix": "m"},
    {"name": "books", "prefix": "b", "role": "replay", "weight": 3},
    {"name": "web", "prefix": "w", "role": "replay"},
]


def config_of(**data: Any) -> RunConfig:
    return build_config({"job_name": "job", "model": {"init_from": "x"}, "data": {"train": TRAIN} | data})


def schedule(*points: dict[str, Any], shape: str = "linear") -> dict[str, Any]:
    return {"schedule": {"shape": shape, "points": list(points)}}


def test_a_replay_ratio_shares_within_the_roles_by_weight() -> None:
    (piece,) = config_of(replay_ratio="5 %").data.mix()
    assert piece.first == {"medical": Fraction(95, 100), "books": Fraction(3, 80), "web": Fraction(1, 80)}
    (plain,) = config_of().data.mix()
    assert plain.first == {"medical": Fraction(1, 5), "books": Fraction(3, 5), "web": Fraction(1, 5)}
    (none,) = config_of(replay_ratio=0).data.mix()
    assert none.first == {"medical": 1, "books": 0, "web": 0}


def test_points_are_met_exactly_and_lines_lie_between_them() -> None:
    points = ({"tokens": 1000, "domain": "50 %"}, {"tokens": 3000, "domain": "90 %"})
    mix = config_of(**schedule(*points)).data.mix()
    assert [shares_at(mix, tokens)["medical"] for tokens in (0, 1000, 2000, 3000, 10**12)] == [0.5, 0.5, 0.7, 0.9, 0.9]
    steps = config_of(**schedule(*points, shape="step")).data.mix()
    assert [shares_at(steps, tokens)["medical"] for tokens in (0, 2999, 3000)] == [0.5, 0.5, 0.9]
    named = config_of(**schedule({"tokens": 0, "shares": {"books": "40 %", "web": 0.6}})).data.mix()
    assert shares_at(named, 0) == {"medical": 0.0, "books": 0.4, "web": 0.6}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"replay_ratio": "5 %", "train": TRAIN[:1]}, "to sources of role replay, and there are none"),
        ({"replay_ratio": 0.5, "train": TRAIN[1:]}, "to sources of role domain, and there are none"),
        ({"replay_ratio": 5}, "may be meant as per cent"),
        ({"replay_ratio": "120 %"}, "less than or equal to 1"),
        ({"replay_ratio": "5 %", **schedule({"tokens": 0, "domain": 1})}, "both say the blend"),
        (schedule({"tokens": 0}), "needs either domain or shares"),
        (schedule({"tokens": 0, "domain": 1, "shares": {"web": 1}}), "needs either domain or shares"),
        (schedule({"tokens": 0, "shares": {"web": "60 %", "books": "50 %"}}), "sum to 1.1"),
        (schedule({"tokens": 0, "shares": {"web": 1.0, "medcal": 0}}), "did you mean medical"),
        (schedule({"tokens": 0, "shares": {"web": -1, "books": 1, "medical": 1}}), "not a share"),
        (schedule({"tokens": 5, "domain": 1}, {"tokens": 5, "domain": 0}), "follows one at 5"),
        ({"schedule": {"points": []}}, "at least 1 item"),
        ({"train": [TRAIN[0] | {"role": "replya"}]}, "'domain' or 'replay'"),
    ],
)
def test_a_mix_that_contradicts_itself_is_refused(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        derive(config_of(**data))
    assert words in str(refused.value)
