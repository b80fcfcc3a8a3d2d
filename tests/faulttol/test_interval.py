"""Intervals between snapshots: the formulas against their minimum and against worked figures."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfold.faulttol.interval import (
    Mtbf,
    daly,
    ettr,
    sliding_ettr,
    steps_between,
    two_tiers,
    waste,
    young,
)

HOUR = 3600.0


def test_the_worked_figures() -> None:
    """Steps of 1 s and a failure an hour: a lazy copy each step, a synchronous one each half minute."""
    assert young(0.07e-3, HOUR) == pytest.approx(0.7, abs=0.02)
    assert young(0.104, HOUR) == pytest.approx(27, abs=0.5)
    tiers = two_tiers(memory_delta_s=0.07e-3, disk_delta_s=2.0, mtbf_s=HOUR, memory_share=0.95)
    assert tiers.disk_s == pytest.approx(537, abs=0.5)
    assert tiers.memory_s == pytest.approx(0.7, abs=0.05)
    common = {"step_s": 1.0, "mtbf_s": HOUR}
    assert steps_between(**common, delta_s=0.07e-3, copy_s=0.1) == 1
    assert steps_between(**common, delta_s=0.104, copy_s=0.1) == 27


def test_a_snapshot_is_not_begun_before_the_last_is_made() -> None:
    """Copy and parity together take 2.5 steps: the pipeline holds three."""
    assert steps_between(step_s=0.2, delta_s=0.0, mtbf_s=HOUR, copy_s=0.3, parity_s=0.2) == 3


@given(st.floats(1e-4, 10.0), st.floats(100.0, 1e6))
def test_the_optimum_wastes_least(delta_s: float, mtbf_s: float) -> None:
    """Young's interval is where the derivative of the waste is zero; Daly's lies close by."""

    def at(interval_s: float) -> float:
        return waste(interval_s, delta_s=delta_s, mtbf_s=mtbf_s, detect_s=0.3, restart_s=0.7)

    best = young(delta_s, mtbf_s)
    assert at(best) <= min(at(best * 0.9), at(best * 1.1))
    assert abs(daly(delta_s, mtbf_s) - best) <= delta_s + best * 0.25
    assert at(best) == pytest.approx(2 * delta_s / best + 1 / mtbf_s)


def test_daly_s_interval_is_the_published_one() -> None:
    """sqrt(2 * 2 * 100) = 20; the series adds a tenth over three and a hundredth over nine; less the 2 s."""
    assert daly(2.0, 100.0) == pytest.approx(20 * (1 + 0.1 / 3 + 0.01 / 9) - 2)


def test_a_snapshot_dearer_than_the_time_there_is() -> None:
    """Daly's series does not hold there; the interval is then the time between failures."""
    assert daly(25.0, 10.0) == 10.0


def test_goodput_follows_from_waste() -> None:
    """A failure a minute that costs one second, with steps of 0.2 s and snapshots for nothing."""
    lost = waste(0.2, delta_s=0.0, mtbf_s=60, detect_s=0.3, restart_s=0.7)
    assert ettr(lost) == pytest.approx(0.982, abs=1e-3)


def test_a_tier_that_is_never_needed_has_no_interval() -> None:
    """Memory that recovers everything leaves nothing for the disk, and the other way round."""
    assert two_tiers(memory_delta_s=1, disk_delta_s=1, mtbf_s=HOUR, memory_share=1).disk_s == math.inf
    assert two_tiers(memory_delta_s=1, disk_delta_s=1, mtbf_s=HOUR, memory_share=0).memory_s == math.inf


def test_the_estimate_goes_from_the_guess_to_what_happened() -> None:
    """The guess weighs as much as one failure: five in ten minutes and it is forgotten."""
    guess = Mtbf(prior_s=HOUR)
    assert guess.mean_s == HOUR
    assert guess.ran(HOUR).mean_s == 2 * HOUR
    busy = guess
    for _ in range(60):
        busy = busy.ran(120).failed()
    assert busy.mean_s == pytest.approx(120, rel=0.5)
    assert busy.failures == 60


@pytest.mark.parametrize(
    ("lost", "now_s", "share"),
    [
        ([], 100, 1.0),
        ([(10, 20)], 100, 0.9),
        ([(10, 20), (15, 25)], 100, 0.85),  # overlapping: counted once
        ([(90, 200)], 100, 0.9),  # still under way
        ([(10, 20)], 3700, 1.0),  # out of the window
        ([(0, 200)], 3700, 1 - 100 / 3600),
        ([(5, 6)], 0, 1.0),
    ],
)
def test_the_sliding_share_counts_the_last_hour(
    lost: list[tuple[float, float]], now_s: float, share: float
) -> None:
    """A run is judged by what it does now, and a young run by the time that it has had."""
    assert sliding_ettr(lost, began_s=0, now_s=now_s) == pytest.approx(share)


@pytest.mark.parametrize("mtbf_s", [0.0, -1.0, math.nan])
def test_times_that_cannot_be_are_refused(mtbf_s: float) -> None:
    """A division by zero would say less."""
    with pytest.raises(ValueError, match=r"mtbf_s is .* give a time above 0"):
        young(1.0, mtbf_s)
    with pytest.raises(ValueError, match="memory_share is 95"):
        two_tiers(memory_delta_s=1, disk_delta_s=1, mtbf_s=1, memory_share=95)
