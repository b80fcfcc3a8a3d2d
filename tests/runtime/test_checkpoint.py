"""Checkpoints: what was saved comes back, what was damaged never does, and a kill costs nothing.

Everything runs on the real path: torch's planners over real gloo ranks and a real folder.
"""

import ast
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from rayfold.models.llama import Llama
from rayfold.models.llama_config import LlamaShape
from rayfold.parallel.layout import Layout
from rayfold.parallel.mesh import Axis, make_mesh
from rayfold.parallel.parallelize import parallelize
from rayfold.runtime.checkpoint.checkpoint import Checkpointer, Loaded, NoCheckpointLeft
from rayfold.runtime.checkpoint.format import read_index
from rayfold.runtime.checkpoint.shelf import Shelf
from rayfold.runtime.optim.adamw import ShardedAdamW
from rayfold.runtime.optim.config import OptimConfig
from rayfold.runtime.progress import Progress
from rayfold.runtime.state import TrainState

PACKAGE = Path(__file__).parents[2]
FOLDERS = ("cluster", "faulttol", "kernels", "models", "parallel", "runtime")
SHAPE = LlamaShape(dim=16, layers=1, heads=2, kv_heads=1, ffn_dim=7, vocab_size=31)
TWO = Layout(dp_replicate=1, dp_shard=2)


def make_state(layout: Layout) -> TrainState:
    """A small state over the ranks of the default group."""
    model = parallelize(lambda: Llama(SHAPE), make_mesh(layout, torch.device("cpu")), seed=0)
    return TrainState(model, ShardedAdamW(model, OptimConfig()), Progress())


def stamp(state: TrainState, step: int) -> None:
    """Make every number of the state tell the step and the tensor, so that any mix of two saves shows."""
    for number, part in enumerate(state.parts()):
        part.tensor.fill_(step + number / 1000)
    state.progress = Progress(step=step, cursor=8 * step, tokens=100 * step)


def is_stamped(state: TrainState, step: int) -> bool:
    """Whether the state is that of `step`, whole."""
    values = [
        bool((part.tensor == torch.tensor(step + number / 1000)).all())
        for number, part in enumerate(state.parts())
    ]
    return all(values) and state.progress == Progress(step=step, cursor=8 * step, tokens=100 * step)


def make_checkpointer(shelf: Shelf, commits: list[int] | None = None) -> Checkpointer:
    everyone = Axis("world", dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
    committed = [] if commits is None else commits
    return Checkpointer(
        shelf,
        everyone=everyone,
        group=dist.new_group(backend="gloo"),
        device=torch.device("cpu"),
        on_commit=lambda step, _: committed.append(step),
    )


def save_steps(folder: Path, steps: list[int], *, layout: Layout = TWO, keep: int = 3) -> None:
    """Write stamped checkpoints of `steps`, one after the other."""

    def on_rank() -> None:
        state, checkpointer = make_state(layout), make_checkpointer(Shelf(folder, keep=keep))
        for step in steps:
            stamp(state, step)
            checkpointer.save(state)
            checkpointer.wait()

    run_ranks(layout.world_size, on_rank)


def load(folder: Path, *, layout: Layout = TWO) -> Loaded | None:
    """Load the newest whole checkpoint on every rank and check that it is that of its step."""

    def on_rank() -> Loaded | None:
        state = make_state(layout)
        loaded = make_checkpointer(Shelf(folder, keep=3)).load(state)
        assert loaded is None or is_stamped(state, loaded.step), "a mix of checkpoints was loaded"
        return loaded

    results = run_ranks(layout.world_size, on_rank)
    assert all(result == results[0] for result in results)
    return results[0]


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def damage(folder: Path, rng: random.Random) -> str:
    """Flip one bit of a file of the checkpoint, cut its tail off, or remove it; says what was done."""
    file = rng.choice([path for path in sorted(folder.iterdir()) if path.stat().st_size])
    size = file.stat().st_size
    kind = rng.choices(["flip", "cut", "remove"], weights=[10, 5, 1])[0]
    if kind == "flip":
        bit = rng.randrange(8 * size)
        flip_bit(file, bit)
        return f"bit {bit} of {file.name} flipped"
    if kind == "cut":
        # the line end of the index is the one byte without a meaning
        kept = rng.randrange(size - 1)
        os.truncate(file, kept)
        return f"{file.name} cut to {kept} of {size} bytes"
    file.unlink()
    return f"{file.name} removed"


def refuse_all(folder: Path, *, count: int, seed: int) -> None:
    """Damage copies of the only checkpoint `count` times; each must be refused."""
    save_steps(folder / "whole", [4])

    def on_rank() -> list[str]:
        rng = random.Random(seed)
        state = make_state(Layout(dp_replicate=1, dp_shard=1))
        shelf = Shelf(folder / "damaged", keep=1)
        checkpointer = make_checkpointer(shelf)
        accepted = []
        for _ in range(count):
            shutil.rmtree(shelf.folder, ignore_errors=True)
            shutil.copytree(folder / "whole", shelf.folder)
            done = damage(shelf.path(4), rng)
            try:
                checkpointer.load(state)
            except NoCheckpointLeft:
                continue
            accepted.append(done)
        return accepted

    assert run_ranks(1, on_rank, timeout_s=110)[0] == []


def test_no_damage_is_ever_accepted(tmp_path: Path) -> None:
    """Disks flip bits and kills cut files short; a run must never go on from such numbers."""
    refuse_all(tmp_path, count=120, seed=0)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(1, 11))
def test_no_damage_is_ever_accepted_campaign(tmp_path: Path, seed: int) -> None:
    """The same with ten times as many draws."""
    refuse_all(tmp_path, count=400, seed=seed)


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)], ids=str)
def test_every_layout_loads_what_another_saved(tmp_path: Path, layout: tuple[int, int]) -> None:
    """One checkpoint serves any number of ranks: two shards save, any layout loads bit for bit."""
    save_steps(tmp_path, [3])
    replicate, shard = layout
    assert load(tmp_path, layout=Layout(dp_replicate=replicate, dp_shard=shard)) == Loaded(3)


def test_nothing_saved_is_no_error(tmp_path: Path) -> None:
    """A fresh run starts; only a buried one must not."""
    assert load(tmp_path / "none yet") is None


def test_a_damaged_newest_falls_back_and_says_so(tmp_path: Path) -> None:
    """The checkpoint before is worth more than a stop, and the user has to hear about the bad disk."""
    save_steps(tmp_path, [1, 2, 3])
    flip_bit(tmp_path / "step-00000003" / "rank-00001.bin", 40)
    loaded = load(tmp_path)
    assert loaded is not None
    assert loaded.step == 2
    [message] = loaded.damaged
    assert "step 3" in message
    assert "rank-00001.bin" in message


def test_all_damaged_is_an_error_and_no_fresh_start(tmp_path: Path) -> None:
    """Starting anew in silence would bury weeks of training under a new step 1."""
    save_steps(tmp_path, [1, 2])
    for step in (1, 2):
        os.truncate(tmp_path / f"step-{step:08d}" / "index.json", 100)
    with pytest.raises(AssertionError, match="NoCheckpointLeft: none of the checkpoints in"):
        load(tmp_path)


def test_another_format_version_is_refused_by_name(tmp_path: Path) -> None:
    """A file of a later program is no damage; the message has to tell the difference."""
    save_steps(tmp_path, [1])
    index = tmp_path / "step-00000001" / "index.json"
    text = index.read_text().replace('"version":1', '"version":2')
    body = text[text.index('"index":') + len('"index":') : -2]
    index.write_text(f'{{"sha256":"{hashlib.sha256(body.encode()).hexdigest()}","index":{body}}}\n')
    with pytest.raises(AssertionError, match="format version 2, this program reads 1"):
        load(tmp_path)


def test_leftovers_do_not_count_and_are_cleaned(tmp_path: Path) -> None:
    """What a kill left half written or half deleted is neither loaded nor kept."""
    save_steps(tmp_path, [1])
    for name in ("step-00000009.partial", "step-00000007.deleting"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    assert load(tmp_path) == Loaded(1)
    Shelf(tmp_path, keep=3).clear_leftovers()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_foreign_names_are_left_alone(tmp_path: Path) -> None:
    """A user's own copy beside the checkpoints is no checkpoint of the run, and nobody deletes it."""
    save_steps(tmp_path, [1])
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000009-best")
    shelf = Shelf(tmp_path, keep=1)
    shelf.clear_leftovers()
    assert shelf.steps() == [1]
    assert (tmp_path / "step-00000009-best" / "index.json").exists()


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    """Disks are finite; the newest stay, whatever order names sort in."""
    save_steps(tmp_path, [1, 9, 10, 11], keep=keep)
    assert Shelf(tmp_path, keep=keep).steps() == [11, 10][:keep]
    assert load(tmp_path) == Loaded(11)


def test_a_step_can_be_saved_again_over_a_damaged_one(tmp_path: Path) -> None:
    """After falling back, training reaches the same step again and must be able to keep it."""
    save_steps(tmp_path, [1, 2])
    flip_bit(tmp_path / "step-00000002" / "rank-00000.bin", 0)
    save_steps(tmp_path, [2])
    assert load(tmp_path) == Loaded(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(
    "obstruct",
    [
        lambda folder: (folder / "step-00000002.partial").write_text("in the way"),
        lambda folder: (folder / "step-00000002.partial" / "rank-00001.bin").mkdir(parents=True),
        lambda folder: (folder / "step-00000002.partial" / "index.json").mkdir(parents=True),
    ],
    ids=["folder", "one rank's file", "index"],
)
def test_a_failed_write_is_told_and_the_earlier_one_stands(
    tmp_path: Path, obstruct: Callable[[Path], Any]
) -> None:
    """A full or broken disk must not end the run, nor look like a checkpoint; the next save works again."""
    save_steps(tmp_path, [1])
    obstruct(tmp_path)

    def on_rank() -> tuple[str, bool, list[int]]:
        state, shelf = make_state(TWO), Shelf(tmp_path, keep=3)
        checkpointer = make_checkpointer(shelf)
        stamp(state, 2)
        checkpointer.save(state)
        raised = ""
        try:
            checkpointer.wait()
        except Exception as error:
            raised = type(error).__name__
        told_once = checkpointer.take_error() is not None and checkpointer.take_error() is None
        dist.barrier()
        standing = shelf.steps()
        dist.barrier()
        stamp(state, 3)
        checkpointer.save(state)
        checkpointer.wait()
        return raised, told_once, standing

    for raised, told_once, standing in run_ranks(2, on_rank):
        assert raised == "CheckpointNotWritten"
        assert told_once
        assert standing == [1]
    loaded = load(tmp_path)
    assert loaded == Loaded(3)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The copies belong to the writer: changing the state right after `save` must not reach the disk."""

    def on_rank() -> None:
        state, checkpointer = make_state(TWO), make_checkpointer(Shelf(tmp_path, keep=3))
        for step in (1, 2, 3):
            stamp(state, step)
            checkpointer.save(state)
            stamp(state, 99)
        checkpointer.wait()

    run_ranks(2, on_rank)
    assert load(tmp_path) == Loaded(3)
    flip_bit(tmp_path / "step-00000003" / "index.json", 80)
    loaded = load(tmp_path)
    assert loaded is not None
    assert loaded.step == 2


def test_nothing_at_rest_tells_the_layout(tmp_path: Path) -> None:
    """A key with a rank or a world size in it would tie the checkpoint to the ranks that wrote it."""
    save_steps(tmp_path / "two", [1])
    save_steps(tmp_path / "four", [1], layout=Layout(dp_replicate=2, dp_shard=2))
    two, four = (read_index(tmp_path / name / "step-00000001") for name in ("two", "four"))
    shapes = [{name: (t.dtype, t.shape) for name, t in index.tensors.items()} for index in (two, four)]
    assert shapes[0] == shapes[1]
    assert two.progress == four.progress
    keys = [*two.tensors, *two.progress]
    assert not [key for key in keys if any(word in key for word in ("rank", "world", "shard", "replica"))]


def test_replicas_are_written_once(tmp_path: Path) -> None:
    """Two copies of the model are one on disk, and both ranks do a part of the writing."""
    save_steps(tmp_path, [1], layout=Layout(dp_replicate=2, dp_shard=1))
    folder = tmp_path / "step-00000001"
    index = read_index(folder)
    numbers = sum(torch.Size(entry.shape).numel() for entry in index.tensors.values())
    sizes = [path.stat().st_size for path in sorted(folder.glob("*.bin"))]
    assert sum(sizes) == 4 * numbers
    assert min(sizes) > 0


def test_no_pickle_is_ever_read() -> None:
    """Loading a pickle runs whatever is in it, and its bytes have no checksum."""
    found = []
    for path in (p for folder in FOLDERS for p in (PACKAGE / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            )
            module = getattr(node, "module", None)
            if {"pickle", "cloudpickle", "dill"} & {*names, module}:
                found.append(f"{path}:{node.lineno} imports pickle")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "torch.load",
                "torch.save",
                "np.load",
            ):
                found.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    assert found == []


def _save_forever(folder: Path) -> None:
    os.setsid()  # a group of its own, so that one kill reaches every rank at the same instant

    def on_rank() -> None:
        state, checkpointer = make_state(TWO), make_checkpointer(Shelf(folder, keep=2))
        step = 0
        while True:
            step += 1
            stamp(state, step)
            checkpointer.save(state)

    run_ranks(2, on_rank, timeout_s=60)


def kill_while_saving(folder: Path, delay_s: float) -> None:
    """Kill both ranks some time after their first save; the newest committed checkpoint must be whole."""
    saver = multiprocessing.get_context("fork").Process(target=_save_forever, args=(folder,))
    saver.start()
    assert saver.pid is not None
    shelf = Shelf(folder, keep=2)
    deadline = time.monotonic() + 30
    while not shelf.steps() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay_s)
    os.killpg(saver.pid, signal.SIGKILL)
    saver.join()
    standing = shelf.steps()
    assert standing, "nothing was committed before the kill"
    assert load(folder) == Loaded(standing[0])


@pytest.mark.parametrize("delay_s", [random.Random(n).uniform(0, 0.3) for n in range(3)])
def test_a_kill_while_saving_costs_no_committed_checkpoint(tmp_path: Path, delay_s: float) -> None:
    """Kill -9 can come between any two instructions; what was renamed into place is whole."""
    kill_while_saving(tmp_path, delay_s)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(20))
def test_a_kill_while_saving_costs_no_committed_checkpoint_campaign(tmp_path: Path, seed: int) -> None:
    """The same at twenty other instants."""
    kill_while_saving(tmp_path, random.Random(1000 + seed).uniform(0, 0.5))


def test_the_index_is_plain_json(tmp_path: Path) -> None:
    """Anyone may read a checkpoint without this program: names, shapes and places in JSON."""
    save_steps(tmp_path, [1])
    body = json.loads((tmp_path / "step-00000001" / "index.json").read_text())["index"]
    assert body["progress"] == {"step": 1, "cursor": 8, "tokens": 100}
    entry = body["tensors"]["model.embedding.weight"]
    assert (entry["dtype"], entry["shape"]) == ("float32", [31, 16])
    assert [(c["offsets"], c["sizes"], c["file"]) for c in entry["chunks"]] == [
        ([0, 0], [16, 16], "rank-00000.bin"),
        ([16, 0], [15, 16], "rank-00001.bin"),
    ]
