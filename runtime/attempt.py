"""The beginning of an attempt with snapshots: room for them, the newest state of all, and its guard."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..faulttol.arena import Arena
from ..faulttol.slots import Slots
from ..parallel.collectives import gather_json
from ..parallel.mesh import FoldedMesh
from .config import RunConfig
from .place import SnapshotPlace
from .progress import Progress
from .restore import Found, Makers, Restored, Restorer, reserve_room
from .snapshots import Snapshots
from .state import TrainState


class NoRoomForSnapshots(RuntimeError):
    """Snapshots were asked for by name, and a node has no memory for them."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """What an attempt starts with, and what there is to tell about it."""

    state: TrainState
    snapshots: Snapshots | None  # None where there is no room for them
    no_room: str | None = None
    untold: list[dict[str, Any]] = field(default_factory=list)  # lines that died before they were recorded
    restored: dict[str, Any] | None = None  # fields of the event; None for a first start and for a checkpoint


def begin(
    mesh: FoldedMesh,
    place: SnapshotPlace,
    found: Found,
    config: RunConfig,
    makers: Makers,
    *,
    lines: Iterable[Mapping[str, Any]],
) -> Begun:
    """Bring back the newest state; all ranks call it. `lines` are the metrics that this process knows.

    Raises NoRoomForSnapshots on all ranks when one has none and the configuration insists.
    """
    model = makers.build()
    room = reserve_room(model, place)
    reasons = [r for r in gather_json(room.reason, mesh.world, mesh.device) if r is not None]
    if room.files is None or reasons:
        if config.snapshot.enabled is True:
            raise NoRoomForSnapshots(
                f"snapshot.enabled = true, and there is no memory for snapshots: {reasons[0]}. Or set "
                'snapshot.enabled="auto" to train without them'
            )
        state = TrainState(model, makers.optimize(model, None), Progress())
        if makers.load_checkpoint(state) is None:
            makers.start(model)
        return Begun(state=state, snapshots=None, no_room=reasons[0])
    arena = Arena.open(room.files.arena) if room.needed is not None else None
    restored = Restorer(place, mesh, found, makers).run(model, room.needed, arena)
    slots = Slots.open(room.files.slots)
    every = config.checkpoint.every
    # a step that the run has lost before it was written, or none of several slots held any more
    missed = bool(every) and restored.state.progress.step // every * every > place.durable
    return Begun(
        state=restored.state,
        snapshots=Snapshots(
            restored, mesh, place, config=config.snapshot, arena=arena, slots=slots, due=missed
        ),
        untold=_untold(mesh, restored, place, lines),
        restored=_event(restored),
    )


def _untold(
    mesh: FoldedMesh, restored: Restored, place: SnapshotPlace, lines: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Steps up to the restored one that are in no record, as whoever is left knows them: in order."""
    own = [*lines, *([restored.line] if restored.line is not None else [])]
    upto, after = restored.state.progress.step, place.recorded
    missing = [dict(line) for line in own if after is not None and after < line["step"] <= upto]
    known: dict[int, dict[str, Any]] = {}
    for told in gather_json(missing, mesh.world, mesh.device):
        for line in told:
            known.setdefault(line["step"], line)
    return [known[step] for step in sorted(known)]


def _event(restored: Restored) -> dict[str, Any] | None:
    choice, step = restored.choice, restored.state.progress.step
    if (choice is None and not restored.newest) or (choice is not None and choice.tier == "disk"):
        return None  # a checkpoint is told when it is loaded
    source = "start" if choice is None else choice.tier
    return {"source": source, "from_step": step, "lost_steps": restored.newest - step}
