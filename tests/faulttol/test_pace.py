"""The patience of a run: how long it may be without the end of a step. Numbers, no clock."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfold.faulttol.pace import FIRST_STEP_S, LEAST_PATIENCE_S, LEAST_STEPS, TOLD_STEPS, Pace


def learned(steps: Sequence[float]) -> Pace:
    """A pace that has seen a first step and these."""
    pace = Pace()
    pace.begin(0.0, 0.0)
    for number, step_s in enumerate([1.0, *steps]):
        pace.ended(step_s, ended_unix=float(number), now_s=float(number))
    return pace


@pytest.mark.parametrize(
    ("steps", "patience_s"),
    [
        ([0.02] * (LEAST_STEPS - 1), None),  # it does not know itself yet
        ([0.02] * LEAST_STEPS, LEAST_PATIENCE_S),
        ([1.0] * 20, 5.0),
        ([1.0] * 20 + [4.0], 20.0),  # a long one among them is one of its own
        ([1.0] * 300 + [4.0], 5.0),
    ],
)
def test_patience_is_learned_from_the_run_s_own_steps(steps: list[float], patience_s: float | None) -> None:
    """Five times P99, and never less than a machine that swaps may take."""
    assert learned(steps).patience_s == patience_s


def test_the_first_step_of_an_epoch_has_patience_of_its_own() -> None:
    """A spare warms up in it; and still it must be found stuck there, where a deterministic fault returns."""
    pace = learned([0.02] * 20)
    pace.begin(100.0, 100.0)
    assert pace.patience_s == max(FIRST_STEP_S, 2.0)
    pace.ended(0.02, ended_unix=20.0, now_s=100.1)  # of before, told late by a new rank 0
    assert pace.patience_s == max(FIRST_STEP_S, 2.0)
    assert pace.quiet_s(101.1) == pytest.approx(1.0)
    pace.ended(30.0, ended_unix=130.0, now_s=130.0)
    assert pace.patience_s == LEAST_PATIENCE_S
    pace.begin(131.0, 131.0)
    assert pace.patience_s == 60.0, "it compiled last time"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 30.0), min_size=LEAST_STEPS, max_size=200))
def test_no_step_that_the_run_has_had_of_late_is_out_of_its_patience(steps: list[float]) -> None:
    """Steps of varying length are the rule where documents are."""
    patience_s = learned(steps).patience_s
    assert patience_s is not None
    allowed = sorted(steps)[: max(1, int(0.99 * len(steps)))]
    assert patience_s >= 5 * allowed[-1]


def test_who_takes_over_knows_the_pace_and_gives_its_first_step_the_time_of_a_first_one() -> None:
    """A controller that is started again must not take minutes to see that a rank hangs."""
    pace, other = Pace(), Pace()
    pace.begin(0.0, 0.0)
    for number in range(1, 2 * TOLD_STEPS):
        pace.ended(9.0 if number == 1 else 0.5 if number < TOLD_STEPS else 1.0, float(number), float(number))
    assert pace.patience_s == 5.0
    values = pace.as_values()
    assert len(values["steps"]) == TOLD_STEPS
    assert other.patience_s is None
    other.go_on(values)
    other.begin(100.0, 100.0)
    assert other.patience_s == 18.0
    other.ended(1.0, 101.0, 101.0)
    assert other.patience_s == 5.0
