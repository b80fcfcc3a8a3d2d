"""State at rest as boxes: whatever cut the tensors that a rank holds, they come back under any other cut.

Arrangements are laid by hand here, of two modules as two pipeline stages, of pieces as tensor parallelism
cuts them, and of FSDP's own cut inside: uneven everywhere, some ranks without a part.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from plain import as_sharded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import checkpoint_values

from rayfold.parallel.layout import Layout
from rayfold.parallel.mesh import Axis, make_mesh
from rayfold.parallel.model import Held
from rayfold.parallel.parallelize import parallelize
from rayfold.parallel.tensor import Piece
from rayfold.runtime.checkpoint.checkpoint import Checkpointer, Loaded
from rayfold.runtime.checkpoint.format import Index, read_index, write_index
from rayfold.runtime.checkpoint.shelf import Shelf
from rayfold.runtime.optim.adamw import ShardedAdamW
from rayfold.runtime.optim.config import OptimConfig
from rayfold.runtime.part import Part
from rayfold.runtime.progress import Progress
from rayfold.runtime.state import TrainState

# name: (shape, the dim that tensor parallelism deals out, the stages that hold it)
TENSORS: dict[str, tuple[tuple[int, ...], int | None, tuple[int, ...]]] = {
    "rows": ((7, 5), 0, (0,)),
    "columns": ((5, 7), 1, (1,)),
    "norm": ((6,), None, (0,)),
    "few": ((3, 2), 0, (1,)),  # two pieces of two rows and one: over two shards a rank holds nothing
    "one": ((1,), None, (1,)),
    "tied": ((9, 4), 0, (0, 1)),  # as a tied embedding: the first and the last stage hold it
}


@dataclass(frozen=True)
class Arrangement:
    """How many ways each axis cuts; with one rank for all stages it holds shared names twice."""

    replicate: int = 1
    shard: int = 1
    tp: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.tp * self.pp

    def __str__(self) -> str:
        return "-".join(f"{axis}{size}" for axis, size in vars(self).items() if size > 1) or "alone"


ARRANGEMENTS = [
    Arrangement(),
    Arrangement(tp=2),
    Arrangement(shard=4),
    Arrangement(tp=4),
    Arrangement(shard=2, tp=2),
    Arrangement(pp=2),
    Arrangement(tp=2, pp=2),
    Arrangement(replicate=2, tp=2),
    Arrangement(shard=2, pp=2),
    Arrangement(replicate=4),
]


def expected(name: str) -> torch.Tensor:
    """The whole tensor of a name at rest: every number tells the tensor and its place."""
    shape = TENSORS[name.rpartition(".")[2]][0]
    salt = sum(name.encode())
    return torch.arange(float(torch.Size(shape).numel())).view(shape) + salt * 1000


def make_state(arrangement: Arrangement) -> TrainState:
    """The state of this rank, all of it no number yet."""
    names = ("pp", "replicate", "shard", "tp")
    sizes = tuple(getattr(arrangement, name) for name in names)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    stages = (0, 1) if arrangement.pp == 1 else (mesh.get_local_rank("pp"),)
    parts: list[nn.Module] = []
    held = []
    for stage in stages:
        part = nn.Module()
        pieces = {}
        for name, (shape, dim, places) in TENSORS.items():
            if stage in places:
                pieces[name] = piece = piece_of(shape, dim, arrangement.tp, mesh.get_local_rank("tp"))
                sizes = list(shape) if dim is None else [*shape[:dim], piece[1], *shape[dim + 1 :]]
                part.register_parameter(name, nn.Parameter(torch.full(sizes, torch.nan)))
        fully_shard(part, mesh=mesh["replicate", "shard"])
        parts.append(part)
        held += [
            Held(name=name, parameter=parameter, piece=pieces[name][0], counted=1.0)
            for name, parameter in part.named_parameters()
        ]
    model = replace(as_sharded(parts[0]), parts=parts, held=held)
    state = TrainState(model, ShardedAdamW(model, OptimConfig()), Progress())
    for box in state.parts():
        box.tensor.fill_(torch.nan)
    return state


def piece_of(shape: tuple[int, ...], dim: int | None, tp: int, rank: int) -> tuple[Piece, int]:
    """The piece of a tensor parallel rank, and its size along the dim that is cut."""
    if dim is None:
        return Piece(shape, (0,) * len(shape), False), 0
    size = -(-shape[dim] // tp)
    first = min(rank * size, shape[dim])
    offsets = tuple(first if d == dim else 0 for d in range(len(shape)))
    return Piece(shape, offsets, True), min(size, shape[dim] - first)


def make_checkpointer(folder: Path) -> Checkpointer:
    return Checkpointer(
        Shelf(folder, keep=2),
        everyone=Axis("world", dist.get_world_size(), dist.get_rank(), dist.group.WORLD),
        group=dist.new_group(backend="gloo"),
        device=torch.device("cpu"),
        on_commit=lambda step, seconds: None,
    )


def fill(part: Part) -> None:
    part.tensor.copy_(expected(part.name)[part.box])


def save(folder: Path, arrangement: Arrangement) -> None:
    """One checkpoint, of step 5, written by all ranks of `arrangement`."""

    def on_rank() -> None:
        state, checkpointer = make_state(arrangement), make_checkpointer(folder)
        for part in state.parts():
            fill(part)
        state.progress = Progress(step=5, cursor=40, tokens=7)
        checkpointer.save(state)
        checkpointer.wait()

    run_ranks(arrangement.ranks, on_rank)


def load(folder: Path, arrangement: Arrangement) -> list[dict[str, int]]:
    """Load it; how often each rank holds each name. Every number of every box must be that of the whole."""

    def on_rank() -> dict[str, int]:
        state = make_state(arrangement)
        assert make_checkpointer(folder).load(state) == Loaded(5)
        assert state.progress == Progress(step=5, cursor=40, tokens=7)
        counts: dict[str, int] = {}
        for part in state.parts():
            assert torch.equal(part.tensor, expected(part.name)[part.box]), (part.name, part.offsets)
            counts[part.name] = counts.get(part.name, 0) + bool(part.tensor.numel())
        return counts

    return run_ranks(arrangement.ranks, on_rank)


def cycled(values: list[Arrangement], step: int) -> list[tuple[Arrangement, Arrangement]]:
    """Each with the one that comes `step` later."""
    return [(a, values[(n + step) % len(values)]) for n, a in enumerate(values)]


@pytest.mark.parametrize(("source", "target"), cycled(ARRANGEMENTS, 3), ids=str)
def test_what_one_arrangement_saves_any_other_loads(
    source: Arrangement, target: Arrangement, tmp_path: Path
) -> None:
    """Rows, columns, pieces of pieces: model and moments come back number by number."""
    save(tmp_path, source)
    load(tmp_path, target)


@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)
def test_every_number_is_written_once_and_all_ranks_write(arrangement: Arrangement, tmp_path: Path) -> None:
    """Copies over replicas, tensor parallel ranks and stages are one on disk, and no rank writes for all."""
    save(tmp_path, arrangement)
    folder = tmp_path / "step-00000005"
    _, values = checkpoint_values(folder)
    assert len(values) == 3 * len(TENSORS)
    for name, value in values.items():
        assert torch.equal(torch.from_numpy(value), expected(name)), name
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.bin"))]
    assert sum(sizes) == 4 * sum(value.size for value in values.values())
    assert len(sizes) == arrangement.ranks
    assert min(sizes) > 0


def test_a_name_held_twice_is_filled_twice(tmp_path: Path) -> None:
    """A rank with the first and the last stage has two copies of a tied embedding; both must go on."""
    save(tmp_path, Arrangement(pp=2))
    [counts] = load(tmp_path, Arrangement())
    twice = {name for name, count in counts.items() if count == 2}
    assert twice == {"model.tied", "optim.exp_avg.tied", "optim.exp_avg_sq.tied"}


def test_the_arrangements_are_uneven(tmp_path: Path) -> None:
    """The tests above say something about empty boxes only where a rank has one."""
    save(tmp_path, Arrangement())
    counts = load(tmp_path, Arrangement(shard=2, tp=2))
    assert [count["model.few"] for count in counts] == [1, 1, 1, 0]


class Buffered(nn.Module):
    """A custom model with a buffer that belongs to its state, and a table that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.ones(4, dtype=torch.complex64), persistent=False)


def test_buffers_are_kept_where_the_model_keeps_them(tmp_path: Path) -> None:
    """Counts and running means are state; a table that the model makes anew may be of any dtype."""

    def on_rank() -> int:
        mesh = make_mesh(Layout(dp_replicate=1, dp_shard=2), torch.device("cpu"))
        models = [parallelize(Buffered, mesh, seed=0) for _ in range(2)]
        saved, loaded = (TrainState(m, ShardedAdamW(m, OptimConfig()), Progress(step=5)) for m in models)
        saved.model.buffers["seen"].fill_(17)
        checkpointer = make_checkpointer(tmp_path)
        checkpointer.save(saved)
        checkpointer.wait()
        assert checkpointer.load(loaded) == Loaded(5)
        return int(models[1].parts[0].get_buffer("seen"))

    assert run_ranks(2, on_rank) == [17, 17]
    names = {"model.weight", "model.seen", "optim.exp_avg.weight", "optim.exp_avg_sq.weight"}
    assert read_index(tmp_path / "step-00000005").tensors.keys() == names


def reseal(folder: Path, change: Callable[[Index], Index]) -> None:
    write_index(folder, change(read_index(folder)))


def test_a_checkpoint_with_a_hole_is_refused(tmp_path: Path) -> None:
    """An index that is sealed and still misses a box must not leave old numbers where new ones belong."""
    save(tmp_path, Arrangement(shard=2, tp=2))

    def without_a_chunk(index: Index) -> Index:
        entry = index.tensors["model.tied"]
        return replace(index, tensors=index.tensors | {"model.tied": replace(entry, chunks=entry.chunks[1:])})

    reseal(tmp_path / "step-00000005", without_a_chunk)
    with pytest.raises(AssertionError, match=r"NoCheckpointLeft: .* the chunks of model\.tied hold"):
        load(tmp_path, Arrangement())


def test_what_one_stage_misses_all_ranks_hear(tmp_path: Path) -> None:
    """Ranks hold different names: the one that misses one must not leave the others in a collective."""
    save(tmp_path, Arrangement())

    def without_columns(index: Index) -> Index:
        tensors = {name: entry for name, entry in index.tensors.items() if name != "model.columns"}
        return replace(index, tensors=tensors)

    reseal(tmp_path / "step-00000005", without_columns)

    def on_rank() -> str:
        try:
            make_checkpointer(tmp_path).load(make_state(Arrangement(pp=2)))
        except RuntimeError as error:
            return f"{type(error).__name__}: {error}"
        return "loaded"

    first, last = run_ranks(2, on_rank)
    assert first == last
    assert "CheckpointMismatch" in first
    assert "model.columns" in first
