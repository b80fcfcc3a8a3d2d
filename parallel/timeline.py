"""The work of a pipeline's ranks as plain data, and when each piece of it is done. Knows no torch.

A step is one pass of one micro-batch through one stage: forward (F), backward (B), or the two halves of a
backward pass that zero-bubble schedules put apart (arXiv 2401.10241): the gradient of the stage's input (I),
for which the stage before waits, and the gradients of its weights (W), for which nobody does.

`simulate` lets every rank do its steps in order, each as soon as what it needs is there. It does not model
communication beyond a fixed delay.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["F", "B", "I", "W"]


@dataclass(frozen=True)
class ScheduleStep:
    """One piece of a rank's work."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


Order = tuple[tuple[ScheduleStep, ...], ...]  # what each rank does, in its order


@dataclass(frozen=True, kw_only=True)
class Durations:
    """How long a step takes: a kind's units of time, times the weight of its stage (1 unless given)."""

    forward: float = 1.0
    backward: float = 2.0
    inputs: float = 1.0
    weights: float = 1.0
    stages: Sequence[float] = ()
    transfer: float = 0.0  # between two ranks

    def of(self, step: ScheduleStep) -> float:
        """The time of one step."""
        units = {"F": self.forward, "B": self.backward, "I": self.inputs, "W": self.weights}[step.kind]
        return units * (self.stages[step.stage] if self.stages else 1.0)


@dataclass(frozen=True)
class Timed:
    """A step and when it is done."""

    step: ScheduleStep
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The steps of each rank in time."""

    ranks: tuple[tuple[Timed, ...], ...]

    @property
    def length(self) -> float:
        """Until the last rank is done."""
        return max((steps[-1].end for steps in self.ranks if steps), default=0.0)

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they wait."""
        busy = sum(timed.end - timed.start for steps in self.ranks for timed in steps)
        return 1.0 - busy / (self.length * len(self.ranks)) if self.length else 0.0


class ScheduleError(ValueError):
    """An order that ranks cannot follow, or a schedule that does not exist."""


def simulate(order: Order, durations: Durations | None = None) -> Timeline:
    """When each rank does each step of `order`. Raises ScheduleError where ranks wait for each other for
    ever.
    """
    durations = durations or Durations()
    rank_of = {step.stage: rank for rank, steps in enumerate(order) for step in steps}
    last_stage = max(rank_of, default=0)
    done: dict[tuple[str, int, int], float] = {}  # (F or I of either backward pass, stage, micro-batch)
    timed: list[list[Timed]] = [[] for _ in order]
    progress = True
    while progress:
        progress = False
        for rank, steps in enumerate(order):
            while len(timed[rank]) < len(steps):
                step = steps[len(timed[rank])]
                needed = _needed(step, last_stage)
                if any(key not in done for key in needed):
                    break
                delays = (durations.transfer if rank_of[stage] != rank else 0.0 for _, stage, _ in needed)
                ready = max(
                    (done[key] + delay for key, delay in zip(needed, delays, strict=True)), default=0.0
                )
                start = max(ready, timed[rank][-1].end if timed[rank] else 0.0)
                end = start + durations.of(step)
                timed[rank].append(Timed(step, start, end))
                done["I" if step.kind == "B" else step.kind, step.stage, step.microbatch] = end
                progress = True
    for rank, steps in enumerate(order):
        if len(timed[rank]) < len(steps):
            raise ScheduleError(f"rank {rank} waits for ever before {steps[len(timed[rank])]}")
    return Timeline(tuple(map(tuple, timed)))


def in_flight(order: Order) -> list[int]:
    """The most passes forward whose backward pass is still to end, on each rank: what it keeps activations
    of.
    """
    most = []
    for steps in order:
        held = peak = 0
        for step in steps:
            held += {"F": 1, "B": -1, "I": 0, "W": -1}[step.kind]
            peak = max(peak, held)
        most.append(peak)
    return most


def _needed(step: ScheduleStep, last_stage: int) -> list[tuple[str, int, int]]:
    """What must be done before, on this rank or another."""
    stage, microbatch = step.stage, step.microbatch
    if step.kind == "F":
        return [("F", stage - 1, microbatch)] if stage else []
    if step.kind == "W":
        return [("I", stage, microbatch)]
    own = [("F", stage, microbatch)]
    return own if stage == last_stage else [*own, ("I", stage + 1, microbatch)]
