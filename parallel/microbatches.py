"""Into how many micro-batches a rank's part of a step is cut. No torch here."""

from .layout import SCHEDULES, Layout


def divisors(number: int) -> list[int]:
    """All of them, the smallest first."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def rounds_of(layout: Layout, count: int) -> int:
    """Rounds in which an interleaved schedule takes `count` micro-batches: about as many a round as there are
    pipeline ranks.
    """
    return max(1, count // layout.pp)


def schedule_takes(layout: Layout, count: int) -> bool:
    """Whether the schedule of `layout` works with `count` micro-batches."""
    if layout.stages == 1:
        return True
    schedule = SCHEDULES[layout.schedule]
    if schedule.every_stage_busy and count < layout.stages:
        return False
    return not (schedule.in_rounds and count % rounds_of(layout, count))


def micro_size(layout: Layout, part: int) -> int:
    """Sequences of a micro-batch where nobody said: all `part` of a rank at once without a pipeline.

    With one, the most that still make twice as many micro-batches as stages, so that stages wait for each
    other at most a third of a step; or else as many micro-batches as can be.
    """
    if layout.stages == 1:
        return part
    counts = [count for count in divisors(part) if schedule_takes(layout, count)]
    enough = [count for count in counts if count >= 2 * layout.stages]
    return part // (min(enough) if enough else max(counts, default=part))
