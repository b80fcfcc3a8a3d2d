"""An interrupted run is the run that was not: the same samples and numbers, under any layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import (
    checkpoint_values,
    events,
    kill_on_ranks,
    metrics,
    samples_read,
    train_on_ranks,
    write_corpus,
)

from rayfold.parallel.layout import AXES, Layout

STEPS = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize("layout", [(1, 1), (1, 2), (2, 1)], ids=["one rank", "shard", "replicate"])
def test_an_interrupted_run_ends_bitwise_as_a_straight_one(
    layout: tuple[int, int], source: Path, tmp_path: Path
) -> None:
    """Model, moments, step, cursor and streams all come back, or some bit of twelve steps would differ."""
    replicate, shard = layout
    axes = (f"parallel.dp_replicate={replicate}", f"parallel.dp_shard={shard}", f"run.steps={STEPS}")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    world_size = replicate * shard
    train_on_ranks(world_size, straight, source, *axes)
    stopped = train_on_ranks(world_size, broken, source, *axes, stop_at={0: 4})
    assert {(end.status, end.step) for end in stopped} == {("stopped", 5)}
    resumed = train_on_ranks(world_size, broken, source, *axes)
    assert {(end.status, end.step) for end in resumed} == {("finished", STEPS)}

    expected_progress, expected = checkpoint_values(step_folder(straight, STEPS))
    progress, values = checkpoint_values(step_folder(broken, STEPS))
    assert progress == expected_progress
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(values[name], value, err_msg=name)
    figures = ("step", "loss", "grad_norm", "lr", "tokens")
    assert [[line[key] for key in figures] for line in metrics(broken)] == [
        [line[key] for key in figures] for line in metrics(straight)
    ]
    assert [event["from_step"] for event in events(broken, "restored")] == [5]


def test_a_run_goes_on_under_any_layout(source: Path, tmp_path: Path) -> None:
    """Two shards, then two replicas of two shards, then one rank: as one rank all along, sample by sample.

    Losses are sums of other orders; 1e-5 relative is the project's promise for fp32.
    """
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    steps = f"run.steps={STEPS}"
    train_on_ranks(1, straight, source, steps)
    train_on_ranks(2, moved, source, steps, stop_at={1: 3})
    axes = ("parallel.dp_replicate=2", "batch.micro_size=1")
    train_on_ranks(4, moved, source, steps, *axes, stop_at={2: 7})
    train_on_ranks(1, moved, source, steps)
    [expected] = samples_read(straight)
    first, second, third = samples_read(moved)
    read = first | second | third
    assert [list(first), list(second), list(third)] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert read == expected
    assert sorted(i for ids in read.values() for i in ids) == list(range(8 * STEPS))
    assert [line["step"] for line in metrics(moved)] == list(range(1, STEPS + 1))
    for got, wanted in zip(metrics(moved), metrics(straight), strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-5), got["step"]
        assert got["tokens"] == wanted["tokens"]


def test_one_rank_that_is_asked_to_stop_stops_all(source: Path, tmp_path: Path) -> None:
    """A signal reaches ranks at different moments; unless they agree on the step, some wait forever."""
    ends = train_on_ranks(4, tmp_path, source, "run.steps=1000", stop_at={3: 2})
    assert {(end.status, end.step) for end in ends} == {("stopped", 3)}
    progress, _ = checkpoint_values(step_folder(tmp_path, 3))
    assert progress == {"step": 3, "cursor": 24, "tokens": sum(line["tokens"] for line in metrics(tmp_path))}


def test_a_finished_run_trains_further_when_steps_are_raised(source: Path, tmp_path: Path) -> None:
    """More steps are more of the same run: no step is told twice and no sample comes twice."""
    train_on_ranks(1, tmp_path, source, "run.steps=5")
    train_on_ranks(1, tmp_path, source, "run.steps=8")
    first, second = samples_read(tmp_path)
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 9))
    assert [i for ids in (first | second).values() for i in ids] == list(range(64))
    assert all("attempt" not in line for line in metrics(tmp_path))


def test_steps_after_the_last_checkpoint_are_trained_again_to_the_same_numbers(
    source: Path, tmp_path: Path
) -> None:
    """What a crash loses is repeated, marked as a second attempt, and comes out as before."""
    every = ("run.steps=6", "checkpoint.every=2")
    train_on_ranks(2, tmp_path, source, *every)
    for step in (4, 6):  # as if the run had died in step 4, before its checkpoint
        for file in step_folder(tmp_path, step).iterdir():
            file.unlink()
        step_folder(tmp_path, step).rmdir()
    train_on_ranks(2, tmp_path, source, *every)
    lines = metrics(tmp_path)
    assert [(line["step"], line.get("attempt")) for line in lines] == [
        *((step, None) for step in range(1, 7)),
        *((step, 2) for step in range(3, 7)),
    ]
    assert [line["loss"] for line in lines[2:6]] == [line["loss"] for line in lines[6:]]


def test_a_seed_is_part_of_the_run(source: Path, tmp_path: Path) -> None:
    """Parity between runs would be empty if every run were the same."""
    for seed in (1, 2):
        train_on_ranks(1, tmp_path / str(seed), source, "run.steps=2", f"run.seed={seed}")
    one, other = (metrics(tmp_path / str(seed))[0]["loss"] for seed in (1, 2))
    assert one != other


# --- killed under one layout, finished under another

# As in test_layouts.py: with an eps of the size of the gradients an update is as exact as its gradient.
MOVED = ("model.layers=4", "model.ffn_dim=48", "model.tied_embeddings=true", "optim.eps=1e-2")
MOVED_STEPS, COMMITTED, DEADLY = 6, 2, 4
TOLERANCE = 1e-5


def layout(**sizes: Any) -> Layout:
    return Layout(**{"dp_replicate": 1, "dp_shard": 1, **sizes})


def axes_of(layout: Layout) -> list[str]:
    """The layout as overrides; every rank takes its samples in micro-batches of one."""
    names = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "context")
    chosen = [f"parallel.{name}={getattr(layout, name)}" for name in names]
    return [*chosen, f"parallel.pipeline_schedule={layout.schedule}", "batch.micro_size=1"]


def short(layout: Layout) -> str:
    """What differs from one rank: `dp_shard2.tp2`."""
    sizes = {axis: getattr(layout, axis) for axis in AXES}
    words = [f"{axis}{size}" for axis, size in sizes.items() if size > 1]
    words += [layout.schedule] if layout.pp > 1 else []
    words += [layout.context] if layout.cp > 1 else []
    return ".".join(words) or "alone"


MOVES = [
    (layout(), layout(dp_shard=4)),
    (layout(dp_shard=4), layout(tp=2)),
    (layout(tp=2), layout(cp=2)),
    (layout(cp=2), layout(pp=2)),
    (layout(pp=2), layout()),
    (layout(dp_replicate=2), layout(tp=2, pp=2)),
    (layout(tp=2, pp=2), layout(dp_shard=2, cp=2)),
    (layout(dp_shard=2, cp=2), layout(dp_replicate=2, tp=2)),
    (layout(dp_replicate=2, tp=2), layout(pp=4)),
    (layout(pp=4), layout(cp=4)),
    (layout(pp=2, schedule="zbv"), layout(cp=2, context="ulysses")),
    (layout(dp_shard=8), layout(cp=2, tp=2, pp=2)),
]
MORE_MOVES = [
    (layout(cp=2, tp=2), layout(dp_shard=2, pp=2)),
    (layout(dp_shard=2, pp=2), layout(pp=2, schedule="zbv")),
    (layout(cp=2, pp=2), layout(dp_replicate=2, dp_shard=2)),
    (layout(dp_shard=2, tp=2, pp=2), layout(dp_replicate=2, cp=2, tp=2)),
]


@pytest.fixture(scope="module")
def never_killed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank, all steps at once."""
    folder = tmp_path_factory.mktemp("never-killed")
    train_on_ranks(1, folder, source, *MOVED, f"run.steps={MOVED_STEPS}")
    return folder


@pytest.mark.parametrize(
    ("before", "after"),
    [*MOVES, *(pytest.param(*move, marks=pytest.mark.campaign) for move in MORE_MOVES)],
    ids=short,
)
def test_a_killed_run_goes_on_under_another_layout(
    before: Layout, after: Layout, never_killed: Path, source: Path, tmp_path: Path
) -> None:
    """More ranks, fewer, or other axes: nobody reads a sample that one rank alone would not have read there,
    and losses and parameters are those of one rank that was never killed.
    """
    given = (*MOVED, f"run.steps={MOVED_STEPS}", f"checkpoint.every={COMMITTED}")
    kill_on_ranks(before.world_size, tmp_path, source, *given, *axes_of(before), step=DEADLY, after=COMMITTED)
    assert not step_folder(tmp_path, DEADLY).exists()
    train_on_ranks(after.world_size, tmp_path, source, *given, *axes_of(after))
    assert [event["from_step"] for event in events(tmp_path, "restored")] == [COMMITTED]

    [expected] = samples_read(never_killed)
    killed, resumed = samples_read(tmp_path)
    assert killed == {step: expected[step] for step in range(1, DEADLY + 1)}
    assert resumed == {step: expected[step] for step in range(COMMITTED + 1, MOVED_STEPS + 1)}

    straight = {line["step"]: line for line in metrics(never_killed)}
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [*range(1, DEADLY), *range(COMMITTED + 1, MOVED_STEPS + 1)]
    for line in lines:
        assert line["tokens"] == straight[line["step"]]["tokens"]
        assert line["loss"] == pytest.approx(straight[line["step"]]["loss"], rel=TOLERANCE), line["step"]

    wanted_progress, wanted = checkpoint_values(step_folder(never_killed, MOVED_STEPS))
    progress, values = checkpoint_values(step_folder(tmp_path, MOVED_STEPS))
    assert progress == wanted_progress
    assert values.keys() == wanted.keys()
    for name in (name for name in wanted if name.startswith("model.")):
        error = np.linalg.norm(values[name] - wanted[name]) / np.linalg.norm(wanted[name])
        assert error <= TOLERANCE, f"{name} is off by {error:.1e}"
