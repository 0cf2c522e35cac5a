"""The law of the mix: found again in losses that follow it, and the least share that it allows."""

from __future__ import annotations

import pytest

from megatron_cpt.forgetting.mix_law import MixLaw, fit, least_share

SHARES = (0.0, 0.05, 0.25)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.5])
def test_a_law_is_found_again_in_losses_that_follow_it(gamma: float) -> None:
    true = MixLaw(2.9, 0.02, gamma, 0.0)
    found = fit([(share, true.loss(share)) for share in (*SHARES, 0.5)])
    assert found.gamma == pytest.approx(gamma) and found.worst_residual < 1e-9
    for share in (0.01, 0.1, 0.4):
        assert found.loss(share) == pytest.approx(true.loss(share), abs=1e-6)


def test_the_least_share_is_where_the_rise_meets_the_limit() -> None:
    law = MixLaw(2.9, 0.02, 0.5, 0.0)
    share = least_share(law, 2.9, 0.05)
    assert share is not None
    assert law.loss(share) - 2.9 <= 0.05 < law.loss(share - 1 / 200) - 2.9
    assert least_share(law, 2.9, 10.0) == 0.0
    assert least_share(law, 2.9, 0.001) is None


def test_losses_that_do_not_fall_are_a_constant_and_two_points_are_refused() -> None:
    rising = fit([(0.0, 3.0), (0.05, 3.1), (0.25, 3.3)])
    assert rising.scale == 0 and rising.loss(0.1) == pytest.approx(3.1333, abs=1e-3)
    assert rising.worst_residual == pytest.approx(0.1667, abs=1e-3)
    with pytest.raises(ValueError, match="2 points"):
        fit([(0.0, 3.0), (0.25, 2.9)])
