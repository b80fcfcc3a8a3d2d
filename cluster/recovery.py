"""The values around a recovery: what a verdict is to the policy, which smaller runs are possible, where the
time went. No Ray here.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..faulttol.remedy import Fault, FaultKind, Legal, Remedy, Replace, Shrink, Stop, signature_of
from ..faulttol.verdict import Failure, Verdict
from ..parallel.layout import AXES, Layout
from ..parallel.legal import legal_layouts
from ..runtime.config import CustomModel
from ..runtime.plan import RunPlan, load_of

_KINDS: dict[str, FaultKind] = {
    "died": "died",
    "stopped": "stopped",
    "stuck": "stuck",
    "silent": "hang",
    "exception": "exception",
    "oom": "oom",
}


@dataclass
class Phases:
    """Seconds of a recovery by phase, from `since` on (unix time); times of the machine's own clock."""

    since: float
    seconds: dict[str, float] = field(default_factory=dict)
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun = self.since

    def end(self, name: str, at: float | None = None) -> None:
        """The phase `name` ends now, or ended at `at`; one that comes again adds to the first."""
        now = time.time() if at is None else at
        self.seconds[name] = self.seconds.get(name, 0.0) + max(0.0, now - self.since)
        self.since = max(self.since, now)

    def began_at(self, at: float) -> None:
        """The fault is found to have come at `at`, before the first phase was counted from."""
        first = next(iter(self.seconds), None)
        if first is not None:
            self.seconds[first] += max(0.0, self.begun - at)
            self.begun = min(self.begun, at)

    def as_fields(self) -> dict[str, float]:
        """As the fields of an event."""
        return {f"{name}_s": round(value, 6) for name, value in self.seconds.items()}


def fault_of(
    verdict: Verdict,
    failures: Sequence[Failure],
    *,
    nodes: Sequence[str],
    lost_nodes: Collection[str],
    uptime_s: float,
) -> Fault:
    """A verdict as the policy of remedies takes it; `nodes` are those of the ranks.

    An exception leaves its process alive. Where processes are gone as well, it is they that are the fault.
    """
    gone = sorted({failure.rank for failure in failures if failure.kind in ("died", "stopped")})
    kind, ranks = _KINDS[verdict.cls], verdict.ranks
    if gone:
        kind, ranks = ("stopped" if kind == "stopped" else "died"), gone
    node = next((nodes[rank] for rank in ranks if nodes[rank] in lost_nodes), "")
    first = next((failure for failure in failures if failure.rank in verdict.ranks), None)
    exception = kind in ("exception", "oom") and first is not None
    signature = ""
    if first is not None and exception:
        signature = signature_of(first.kind, first.message, first.frames)
    if first is not None and kind == "stuck":  # for how long, which its message says, is of the moment
        signature = f"in {first.frames[-1]}"
    return Fault(
        kind="node" if node else kind,
        ranks=tuple(ranks),
        step=verdict.step,
        signature=signature,
        traceback=first.traceback if exception and first else "",
        node=node,
        homes=dict(enumerate(nodes)),
        time_s=uptime_s,
    )


def legal_of(plan: RunPlan) -> Legal:
    """The layouts that a run could go on with on n ranks, of the same batch and in the same manner."""
    config = plan.config
    load, parallel = load_of(config), config.parallel

    def legal(ranks: int) -> list[Layout]:
        found = legal_layouts(
            load,
            world_size=ranks,
            contexts=(parallel.context,),
            schedules=(parallel.pipeline_schedule,),
            stages_per_rank=(parallel.stages_per_rank,),
        )
        # a model of the user's says only when it is built over what it can be split
        custom = isinstance(config.model, CustomModel)
        return [one for one in found if not custom or _splits_no_other_way(one, plan.layout)]

    return legal


def with_layout(plan: RunPlan, layout: Layout) -> RunPlan:
    """The same run on another layout."""
    parallel = replace(
        plan.config.parallel,
        **{axis: getattr(layout, axis) for axis in AXES},
        stages_per_rank=layout.stages_per_rank,
        stage_layers=layout.stage_layers,
    )
    run = replace(plan.config.run, workers=layout.world_size)
    return replace(plan, config=replace(plan.config, run=run, parallel=parallel), layout=layout)


def hopeless(verdict: Verdict, fault: Fault, *, world_size: int) -> Stop | None:
    """Stop when every rank of several raised the same: that follows from the data or the model, and comes
    back.
    """
    if fault.kind in ("exception", "oom") and world_size > 1 and len(verdict.ranks) == world_size:
        return Stop(sentence="all ranks raised the same exception, so it would come again")
    return None


def remedy_fields(remedy: Remedy, ids: Mapping[str, int]) -> dict[str, Any]:
    """A remedy as the fields of an event; `ids` are the process ids of spares by their names."""
    fields: dict[str, Any] = {"sentence": remedy.sentence}
    match remedy:
        case Replace(spares=spares):
            fields |= {"action": "replace", "ranks": sorted(spares)}
            fields |= {"pids": [ids[spares[rank].id] for rank in sorted(spares)]}
        case Shrink(layout=layout, keep=keep):
            fields |= {"action": "shrink", "layout": str(layout), "world_size": layout.world_size}
            fields |= {"kept_ranks": list(keep)}
        case Stop():
            fields |= {"action": "stop"}
    if remedy.quarantined:
        fields |= {"quarantined": list(remedy.quarantined)}
    return fields


def _splits_no_other_way(layout: Layout, current: Layout) -> bool:
    return all(getattr(layout, axis) in (1, getattr(current, axis)) for axis in ("tp", "cp", "pp"))
