"""Pipeline schedules by name: torch's classes, and what each makes the ranks do, as plain data.

GPipe: arXiv 1811.06965. 1F1B: arXiv 2006.09503, interleaved: 2104.04473. Zero bubble and its V shape: arXiv
2401.10241. DualPipe: arXiv 2412.19437; torch does the two passes that it overlaps one after the other.

What a schedule asks of a layout stands in `parallel/layout.py`, which knows no torch.
"""

from dataclasses import dataclass, field
from typing import Any

from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
    _PipelineSchedule,
)

from .layout import SCHEDULES, Layout, ScheduleName
from .timeline import Order, ScheduleError, ScheduleStep

CLASSES: dict[ScheduleName, type[_PipelineSchedule]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


def schedule_class(name: ScheduleName) -> type[_PipelineSchedule]:
    """torch's class of a schedule. Raises ScheduleError for a name that is none."""
    if name not in CLASSES:
        raise ScheduleError(f'there is no schedule "{name}"; there are {", ".join(CLASSES)}')
    return CLASSES[name]


def forward_class(name: ScheduleName) -> type[_PipelineSchedule]:
    """The class whose forward passes, alone, suit the stages of a schedule, whatever the number of
    micro-batches.
    """
    schedule_class(name)
    if SCHEDULES[name].v_shaped:
        return ScheduleZBVZeroBubble
    return ScheduleGPipe if SCHEDULES[name].stages_per_rank == 1 else ScheduleLoopedBFS


def order_of(layout: Layout, microbatches: int) -> Order:
    """What each pipeline rank of `layout` does with the micro-batches of a step.

    Raises ScheduleError where the schedule does not work with as many.
    """
    kind: Any = schedule_class(layout.schedule)
    places = [_Place(layout, 0) for _ in layout.stages_of(0)]
    single = issubclass(kind, PipelineScheduleSingle)
    try:
        schedule = kind(places[0] if single else places, microbatches, scale_grads=False)
    except ValueError as error:
        raise ScheduleError(
            f"the schedule {layout.schedule} does not work with {microbatches} micro-batches on "
            f"{layout.pp} ranks of {len(places)} stages: {error}"
        ) from error
    return tuple(tuple(_steps(schedule.pipeline_order[rank], single)) for rank in range(layout.pp))


def _steps(actions: list[Any], single: bool) -> list[ScheduleStep]:
    """The computations of one rank."""
    flat: list[Any] = []
    for action in actions:
        if action is not None:
            flat += action.sub_actions or (action,)
    done = {"F": 0, "B": 0}
    steps = []
    for action in flat:
        kind, number = action.computation_type.value, action.microbatch_index
        if kind not in ("F", "B", "I", "W"):
            continue
        if single:
            # counted, not read: torch's plan of 1F1B numbers the passes forward of the last rank from 1,
            # unlike the ones that it then runs
            number = done[kind]
            done[kind] += 1
        steps.append(ScheduleStep(kind, action.stage_index, number))
    return steps


@dataclass
class _Place:
    """Stands in for a stage where torch only asks how many there are and where."""

    layout: Layout
    group_rank: int
    submod: None = None
    stage_index_to_group_rank: dict[int, int] = field(default_factory=dict)

    @property
    def num_stages(self) -> int:
        return self.layout.stages

    @property
    def group_size(self) -> int:
        return self.layout.pp
