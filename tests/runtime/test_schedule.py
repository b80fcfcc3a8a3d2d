"""Learning rates: values by hand at the corners, and the promises between them."""

from itertools import pairwise
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayfold.runtime.optim.config import OptimConfig
from rayfold.runtime.optim.schedule import learning_rate

SCHEDULES = get_args(get_type_hints(OptimConfig)["schedule"])


@pytest.mark.parametrize(
    ("schedule", "options", "expected"),
    [
        ("constant", {}, {1: 1.0, 50: 1.0, 100: 1.0}),
        ("constant", {"warmup_steps": 10}, {1: 0.1, 5: 0.5, 10: 1.0, 11: 1.0}),
        ("linear", {"min_lr_ratio": 0.0}, {50: 0.5, 75: 0.25, 100: 0.0}),
        ("linear", {"min_lr_ratio": 0.2, "warmup_steps": 20}, {20: 1.0, 60: 0.6, 100: 0.2}),
        ("cosine", {"min_lr_ratio": 0.0}, {50: 0.5, 25: 0.8535533905932737, 100: 0.0}),
        ("cosine", {"min_lr_ratio": 0.1, "warmup_steps": 20}, {10: 0.5, 20: 1.0, 60: 0.55, 100: 0.1}),
        ("wsd", {"min_lr_ratio": 0.0, "decay_steps": 20}, {1: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
        ("wsd", {"min_lr_ratio": 0.1}, {90: 1.0, 95: 0.55, 100: 0.1}),
        ("wsd", {"min_lr_ratio": 0.0, "warmup_steps": 60, "decay_steps": 80}, {60: 1.0, 80: 0.5, 100: 0.0}),
        ("cosine", {"warmup_steps": 100}, {50: 0.5, 100: 1.0}),
    ],
)
def test_the_corners_are_where_the_documentation_puts_them(
    schedule: str, options: dict[str, float], expected: dict[int, float]
) -> None:
    """Of 100 steps at a peak of 1."""
    config = OptimConfig(**{"lr": 1.0, "schedule": schedule, **options})  # type: ignore[arg-type]
    for step, rate in expected.items():
        assert learning_rate(config, step=step, steps=100) == pytest.approx(rate, abs=1e-12), step


@given(
    schedule=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 400),
    warmup=st.integers(0, 400),
    decay=st.integers(0, 500),
    floor=st.floats(0, 1),
)
def test_it_rises_to_the_peak_and_never_below_the_floor(
    schedule: str, steps: int, warmup: int, decay: int, floor: float
) -> None:
    """Up through warm-up, never up again, within [floor, peak] after it, and at the floor at the end."""
    warmup = min(warmup, steps)
    config = OptimConfig(
        lr=2.0,
        schedule=schedule,  # type: ignore[arg-type]
        warmup_steps=warmup,
        decay_steps=decay,
        min_lr_ratio=floor,
    )
    rates = [learning_rate(config, step=step, steps=steps) for step in range(1, steps + 1)]
    rising, rest = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(rest))
    assert all(2.0 * floor - 1e-9 <= rate <= 2.0 for rate in rest)
    if warmup:
        assert rising[-1] == 2.0
    if rest and schedule != "constant":
        assert rest[-1] == pytest.approx(2.0 * floor, abs=1e-9)
