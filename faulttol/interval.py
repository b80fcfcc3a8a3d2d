"""How often to protect the state: the interval between snapshots at which the least time is lost.

Too seldom, and a failure loses long stretches of training; too often, and the snapshots themselves cost more.
The optimum is Young's sqrt(2 delta M), refined by Daly ("A higher order estimate of the optimum checkpoint
interval", 2006): delta is the visible cost of one snapshot, M the mean time between failures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


def young(delta_s: float, mtbf_s: float) -> float:
    """First-order optimal interval in seconds; 0 if a snapshot costs nothing."""
    _positive("mtbf_s", mtbf_s)
    _not_negative("delta_s", delta_s)
    return math.sqrt(2 * delta_s * mtbf_s)


def daly(delta_s: float, mtbf_s: float) -> float:
    """Higher-order optimal interval in seconds; M where a snapshot takes twice as long as that or more."""
    first = young(delta_s, mtbf_s)
    if delta_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = delta_s / (2 * mtbf_s)
    return first * (1 + math.sqrt(ratio) / 3 + ratio / 9) - delta_s


def waste(interval_s: float, *, delta_s: float, mtbf_s: float, detect_s: float, restart_s: float) -> float:
    """Seconds lost for each that trains: by snapshots, and by failures with half an interval again."""
    _positive("interval_s", interval_s)
    _positive("mtbf_s", mtbf_s)
    return delta_s / interval_s + (detect_s + restart_s + interval_s / 2) / mtbf_s


def ettr(lost: float) -> float:
    """Effective training time ratio, 0 to 1: the share of time that trains, from `waste`."""
    _not_negative("lost", lost)
    return 1 / (1 + lost)


def steps_between(
    *, step_s: float, delta_s: float, mtbf_s: float, copy_s: float, parity_s: float = 0.0
) -> int:
    """Steps from one snapshot to the next: the optimum, but no fewer than a snapshot takes to be made."""
    _positive("step_s", step_s)
    pipeline = math.ceil((copy_s + parity_s) / step_s)
    return max(1, pipeline, round(young(delta_s, mtbf_s) / step_s))


@dataclass(frozen=True)
class Tiers:
    """Seconds between snapshots in memory and between checkpoints on disk; infinite where never needed."""

    memory_s: float
    disk_s: float


def two_tiers(*, memory_delta_s: float, disk_delta_s: float, mtbf_s: float, memory_share: float) -> Tiers:
    """Each tier answers its part of the failures: memory `memory_share` (0 to 1), the disk the rest."""
    if not 0 <= memory_share <= 1:
        raise ValueError(f"memory_share is {memory_share}; it is a part of all failures, give 0 to 1")

    def interval(delta_s: float, share: float) -> float:
        return young(delta_s, mtbf_s / share) if share else math.inf

    return Tiers(interval(memory_delta_s, memory_share), interval(disk_delta_s, 1 - memory_share))


@dataclass(frozen=True, kw_only=True)
class Mtbf:
    """Estimate of the time between failures that starts from a guess and learns.

    The failure rate is Gamma(1 + failures, prior + uptime): the guess weighs as much as one failure.
    """

    prior_s: float
    failures: int = 0
    uptime_s: float = 0.0

    def __post_init__(self) -> None:
        _positive("prior_s", self.prior_s)

    @property
    def mean_s(self) -> float:
        """The estimate: one over the mean rate."""
        return (self.prior_s + self.uptime_s) / (1 + self.failures)

    def ran(self, seconds: float) -> "Mtbf":
        """After more time without a failure."""
        _not_negative("seconds", seconds)
        return replace(self, uptime_s=self.uptime_s + seconds)

    def failed(self) -> "Mtbf":
        """After one more failure."""
        return replace(self, failures=self.failures + 1)


def sliding_ettr(
    lost: Sequence[tuple[float, float]], *, began_s: float, now_s: float, window_s: float = 3600.0
) -> float:
    """Share of the last `window_s` (or of the time since `began_s`) that trained.

    `lost` are (begin, end) of the times that did not, in any order, which may overlap; all on one clock.
    """
    start = max(began_s, now_s - window_s)
    if now_s <= start:
        return 1.0
    at, gone = start, 0.0
    for begin, end in sorted(lost):
        begin, end = max(begin, at), min(end, now_s)
        if end > begin:
            gone, at = gone + end - begin, end
    return 1 - gone / (now_s - start)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; give a time above 0")


def _not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} is {value}; give 0 or more")
