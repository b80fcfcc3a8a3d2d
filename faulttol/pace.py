"""How long the steps of a run take, and how long it bears without the end of one: its patience.

Five times P99, learned from the run's own steps, because what is slow for one run is usual for another.
Checkpoints, evaluation and recovery are not part of a step; the first step of an epoch is by itself.
"""

import itertools
import math
from collections import deque
from typing import Any

LEAST_PATIENCE_S = 2.0  # a machine that swaps, or a page cache that is written back, holds a step up as long
TIMES_P99 = 5.0  # a step that takes as long is none of those that the run has
KEPT_STEPS = 512  # P99 of these; older ones may be of another length of sequence
TOLD_STEPS = 32  # as many are handed on to whoever takes over, again and again
LEAST_STEPS = 5  # before them the run does not know itself, and the timeout of collectives has to do
FIRST_STEP_S = 5.0  # the least patience with an epoch's first step: a new process warms up in it
TIMES_FIRST = 2.0  # and with one that took long before (it compiled), this much of that


class Pace:
    """Learns from the ends of steps. Clocks are the caller's."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=KEPT_STEPS)
        self._longest_first_s = 0.0
        self._begun_unix = -math.inf
        self._fresh = True  # the epoch has finished no step
        self._moved_s = math.inf  # when the last step ended, or the epoch began

    def as_values(self) -> dict[str, Any]:
        """What `go_on` takes, as plain values."""
        steps = itertools.islice(reversed(self._steps), TOLD_STEPS)
        return {"steps": [*steps][::-1], "longest_first_s": self._longest_first_s}

    def go_on(self, values: dict[str, Any]) -> None:
        """Know what another one had learned of the same run."""
        self._steps.extend(values["steps"])
        self._longest_first_s = values["longest_first_s"]

    def begin(self, now_s: float, now_unix: float) -> None:
        """Ranks have formed anew; what comes first is no step like the others."""
        self._fresh, self._moved_s, self._begun_unix = True, now_s, now_unix

    def ended(self, step_s: float, ended_unix: float, now_s: float) -> None:
        """A step of `step_s` seconds, without checkpoint and evaluation, has ended."""
        self._moved_s = now_s
        if ended_unix < self._begun_unix:
            return  # of before the epoch, told late
        if self._fresh:
            self._longest_first_s = max(self._longest_first_s, step_s)
        else:
            self._steps.append(step_s)
        self._fresh = False

    def quiet_s(self, now_s: float) -> float:
        """Seconds without the end of a step."""
        return max(0.0, now_s - self._moved_s)

    @property
    def patience_s(self) -> float | None:
        """Seconds without the end of a step that this run bears; None while it does not know itself."""
        if len(self._steps) < LEAST_STEPS:
            return None
        ordered = sorted(self._steps)
        usual = max(LEAST_PATIENCE_S, TIMES_P99 * ordered[math.ceil(0.99 * len(ordered)) - 1])
        return max(usual, FIRST_STEP_S, TIMES_FIRST * self._longest_first_s) if self._fresh else usual
