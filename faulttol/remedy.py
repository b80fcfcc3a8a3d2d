"""What to do about a fault: put spares in, go on with fewer ranks, or stop and say why.

A policy: values in, a value out, so that a table can test it; the controller carries it out. The order of
preference is a spare in the lost rank's place (same numbers to the bit), then the largest smaller layout
that carries the same global batch, then the end of the run. Patience has bounds: an exception that comes back
at the same step is the user's, and a node that fails again and again gets no more ranks.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ..parallel.layout import Layout

FaultKind: TypeAlias = Literal["died", "stopped", "node", "exception", "preempted", "hang", "stuck", "oom"]
Legal: TypeAlias = Callable[[int], Sequence[Layout]]

_DID: dict[FaultKind, str] = {
    "died": "died",
    "stopped": "stopped",
    "node": "went down",
    "exception": "raised an exception",
    "preempted": "got notice to leave",
    "hang": "hung, alive but stuck,",
    "stuck": "was alive but stuck",
    "oom": "ran out of memory",
}
_BLAMES_NODE = frozenset({"died", "stopped", "node", "hang"})  # not the user's code, and no notice beforehand
_OF_THE_MOMENT = re.compile(r"0x[0-9a-fA-F]+|\d+")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Ranks that cannot go on, and why."""

    kind: FaultKind
    ranks: tuple[int, ...]  # empty where a node without ranks is lost
    step: int
    signature: str = ""  # of an exception, from `signature_of`; where a rank was stuck
    traceback: str = ""
    node: str = ""  # id of the node that is lost or announced to be; "" where only processes are
    homes: Mapping[int, str] = field(default_factory=dict)  # rank -> id of its node, for all ranks of the run
    time_s: float = 0.0  # on a clock that all faults of a run share

    @property
    def nodes(self) -> frozenset[str]:
        """Where it happened, as far as known."""
        return frozenset({self.node, *(self.homes.get(rank, "") for rank in self.ranks)} - {""})


@dataclass(frozen=True)
class Spare:
    """A warm process without a rank."""

    id: str
    node: str = ""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Where patience ends."""

    max_rounds: int = 5  # faults within one recovery
    same_step: int = 3  # times that one rank may die, hang, be stuck or have no memory at one step
    flaps: int = 3  # faults of one node within the window; 0: a node is never given up
    window_s: float = 600.0
    barren: int = 5  # faults within the window, on the only node, with less than a step between two; 0: any


@dataclass(frozen=True, kw_only=True)
class Replace:
    """The layout stays: these spares take the lost rank numbers. None after an exception: then the same
    processes try again.
    """

    spares: Mapping[int, Spare]  # by rank
    quarantined: tuple[str, ...] = ()  # nodes that get no more ranks
    sentence: str = ""


@dataclass(frozen=True, kw_only=True)
class Shrink:
    """A smaller layout: old rank `keep[i]` becomes rank i, behind them come the spares. Others wait."""

    layout: Layout
    keep: tuple[int, ...]
    spares: tuple[Spare, ...] = ()
    quarantined: tuple[str, ...] = ()
    sentence: str = ""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """The run ends with this sentence."""

    sentence: str
    traceback: str = ""
    quarantined: tuple[str, ...] = ()


Remedy: TypeAlias = Replace | Shrink | Stop


def remedy_for(
    fault: Fault,
    history: Sequence[Fault],
    *,
    layout: Layout,
    spares: Sequence[Spare],
    legal: Legal,
    round: int = 1,
    policy: Policy | None = None,
) -> Remedy:
    """Decide about `fault`, after the faults of `history`.

    `layout`: of the ranks of the fault. `legal(n)`: layouts of n ranks that carry the same global batch
    (`parallel.legal.legal_layouts`). `round`: 1 for the first fault of a recovery, one more for each
    that comes before training goes on. The spares are those that live now.
    """
    policy = policy or Policy()
    if stop := _out_of_patience(fault, history, round, policy) or _barren(fault, history, spares, policy):
        return stop
    if fault.kind == "exception":
        sentence = (
            f"{what_happened(fault)}; all ranks try again from the last step, and the same exception at "
            "this step once more ends the run"
        )
        return Replace(spares={}, sentence=sentence)
    shunned = flapping(fault, history, spares, policy)
    going = fault.nodes if fault.kind in ("node", "preempted") and fault.node else frozenset()
    usable = [spare for spare in spares if spare.node not in going | shunned]
    said = what_happened(fault) + "".join(
        f"; node {node} had {policy.flaps} faults or more in {policy.window_s:.0f} s and gets no more ranks"
        for node in sorted(shunned)
    )
    quarantined = tuple(sorted(shunned))
    if len(usable) >= len(fault.ranks):
        placed = _placed(fault, usable)
        who = ", ".join(f"{_spare(spare)} becomes rank {rank}" for rank, spare in placed.items())
        return Replace(spares=placed, quarantined=quarantined, sentence=f"{said}; {who or 'no rank is lost'}")
    return _shrunk(fault, layout, usable, len(spares), legal, said, quarantined)


def signature_of(kind: str, message: str, frames: Sequence[str]) -> str:
    """What is the same when the same exception comes again: its type, where it was raised, and its message
    without numbers (addresses, losses, times).
    """
    where = f" at {frames[-1]}" if frames else ""
    return f"{kind}{where}: {_OF_THE_MOMENT.sub('#', ' '.join(message.split()))}"


def what_happened(fault: Fault) -> str:
    """`rank 3 died at step 7`."""
    if not fault.ranks:
        return f"node {fault.node or '?'}, without ranks, {_DID[fault.kind]} at step {fault.step}"
    node = f" (node {fault.node})" if fault.node else ""
    signature = f" ({fault.signature})" if fault.signature else ""
    return f"{_ranks(fault.ranks)} {_DID[fault.kind]}{node}{signature} at step {fault.step}"


def flapping(
    fault: Fault, history: Sequence[Fault], spares: Sequence[Spare], policy: Policy
) -> frozenset[str]:
    """Nodes with too many faults within the window. Where that would leave no node of the run it is none: the
    only node there is may be bad, but there is no better one.
    """
    blamed = [f for f in (*history, fault) if f.kind in _BLAMES_NODE]
    recent = [f for f in blamed if fault.time_s - f.time_s <= policy.window_s]
    known = _nodes(fault, spares)
    bad = {n for n in known if policy.flaps and sum(n in f.nodes for f in recent) >= policy.flaps}
    return frozenset(bad if bad < known else ())


def _nodes(fault: Fault, spares: Sequence[Spare]) -> set[str]:
    return {*fault.homes.values(), *(spare.node for spare in spares)} - {""}


def _barren(fault: Fault, history: Sequence[Fault], spares: Sequence[Spare], policy: Policy) -> Stop | None:
    """The end of a run that only burns: its one node fails again and again, and training comes no further."""
    blamed = [f for f in (*history, fault) if f.kind in _BLAMES_NODE][-policy.barren :]
    nodes = _nodes(fault, spares)
    if not policy.barren or len(blamed) < policy.barren or blamed[-1] is not fault or len(nodes) > 1:
        return None
    seconds, steps = fault.time_s - blamed[0].time_s, fault.step - blamed[0].step
    if seconds > policy.window_s or steps >= policy.barren - 1:
        return None
    sentence = (
        f"{what_happened(fault)}: fault number {policy.barren} in {seconds:.0f} s, with {steps} steps of "
        "progress between them, and there is no other node to go to. Something is wrong with this one "
        "(memory, power, another program); the state before this step is kept"
    )
    return Stop(sentence=sentence, traceback=fault.traceback)


def _out_of_patience(fault: Fault, history: Sequence[Fault], round: int, policy: Policy) -> Stop | None:
    if fault.kind in ("exception", "stuck", "oom"):
        hint = {
            "exception": "The traceback says where; the",
            "oom": "Let it take less at once (batch.micro_size, parallel.recompute) or use more ranks; the",
        }.get(fault.kind, "The")
        for earlier in history:
            before = (earlier.kind, earlier.signature, earlier.step)
            if before == (fault.kind, fault.signature, fault.step):
                sentence = (
                    f"{what_happened(fault)}, as before: it comes back whenever this step is trained, so the "
                    f"run ends here. {hint} state before this step is kept"
                )
                return Stop(sentence=sentence, traceback=fault.traceback)
    if round > policy.max_rounds:
        sentence = (
            f"{what_happened(fault)}: fault number {round} before training went on, and "
            f"{policy.max_rounds} are borne. Something is wrong that replacing ranks does not mend; see the "
            "verdicts of this recovery"
        )
        return Stop(sentence=sentence, traceback=fault.traceback)
    for rank in fault.ranks if fault.kind in ("died", "hang", "stuck", "oom") else ():
        times = 1 + sum(f.kind == fault.kind and f.step == fault.step and rank in f.ranks for f in history)
        if times >= policy.same_step:
            sentence = (
                f"rank {rank} {_DID[fault.kind]} at step {fault.step}, {times} times now in as many "
                "processes: the step itself does it (memory, a kernel, the data). See the log of this rank"
            )
            return Stop(sentence=sentence, traceback=fault.traceback)
    return None


def _placed(fault: Fault, usable: Sequence[Spare]) -> dict[int, Spare]:
    """A spare for each lost rank: on its own node where there is one, as its memory lies there."""
    left, placed = list(usable), {}
    for rank in fault.ranks:
        if at_home := [s for s in left if s.node and s.node == fault.homes.get(rank)]:
            placed[rank] = at_home[0]
            left.remove(at_home[0])
    for rank in fault.ranks:
        if rank not in placed:
            placed[rank] = left.pop(0)
    return {rank: placed[rank] for rank in fault.ranks}


def _shrunk(
    fault: Fault,
    layout: Layout,
    usable: Sequence[Spare],
    waiting: int,
    legal: Legal,
    said: str,
    quarantined: tuple[str, ...],
) -> Remedy:
    survivors = [rank for rank in range(layout.world_size) if rank not in fault.ranks]
    at_most = min(len(survivors) + len(usable), layout.world_size - 1)
    short = f"{len(usable)} of {waiting} spares can be used" if waiting else "there is no spare"
    for size in range(at_most, 0, -1):
        if fitting := legal(size):
            smaller = min(fitting, key=lambda other: _distance(layout, other))
            return Shrink(
                layout=smaller,
                keep=tuple(survivors[:size]),
                spares=tuple(usable[: max(0, size - len(survivors))]),
                quarantined=quarantined,
                sentence=f"{said}; {short}, so the run goes on with {size} of {layout.world_size} ranks "
                "and the same global batch",
            )
    left = (
        f"no layout of up to {at_most} ranks carries the same global batch" if at_most else "no rank is left"
    )
    return Stop(
        sentence=f"{said}; {short}, and {left}. Give the run spares (snapshot.spares), or a batch.size that "
        "fewer ranks can share",
        traceback=fault.traceback,
        quarantined=quarantined,
    )


def _distance(now: Layout, other: Layout) -> tuple[int, int, int]:
    """How much of a layout changes: tensors cut as before come first, then as many copies as before."""
    cut = sum(getattr(now, axis) != getattr(other, axis) for axis in ("pp", "cp", "tp"))
    kinds = (now.context, now.schedule, now.stages_per_rank, now.stage_layers)
    same = kinds == (other.context, other.schedule, other.stages_per_rank, other.stage_layers)
    return cut, int(not same), int(now.dp_replicate != other.dp_replicate)


def _ranks(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _spare(spare: Spare) -> str:
    return f"spare {spare.id}" + (f" on node {spare.node}" if spare.node else "")
