"""Ranks are killed at the worst moments and the run goes on from memory: as if nothing had happened.

Promises: a kill outside the update loses no finished step, one inside it at most the step that was under way.
Either way the end is that of the run which was never killed, bit by bit, and no sample is counted twice.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lives import Fault, Life, Lives, die, final_samples
from training import checkpoint_values, events, metrics, samples_read, train_on_ranks, write_corpus

from rayfold.faulttol.header import CHUNK_BYTES, HEADER_BYTES
from rayfold.faulttol.image import inspect
from rayfold.faulttol.slots import Slot
from rayfold.faulttol.snapshot import Capture
from rayfold.faulttol.vault import RankFiles, VaultFull
from rayfold.runtime import restore as restore_module
from rayfold.runtime import trainer as trainer_module
from rayfold.runtime.optim import adamw as adamw_module
from rayfold.runtime.snapshots import how_often
from rayfold.runtime.trainer import Trainer

STEPS = 6
GIVEN = ("model.layers=4", "model.ffn_dim=48", "optim.eps=1e-2", "batch.micro_size=1", f"run.steps={STEPS}")
LAYOUTS = {
    "shard": ("parallel.dp_shard=2",),
    "replicate": ("parallel.dp_replicate=2", "parallel.dp_shard=1"),
    "tensor": ("parallel.tp=2", "parallel.dp_shard=1"),
    "pipeline": ("parallel.pp=2", "parallel.dp_shard=1"),
}
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.campaign) for seed in range(1, 4))]
TOLERANCE = 1e-5  # between layouts, as in test_resume.py


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def never_killed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run without snapshots and faults under a layout."""
    made: dict[str, Path] = {}

    def run(layout: str) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp(f"straight-{layout}")
            train_on_ranks(2, made[layout], source, *GIVEN, *LAYOUTS[layout])
        return made[layout]

    return run


@pytest.fixture
def lives(source: Path, tmp_path: Path) -> Iterator[Callable[..., Lives]]:
    made: list[Lives] = []

    def begin(*overrides: str) -> Lives:
        made.append(Lives(tmp_path, source, *GIVEN, *overrides))
        return made[-1]

    yield begin
    for each in made:
        each.close()


def in_backward(step: int) -> Fault:
    """Die halfway through the backward pass of `step`."""

    def arm(trainer: Trainer) -> None:
        plain = trainer_module.train_step

        def deadly(*args: Any, **kwargs: Any) -> Any:
            if trainer.step != step:
                return plain(*args, **kwargs)
            asked = itertools.count(1)

            def unpack(tensor: torch.Tensor) -> torch.Tensor:
                if next(asked) == 5:
                    die()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
                return plain(*args, **kwargs)

        trainer_module.train_step = deadly

    return arm


def in_update(step: int) -> Fault:
    """Die when the first of the buffers of `step` is updated and the others are not."""

    def arm(trainer: Trainer) -> None:
        plain = adamw_module.adamw_

        def deadly(*args: Any, **kwargs: Any) -> None:
            plain(*args, **kwargs)
            if trainer.step == step:
                die()

        adamw_module.adamw_ = deadly

    return arm


def in_copy(step: int) -> Fault:
    """Die when a part of the state of `step` is copied."""

    def arm(trainer: Trainer) -> None:
        plain, plain_start = Slot.put, Capture.start
        begun = [-1]

        def start(capture: Capture, step: int, progress: dict[str, Any]) -> None:
            begun[0] = step
            plain_start(capture, step, progress)

        def deadly(slot: Slot, chunk: int, data: np.ndarray) -> None:
            if begun[0] == step:
                slot.put_at(chunk * CHUNK_BYTES, data[: len(data) // 2])
                die()
            plain(slot, chunk, data)

        Slot.put, Capture.start = deadly, start  # type: ignore[method-assign]

    return arm


def assert_as_never_killed(run_dir: Path, straight: Path) -> None:
    """Parameters and moments, losses and samples, bit by bit; every step counts once and none is missing."""
    folder = Path("checkpoints") / f"step-{STEPS:08d}"
    wanted_progress, wanted = checkpoint_values(straight / folder)
    progress, values = checkpoint_values(run_dir / folder)
    assert progress == wanted_progress
    assert values.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(values[name], value, err_msg=name)
    [expected] = samples_read(straight)
    assert final_samples(run_dir) == expected
    last = {line["step"]: line for line in metrics(run_dir)}
    assert sorted(last) == list(range(1, STEPS + 1))
    figures = ("loss", "grad_norm", "tokens", "lr")
    for line in metrics(straight):
        assert [last[line["step"]][key] for key in figures] == [line[key] for key in figures]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_kill_outside_the_update_loses_nothing(
    seed: int, layout: str, never_killed: Any, lives: Any
) -> None:
    """The state lies in memory that outlives the process, and does not change before the update.

    The other rank stays in its process, or is replaced too.
    """
    chance = random.Random(f"{seed} {layout}")
    step, victim, survivors = chance.randrange(2, STEPS + 1), chance.randrange(2), chance.random() < 0.5
    run = lives(*LAYOUTS[layout])
    ends = run.live(Life(2, faults={victim: in_backward(step)}, survivors=survivors))
    assert ends[victim] == "died"
    assert run.live(Life(2)) == ["finished", "finished"]
    [restored] = events(run.run_dir, "restored")
    assert (restored["source"], restored["from_step"], restored["lost_steps"]) == ("memory", step - 1, 0)
    assert_as_never_killed(run.run_dir, never_killed(layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_kill_inside_the_update_loses_that_step(
    seed: int, layout: str, never_killed: Any, lives: Any
) -> None:
    """What the update left half changed is never used: all go back to the step before, the victim to its
    slot, the other to its own arena or slot.
    """
    chance = random.Random(f"{seed} {layout}")
    step, victim, survivors = chance.randrange(2, STEPS + 1), chance.randrange(2), chance.random() < 0.5
    run = lives(*LAYOUTS[layout])
    ends = run.live(Life(2, faults={victim: in_update(step)}, survivors=survivors))
    assert ends[victim] == "died"
    torn = inspect(run.state_folder / f"rank-{victim:05d}.arena")
    assert torn is not None
    assert torn.torn
    assert run.live(Life(2)) == ["finished", "finished"]
    [restored] = events(run.run_dir, "restored")
    assert restored["source"] == ("peer" if layout == "replicate" else "memory")
    assert restored["from_step"] in (step - 1, step)  # a replica may have finished the step for both
    assert restored["lost_steps"] in (0, 1)
    assert_as_never_killed(run.run_dir, never_killed(layout))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_kill_inside_a_copy_leaves_the_copy_before(seed: int, never_killed: Any, lives: Any) -> None:
    """A half filled slot is none, and the living state is whole beside it."""
    chance = random.Random(seed)
    step, victim = chance.randrange(2, STEPS), chance.randrange(2)
    run = lives(*LAYOUTS["shard"])
    ends = run.live(Life(2, faults={victim: in_copy(step)}, survivors=seed % 2 == 0))
    assert ends[victim] == "died"
    slots = [inspect(run.state_folder / f"rank-{victim:05d}.slot-{n}") for n in range(3)]
    states = [slot.state for slot in slots if slot is not None]
    assert states.count("FILLING") == 1
    assert "COMMITTED" in states
    assert run.live(Life(2)) == ["finished", "finished"]
    [restored] = events(run.run_dir, "restored")
    assert restored["from_step"] == step
    assert restored["lost_steps"] == 0
    assert_as_never_killed(run.run_dir, never_killed("shard"))


@pytest.mark.parametrize("seed", SEEDS)
def test_all_ranks_killed_at_any_moment_lose_a_step_at_most(seed: int, never_killed: Any, lives: Any) -> None:
    """Nobody is left to tell, and the memory still holds all."""
    run = lives(*LAYOUTS["shard"])
    run.live(Life(2, kill_all_after_s=random.Random(seed).uniform(0.0, 0.15)))
    done = max((line["step"] for line in metrics(run.run_dir)), default=0)
    assert run.live(Life(2)) == ["finished", "finished"]
    for restored in events(run.run_dir, "restored"):
        assert restored["from_step"] >= done - 1
        assert restored["lost_steps"] <= 1
    assert_as_never_killed(run.run_dir, never_killed("shard"))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_second_kill_is_as_harmless_as_the_first(seed: int, never_killed: Any, lives: Any) -> None:
    """Restored state is protected from its first step on, whatever it was restored from."""
    chance = random.Random(seed)
    run = lives(*LAYOUTS["shard"])
    for fault in (in_update(3), in_backward(chance.choice((3, 4))), in_update(5)):
        assert "died" in run.live(Life(2, faults={chance.randrange(2): fault}))
    assert run.live(Life(2)) == ["finished", "finished"]
    assert all(restored["lost_steps"] <= 1 for restored in events(run.run_dir, "restored"))
    assert_as_never_killed(run.run_dir, never_killed("shard"))


@pytest.mark.parametrize(
    ("before", "after"), [("shard", "tensor"), ("pipeline", "shard"), ("tensor", "alone")]
)
def test_another_layout_takes_what_it_needs_from_the_images_of_all(
    before: str, after: str, never_killed: Any, lives: Any
) -> None:
    """A run that goes on with fewer ranks, or others, needs no disk."""
    axes = {**LAYOUTS, "alone": ("parallel.dp_shard=1",)}
    run = lives()
    run.live(Life(2, axes[before], faults={1: in_backward(4)}))
    world_size = 1 if after == "alone" else 2
    assert run.live(Life(world_size, axes[after])) == ["finished"] * world_size
    [restored] = events(run.run_dir, "restored")
    assert (restored["source"], restored["from_step"], restored["lost_steps"]) == ("memory", 3, 0)
    [expected] = samples_read(never_killed("shard"))
    assert final_samples(run.run_dir) == expected
    straight = {line["step"]: line for line in metrics(never_killed("shard"))}
    for line in metrics(run.run_dir):
        assert line["loss"] == pytest.approx(straight[line["step"]]["loss"], rel=TOLERANCE), line["step"]


def test_replicas_that_are_left_are_enough_for_fewer_ranks(never_killed: Any, lives: Any) -> None:
    """A lost node takes a replica with it, and the layout shrinks to what is left: still no disk."""
    run = lives()
    run.live(
        Life(4, ("parallel.dp_replicate=2", "parallel.dp_shard=1", "parallel.tp=2"), {3: in_backward(4)})
    )
    for path in run.state_folder.glob("rank-0000[23].*"):
        path.unlink()
    assert run.live(Life(2, LAYOUTS["tensor"])) == ["finished", "finished"]
    [restored] = events(run.run_dir, "restored")
    assert (restored["from_step"], restored["lost_steps"]) == (3, 0)
    [expected] = samples_read(never_killed("shard"))
    assert final_samples(run.run_dir) == expected
    straight = {line["step"]: line for line in metrics(never_killed("shard"))}
    for line in metrics(run.run_dir):
        assert line["loss"] == pytest.approx(straight[line["step"]]["loss"], rel=TOLERANCE), line["step"]


def test_a_replica_stands_in_for_a_rank_whose_memory_is_lost(never_killed: Any, lives: Any) -> None:
    """Ranks that hold the same numbers protect each other without a copy more."""
    run = lives(*LAYOUTS["replicate"])
    run.live(Life(2, faults={1: in_backward(4)}))
    for path in run.state_folder.glob("rank-00001.*"):
        path.unlink()
    assert run.live(Life(2)) == ["finished", "finished"]
    [restored] = events(run.run_dir, "restored")
    assert (restored["source"], restored["from_step"]) == ("peer", 3)
    assert_as_never_killed(run.run_dir, never_killed("replicate"))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_flipped_bit_in_a_slot_is_never_trained_on(seed: int, never_killed: Any, lives: Any) -> None:
    """The step before is committed too, or a checkpoint stands: another source is taken."""
    chance = random.Random(seed)
    run = lives(*LAYOUTS["shard"], "checkpoint.every=2")
    run.live(Life(2, faults={0: in_update(4)}))
    for slot in run.state_folder.glob("rank-00000.slot-*"):
        info = inspect(slot)
        if info is not None and info.step == 3:
            with slot.open("rb+") as file:
                place = HEADER_BYTES + chance.randrange(info.used)
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 1 << chance.randrange(8)]))
    assert run.live(Life(2)) == ["finished", "finished"]
    [restored] = events(run.run_dir, "restored")
    assert restored["from_step"] == 2
    assert_as_never_killed(run.run_dir, never_killed("shard"))


def test_memory_that_is_lost_leaves_the_disk(never_killed: Any, lives: Any) -> None:
    """A node that went with all of its memory costs the steps since the last checkpoint, not the run."""
    run = lives(*LAYOUTS["shard"], "checkpoint.every=2")
    run.live(Life(2, faults={0: in_backward(6)}))
    for path in run.state_folder.iterdir():
        path.unlink()
    assert run.live(Life(2)) == ["finished", "finished"]
    [restored] = events(run.run_dir, "restored")
    assert restored["source"] == "disk"
    assert restored["from_step"] in (2, 4)
    assert_as_never_killed(run.run_dir, never_killed("shard"))


def test_a_finished_step_is_told_though_its_teller_died(lives: Any) -> None:
    """A restored step is not trained again, so a line that died with its process would be a hole."""

    def die_untold(trainer: Trainer) -> None:
        plain = trainer._record

        def deadly(line: dict[str, Any]) -> None:
            if trainer.step == 3:
                die()
            plain(line)

        trainer._record = deadly  # type: ignore[method-assign]

    run = lives(*LAYOUTS["shard"])
    run.live(Life(2, faults={0: die_untold}, survivors=True))
    assert [line["step"] for line in metrics(run.run_dir)] == [1, 2]
    run.live(Life(2))
    assert [line["step"] for line in metrics(run.run_dir)] == list(range(1, STEPS + 1))
    assert len({frozenset(line) for line in metrics(run.run_dir)}) == 1


def test_a_run_that_is_asked_to_stop_leaves_its_last_step_committed(lives: Any) -> None:
    """A node that is taken away in good order must not cost the step that it ended with."""

    def stop_after_two(trainer: Trainer) -> None:
        plain = trainer._record

        def asking(line: dict[str, Any]) -> None:
            plain(line)
            if trainer.step == 2:
                trainer._stop.set()

        trainer._record = asking  # type: ignore[method-assign]

    run = lives(*LAYOUTS["shard"])
    assert run.live(Life(2, faults={0: stop_after_two})) == ["stopped", "stopped"]
    for rank in range(2):
        slots = [inspect(run.state_folder / f"rank-{rank:05d}.slot-{n}") for n in range(2)]
        assert ("COMMITTED", 3) in [(slot.state, slot.step) for slot in slots if slot is not None]
    assert run.live(Life(2)) == ["finished", "finished"]
    [restored] = events(run.run_dir, "restored")
    assert (restored["from_step"], restored["lost_steps"]) == (3, 0)


def test_state_that_cannot_move_is_copied_where_it_lies(never_killed: Any, lives: Any) -> None:
    """As on a device: there is no arena to come back to, and a slot holds the step before."""

    def stay(trainer: Trainer) -> None:
        restore_module.memory_needed = lambda model: None

    def stay_and(fault: Fault) -> Fault:
        return lambda trainer: (stay(trainer), fault(trainer))[1]

    run = lives(*LAYOUTS["shard"])
    run.live(Life(2, faults={0: stay, 1: stay_and(in_backward(4))}))
    assert run.live(Life(2, faults={0: stay, 1: stay})) == ["finished", "finished"]
    [restored] = events(run.run_dir, "restored")
    assert restored["source"] == "memory"
    assert restored["from_step"] in (2, 3)
    assert_as_never_killed(run.run_dir, never_killed("shard"))


def test_a_copy_that_fails_on_one_rank_counts_on_none(never_killed: Any, lives: Any) -> None:
    """Training goes on with the copy before, which all ranks still have when one of them dies."""

    def fail_once(trainer: Trainer) -> None:
        plain = Slot.seal

        def failing(slot: Slot, *, step: int, **rest: Any) -> None:
            if step == 3:
                raise OSError("no memory behind this page")
            plain(slot, step=step, **rest)

        Slot.seal = failing  # type: ignore[method-assign]

    run = lives(*LAYOUTS["shard"])
    run.live(Life(2, faults={0: fail_once, 1: in_update(4)}))
    slots = [inspect(run.state_folder / f"rank-00001.slot-{n}") for n in range(2)]
    assert ("COMMITTED", 3) not in [(slot.state, slot.step) for slot in slots if slot is not None]
    assert run.live(Life(2)) == ["finished", "finished"]
    [restored] = events(run.run_dir, "restored")
    assert restored["from_step"] in (2, 3)  # 3 where the other rank had not updated yet
    assert_as_never_killed(run.run_dir, never_killed("shard"))


@pytest.mark.parametrize("insist", [False, True])
def test_a_node_without_room_trains_without_snapshots_or_says_why_not(insist: bool, lives: Any) -> None:
    """What was asked for by name is not left out in silence; what was not is no reason to stop."""

    def fill_the_memory(trainer: Trainer) -> None:
        def reserve(rank: int, nbytes: int) -> RankFiles:
            raise VaultFull(f"rank {rank}: {nbytes} bytes are too many")

        trainer._place = replace(trainer._place, reserve=reserve)  # type: ignore[type-var]

    run = lives(*LAYOUTS["shard"], *(["snapshot.enabled=true"] if insist else []))
    faults = {1: fill_the_memory}
    if insist:
        with pytest.raises(AssertionError, match=r"NoRoomForSnapshots.*too many"):
            run.live(Life(2, faults=faults))
        return
    assert run.live(Life(2, faults=faults)) == ["finished", "finished"]
    [told] = events(run.run_dir, "snapshot")
    assert "too many" in told["message"]


@pytest.mark.parametrize(
    ("copy_s", "step_s", "stall_s", "every"),
    [(0.0, 0.0, 0.0, 1), (0.5, 1.0, 0.0, 1), (0.9, 1.0, 0.2, 38), (5.0, 1.0, 0.0, 5)],
)
def test_copies_are_as_far_apart_as_they_cost(
    copy_s: float, step_s: float, stall_s: float, every: int
) -> None:
    """Every step where a copy fits beside one; else the best interval, and never two copies at once."""
    assert how_often(copy_s=copy_s, step_s=step_s, stall_s=stall_s, mtbf_s=3600.0) == every


@pytest.mark.parametrize("every", [2, 4])
def test_copies_are_made_when_they_are_asked_for(every: int, never_killed: Any, lives: Any) -> None:
    """Fewer copies are fewer steps to go back to, and the arena still loses none."""
    run = lives(*LAYOUTS["shard"], f"snapshot.every={every}")
    run.live(Life(2, faults={0: in_update(5)}))
    assert run.live(Life(2)) == ["finished", "finished"]
    [restored] = events(run.run_dir, "restored")
    assert restored["from_step"] == 4
    assert_as_never_killed(run.run_dir, never_killed("shard"))
