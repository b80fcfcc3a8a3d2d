"""Where the state of a rank comes from when an attempt begins, and how it gets there.

Every rank says what images it can reach; all see the same list and choose the same step
(`faulttol/choice.py`). A rank whose arena is at that step adopts it: nothing is copied. Another fills its
tensors from a slot, its own or one of a rank that holds the same, under another layout from all images. What
turns out to be damaged is struck from the list, and all choose again. Nothing that others may need is
overwritten before they have it.
"""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ..faulttol.arena import ALIGNMENT, Arena
from ..faulttol.choice import Choice, Offer, Source, choose
from ..faulttol.header import ImageError
from ..faulttol.listing import Listed, images_in
from ..faulttol.vault import RankFiles
from ..kernels.adamw import moment_dtype
from ..parallel.collectives import gather_json
from ..parallel.folding import coordinate, dense_view
from ..parallel.layout import Layout
from ..parallel.mesh import FoldedMesh
from ..parallel.model import Sharded
from .checkpoint.planners import PartLoadPlanner, by_name
from .images import ImagesLost, ImagesReader, fill_from, read_catalogue
from .optim.adamw import ShardedAdamW, memory_needed
from .optim.shards import Memory
from .part import local_of
from .place import SnapshotPlace
from .progress import Progress
from .state import TrainState

logger = logging.getLogger(__name__)

Needed: TypeAlias = Sequence[tuple[int, torch.dtype]]  # what a state takes of a memory, in order

_ROUNDS = 64  # of choosing again; each strikes at least one image


@dataclass
class Found:
    """What all ranks can reach; the same on all of them."""

    sources: list[Source] = field(default_factory=list)  # `where` is known to all, `rank` is whose it is
    nodes: list[str] = field(default_factory=list)  # of each rank of this attempt
    began: dict[int, int] = field(default_factory=dict)  # epoch -> step that it started from
    newest: int = 0
    twins: dict[tuple[str, int], int] = field(default_factory=dict)  # first rank with the same boxes
    copies: dict[str, int] = field(default_factory=dict)  # ranks that hold the same, by fingerprint

    def strike(self, gone: Iterable[Source]) -> None:
        """Forget what cannot be read."""
        lost = {(source.where, source.step) for source in gone}
        self.sources = [source for source in self.sources if (source.where, source.step) not in lost]

    def covers(self, fingerprint: str, ranks: frozenset[int]) -> bool:
        """Whether `ranks` of a layout hold the whole state."""
        different = {self.twins.get((fingerprint, rank), rank) for rank in ranks}
        [size] = {s.world_size for s in self.sources if s.fingerprint == fingerprint}
        return len(different) * self.copies.get(fingerprint, 1) == size


def look_around(place: SnapshotPlace, mesh: FoldedMesh) -> Found:
    """Every image that some rank can reach. All ranks call it."""
    listed = [*images_in(place.folder, run=place.run, node=place.node), *place.elsewhere]
    own = {"node": place.node, "newest": place.newest, "images": [image.to_json() for image in listed]}
    found = Found(began=dict(place.began))
    known: set[tuple[str, int]] = set()
    for told in gather_json(own, mesh.world, mesh.device):
        found.nodes.append(told["node"])
        found.newest = max(found.newest, told["newest"])
        for image in map(Listed.from_json, told["images"]):
            source = image.source
            if (source.where, source.step) in known:  # ranks of one node tell the same
                continue
            known.add((source.where, source.step))
            found.sources.append(source)
            found.twins[source.fingerprint, source.rank] = image.twin
            found.copies[source.fingerprint] = image.copies
            found.began |= {int(epoch): step for epoch, step in image.began.items()}
    return found


def twin_of(layout: Layout, rank: int) -> int:
    """The first rank that holds the same boxes as `rank`: replicas do."""
    view = dense_view(layout)

    def boxes(rank: int) -> dict[str, int]:
        return {axis: at for axis, at in coordinate(view, rank).items() if axis != "dp_replicate"}

    return next(other for other in range(rank + 1) if boxes(other) == boxes(rank))


def fingerprint_of(model: Sharded, needed: Needed | None) -> str:
    """Digest, for all ranks, of the layout, of what each holds in it and of how its memory is allocated."""
    mesh = model.mesh
    boxes = [(held.name, held.shape, *held.box(), str(held.parameter.dtype)) for held in model.held]
    boxes += [(name, *buffer.shape, str(buffer.dtype)) for name, buffer in model.buffers.items()]
    own = _digest([boxes, [(numel, str(dtype)) for numel, dtype in needed or ()]])
    every = gather_json(own, mesh.world, mesh.device)
    return _digest([asdict(mesh.layout), every])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def room_for(needed: Needed) -> int:
    """Bytes that an arena must have for all of it."""
    return sum(-(-numel * dtype.itemsize // ALIGNMENT) * ALIGNMENT for numel, dtype in needed)


@dataclass(frozen=True)
class RankRoom:
    """The files that a rank was given, or why it has none."""

    files: RankFiles | None = None
    needed: Needed | None = None  # what the state takes of the arena; None: it cannot lie in one
    reason: str | None = None


def reserve_room(model: Sharded, place: SnapshotPlace) -> RankRoom:
    """Files for the state of `model` on this rank; what lies in them stays until something is taken."""
    on_host = model.mesh.device.type == "cpu"
    needed = memory_needed(model) if on_host else None
    try:
        files = place.reserve(model.mesh.world.rank, room_for(needed) if needed else state_bytes(model))
    except (OSError, ImageError) as error:
        return RankRoom(reason=f"rank {model.mesh.world.rank}: {error}")
    return RankRoom(files, needed)


def state_bytes(model: Sharded) -> int:
    """At most what a copy of the state takes, tensor by tensor."""
    sizes = []
    for held in model.held:
        local = local_of(held.parameter)
        moment = moment_dtype(local.dtype).itemsize if held.parameter.requires_grad else 0
        sizes += [local.numel() * local.itemsize, local.numel() * moment, local.numel() * moment]
    sizes += [buffer.numel() * buffer.itemsize for buffer in model.buffers.values()]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def on_disk(steps: Sequence[int]) -> list[Source]:
    """Checkpoints as sources for every rank."""
    return [Source(kind="disk", step=step, fingerprint="", where=f"checkpoint {step}") for step in steps]


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What a rank begins with, and where it came from."""

    state: TrainState
    fingerprint: str
    choice: Choice | None  # None: there was nothing, the numbers are the first
    began: dict[int, int]  # epoch -> step that it started from
    newest: int  # step that somebody had finished
    line: Mapping[str, Any] | None = None  # of metrics, of the step that the image is of


@dataclass(frozen=True, kw_only=True)
class Makers:
    """How a rank comes to a state."""

    build: Callable[[], Sharded]  # without numbers, where a model can be without
    start: Callable[[Sharded], None]  # draws or reads the first numbers
    optimize: Callable[[Sharded, Memory | None], ShardedAdamW]
    load_checkpoint: Callable[[TrainState], int | None]  # the newest whole one on disk: its step


class Restorer:
    """Brings the state of all ranks back; `run` is called by all of them."""

    def __init__(
        self,
        place: SnapshotPlace,
        mesh: FoldedMesh,
        found: Found,
        makers: Makers,
    ) -> None:
        self._place, self._mesh, self._found, self._make = place, mesh, found, makers
        self._rank = mesh.world.rank
        self._said: Mapping[str, Any] = {}  # by the image that was used, beside its data

    def run(self, model: Sharded, needed: Needed | None, arena: Arena | None) -> Restored:
        """Bring `model`, just built, to the newest step that all ranks can reach.

        It lies in `arena` afterwards, if there is one; `needed` is all that it takes of it.
        """
        fingerprint = fingerprint_of(model, needed)
        self._needed, self._arena = needed or (), arena
        state: TrainState | None = None
        newest = self._found.newest
        for _ in range(_ROUNDS):
            choice = self._choose(fingerprint)
            newest = max(newest, choice.newest if choice is not None else 0)
            if choice is None:
                state = self._anew(model if state is None else self._make.build())
                break
            gone: list[Source] = []
            if state is None:
                state, gone = self._first_state(model, choice, fingerprint)
            gone += self._fill(choice, state)
            told = gather_json([asdict(source) for source in gone], self._mesh.world, self._mesh.device)
            struck = [Source(**values) for values in itertools.chain.from_iterable(told)]
            self._found.strike(struck)
            used = {(source.where, source.step) for source in (*choice.sources.values(), *choice.images)}
            if not any((source.where, source.step) in used for source in struck):
                break
        else:
            raise ImagesLost(
                f"no state could be read from {self._place.folder} in {_ROUNDS} rounds; empty the folder to "
                "go on from the last checkpoint"
            )
        if choice is not None and choice.load and arena is not None:
            # every rank has what it needs of the images by now, so they may be overwritten
            state = self._moved(state, arena)
        began = self._found.began | {self._place.epoch: choice.step if choice else 0}
        return Restored(
            state=state,
            fingerprint=fingerprint,
            choice=choice,
            began=began,
            newest=newest,
            line=self._said.get("line"),
        )

    def _choose(self, fingerprint: str) -> Choice | None:
        layout, nodes = self._mesh.layout, self._found.nodes
        twins = [twin_of(layout, rank) for rank in range(layout.world_size)]
        offers: list[list[Source]] = [[] for _ in twins]
        for source in self._found.sources:
            if source.kind == "disk":
                for offer in offers:
                    offer.append(source)
            elif source.fingerprint == fingerprint and 0 <= source.rank < len(twins):
                for rank, twin in enumerate(twins):
                    if twin == twins[source.rank]:
                        near = rank == source.rank and source.where.startswith(f"{nodes[rank]}:")
                        kind = "peer" if not near and source.tier == "memory" else source.kind
                        offers[rank].append(replace(source, kind=kind, rank=rank))
            else:
                offers[0].append(source)
        return choose(
            [Offer(rank=rank, sources=tuple(sources)) for rank, sources in enumerate(offers)],
            fingerprint=fingerprint,
            newest=self._found.newest,
            began=self._found.began,
            covers=self._found.covers,
        )

    def _anew(self, model: Sharded) -> TrainState:
        if self._arena is not None:
            self._arena.rewind()
        state = TrainState(model, self._make.optimize(model, self._arena), Progress())
        self._make.start(model)
        return state

    def _first_state(
        self, model: Sharded, choice: Choice, fingerprint: str
    ) -> tuple[TrainState, list[Source]]:
        """The state, over adopted numbers or over none, and the images that are no more because of it."""
        arena = None if choice.load else self._arena
        gone = []
        if arena is not None and not (self._is_own_arena(choice) and arena.adopt(fingerprint)):
            own = self._place.where(arena.path)
            gone = [source for source in self._found.sources if source.where == own]
        return TrainState(model, self._make.optimize(model, arena), Progress()), gone

    def _is_own_arena(self, choice: Choice) -> bool:
        source = choice.sources.get(self._rank)
        return (
            source is not None
            and self._arena is not None
            and not any(other.kind == "disk" for other in choice.sources.values())
            and source.where == self._place.where(self._arena.path)
        )

    def _fill(self, choice: Choice, state: TrainState) -> list[Source]:
        """Bring `state` to the chosen step; what could not be read for it."""
        if self._is_own_arena(choice) and self._arena is not None and self._arena.adopted:
            self._set_progress(state, self._arena.record.progress)
            return []
        if self._arena is not None and self._arena.used:
            self._give_up(self._arena)
        if choice.load:
            return self._load_images(choice, state)
        if any(source.kind == "disk" for source in choice.sources.values()):
            step = self._make.load_checkpoint(state)
            return [s for s in self._found.sources if s.kind == "disk" and s.step > (step or 0)]
        source = choice.sources[self._rank]
        try:
            image = self._place.open(source.where)
            if image.step != choice.step:
                raise ImagesLost(f"{source.where} is at step {image.step} by now, not {choice.step}")
            fill_from(image, state.parts())
        except (ImageError, ImagesLost, OSError) as error:
            logger.warning("rank=%d step=%d image lost: %s", self._rank, choice.step, error)
            return [source]
        self._set_progress(state, image.progress)
        return []

    def _set_progress(self, state: TrainState, said: Mapping[str, Any]) -> None:
        state.set_progress(asdict(Progress.among(said)))
        self._said = said

    def _give_up(self, arena: Arena) -> None:
        """Call what lies in the arena, and is about to be overwritten, nothing."""
        arena.rewind()
        for numel, dtype in self._needed:
            arena.take(numel, dtype)  # the same pieces again: the tensors that have them stay right

    def _load_images(self, choice: Choice, state: TrainState) -> list[Source]:
        try:
            catalogue = read_catalogue(choice.images, self._place, self._mesh)
            dcp.load(
                by_name(state.parts()),
                storage_reader=ImagesReader(catalogue, self._place),
                planner=PartLoadPlanner(),
                process_group=self._mesh.world.group,
            )
        except ImagesLost as error:
            return self._lost(choice, [error])
        except CheckpointException as error:
            return self._lost(choice, [cause for cause, _ in error.failures.values()])
        self._set_progress(state, next(iter(catalogue.values())).progress)
        return []

    def _lost(self, choice: Choice, causes: Sequence[BaseException]) -> list[Source]:
        """The images to blame; all of them where that is not known."""
        logger.warning("rank=%d step=%d images lost: %s", self._rank, choice.step, causes[0])
        blamed = {where for cause in causes if isinstance(cause, ImagesLost) for where in cause.where}
        return [image for image in choice.images if not blamed or image.where in blamed]

    def _moved(self, state: TrainState, arena: Arena) -> TrainState:
        """The same state over the arena."""
        arena.rewind()
        optimizer = self._make.optimize(state.model, arena)
        for new, old in zip(optimizer.parts(), state.optimizer.parts(), strict=True):
            new.tensor.copy_(old.tensor)
        optimizer.set_steps(state.progress.step)
        return TrainState(state.model, optimizer, state.progress)
