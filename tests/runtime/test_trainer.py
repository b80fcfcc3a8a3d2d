"""The loop of a rank against a disk and data that misbehave."""

import math
from pathlib import Path

import numpy as np
import pytest
from training import checkpoint_values, events, metrics, train_on_ranks, write_corpus

from rayfold.runtime.journal import summarise


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def obstruct(run_dir: Path, step: int) -> None:
    """Put a file where the checkpoint of `step` would be written."""
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "checkpoints" / f"step-{step:08d}.partial").write_text("in the way")


def test_a_checkpoint_that_fails_on_the_way_is_told_and_training_goes_on(
    source: Path, tmp_path: Path
) -> None:
    """A full disk for a minute must not cost a week's run, and must not pass in silence."""
    obstruct(tmp_path, 2)
    ends = train_on_ranks(2, tmp_path, source, "run.steps=6", "checkpoint.every=2")
    assert {(end.status, end.step) for end in ends} == {("finished", 6)}
    [fault] = events(tmp_path, "fault")
    assert fault["class"] == "checkpoint_not_written"
    assert "step 2" in fault["message"]
    assert "\n" not in fault["message"]
    assert [event["step"] for event in events(tmp_path, "checkpoint")] == [4, 6]


def test_a_full_disk_is_told_as_that_and_training_goes_on(source: Path, tmp_path: Path) -> None:
    """The kernel's own error, of a file that takes no byte: somebody has to make room."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "rank-00000.bin").symlink_to("/dev/full")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000002.partial").symlink_to(tmp_path / "full")
    ends = train_on_ranks(1, tmp_path / "run", source, "run.steps=4", "checkpoint.every=2")
    assert [(end.status, end.step) for end in ends] == [("finished", 4)]
    [fault] = events(tmp_path / "run", "fault")
    assert fault["class"] == "disk"
    assert "No space left on device" in fault["message"]
    assert [event["step"] for event in events(tmp_path / "run", "checkpoint")] == [4]


def test_a_run_without_its_last_checkpoint_has_failed(source: Path, tmp_path: Path) -> None:
    """Finished means durable: without the last checkpoint a later command would train these steps again."""
    obstruct(tmp_path, 3)
    with pytest.raises(AssertionError, match="CheckpointNotWritten: step 3"):
        train_on_ranks(2, tmp_path, source, "run.steps=3")


def test_a_damaged_checkpoint_is_told_as_a_fault(source: Path, tmp_path: Path) -> None:
    """The run goes on from the one before; the record says which file was bad and where it went on."""
    train_on_ranks(1, tmp_path, source, "run.steps=4", "checkpoint.every=2")
    with open(tmp_path / "checkpoints" / "step-00000004" / "rank-00000.bin", "rb+") as file:
        file.truncate(100)
    train_on_ranks(1, tmp_path, source, "run.steps=4", "checkpoint.every=2")
    [fault] = events(tmp_path, "fault")
    assert fault["class"] == "damaged_checkpoint"
    assert "rank-00000.bin" in fault["message"]
    [restored] = events(tmp_path, "restored")
    assert (restored["source"], restored["from_step"]) == ("disk", 2)
    assert summarise(tmp_path)["lost_steps"] == 2


def test_every_step_is_told_whole(source: Path, tmp_path: Path) -> None:
    """The keys of metrics.jsonl are a contract; validation and rates come with their steps."""
    train_on_ranks(
        *(1, tmp_path, source, "run.steps=3", "run.eval_every=2", "data.val_fraction=0.2"),
        *("optim.warmup_steps=2", "optim.lr=1e-3"),
    )
    lines = metrics(tmp_path)
    keys = {
        *("step", "time_unix", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_time_s"),
        *("data_wait_s", "snapshot_stall_s", "exposed_comm_s", "memory_bytes"),
    }
    assert all(keys <= line.keys() for line in lines)
    assert [line["step"] for line in lines if "val_loss" in line] == [2, 3]
    assert [line["lr"] for line in lines[:2]] == [0.5e-3, 1e-3]
    progress, _ = checkpoint_values(tmp_path / "checkpoints" / "step-00000003")
    assert progress["tokens"] == sum(line["tokens"] for line in lines)


def test_validation_is_the_same_under_every_layout(source: Path, tmp_path: Path) -> None:
    """Held-out samples are shared out once each, so the figure cannot depend on the ranks; fp32 to 1e-5."""
    figures = []
    for world_size in (1, 3):
        run_dir = tmp_path / str(world_size)
        given = ("run.steps=1", "run.eval_every=1", "data.val_fraction=0.2", "batch.size=6")
        given += ("optim.warmup_steps=0",)
        train_on_ranks(world_size, run_dir, source, *given)
        [line] = metrics(run_dir)
        figures.append((line["val_loss"], line["val_bits_per_byte"]))
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(source: Path, tmp_path: Path) -> None:
    """Trained on, it would push every good checkpoint off the shelf, one by one; the newest good one, still
    being written when training diverges, is finished first.
    """
    reckless = ("optim.lr=1e20", "optim.clip=none", "optim.warmup_steps=0", "checkpoint.every=1")
    with pytest.raises(AssertionError, match="NonFinite"):
        train_on_ranks(2, tmp_path, source, "run.steps=20", *reckless)
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert all(math.isfinite(loss) for loss in losses)
    last = max(int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step-????????"))
    assert last == len(losses)
    _, values = checkpoint_values(tmp_path / "checkpoints" / f"step-{last:08d}")
    assert all(np.isfinite(value).all() for value in values.values())


def test_a_whole_checkpoint_of_another_model_is_not_called_damaged(source: Path, tmp_path: Path) -> None:
    """Told to restore a backup, its owner would look for a fault that is not there."""
    train_on_ranks(1, tmp_path, source, "run.steps=1")
    with pytest.raises(AssertionError, match=r"CheckpointMismatch.*ffn\.gate\.weight as \[47, 32\]"):
        train_on_ranks(1, tmp_path, source, "run.steps=2", "model.ffn_dim=48")


def test_a_first_attempt_at_the_wrong_source_can_be_mended(source: Path, tmp_path: Path) -> None:
    """Until a checkpoint stands no sample counts, so the index of a run that never trained binds nobody."""
    other = write_corpus(tmp_path / "other", documents=60)
    run_dir = tmp_path / "run"
    reckless = ("optim.lr=1e30", "optim.clip=none", "optim.warmup_steps=0")
    with pytest.raises(AssertionError, match="NonFinite"):
        train_on_ranks(1, run_dir, source, "run.steps=9", *reckless)
    assert (run_dir / "data-index.json").exists()
    ends = train_on_ranks(1, run_dir, other, "run.steps=2")
    assert [end.status for end in ends] == ["finished"]
