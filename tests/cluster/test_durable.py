"""The disk tier: vaults write what is due, ranks train on, and a run ends when its last step is on disk."""

import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
from commands import Bench, events, final_tensors, lines, reached, wait_until

from rayfold.runtime.checkpoint.format import read_index

STEPS = 24
EVERY = 4
LIMIT_BYTES = 4096  # no file of a checkpoint is as small


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def limit(pid: int, nbytes: int) -> None:
    """Let a process write no larger file: its disk is full, for all that it can see."""
    _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (nbytes, most))


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(20))
def test_no_due_step_is_missed_whoever_of_the_writers_is_killed(
    bench: Bench, paced: Path, run_dir: Path, seed: int
) -> None:
    """The vault, the controller and a rank, each at a drawn instant: every step that was due is written, or
    one soon after it, and every checkpoint that stands is whole.
    """
    chance = random.Random(seed)
    options = (f"checkpoint.every={EVERY}", "checkpoint.keep=99", f"run.steps={STEPS}", "model.pause_s=0.1")
    command = bench.start("train", paced, *options, "snapshot.spares=1", "run.start_timeout_s=200")
    for step, title in zip((3, 9, 15), chance.sample(["Vault", "Controller", "Worker"], 3), strict=True):
        reached(run_dir, step + chance.randrange(3))
        time.sleep(chance.uniform(0, 0.2))
        (victim, *_) = (
            [chance.choice(events(run_dir, "formed")[-1]["pids"])]
            if title == "Worker"
            else bench.pids(f"ray::{title}")
        )
        os.kill(victim, signal.SIGKILL)
    ended = command.wait()
    assert ended.status == 0, ended.err
    told = [event["step"] for event in events(run_dir, "checkpoint")]
    assert [f"step-{step:08d}" for step in sorted(told)] == checkpoints(run_dir)
    assert told[-1] == STEPS
    assert len(set(told)) == len(told)
    for due in range(EVERY, STEPS + 1, EVERY):
        # the next one stands for it where a rank was lost while it was not written yet
        assert any(due <= step <= due + EVERY for step in told), (due, told)
    for name in checkpoints(run_dir):
        index = read_index(run_dir / "checkpoints" / name)
        assert index.progress["step"] == int(name[5:])
    assert final_tensors(run_dir)[0]["step"] == STEPS
    recorded = [line["step"] for line in lines(run_dir / "metrics.jsonl")]
    assert sorted(set(recorded)) == list(range(1, STEPS + 1))


@pytest.mark.ray
def test_a_run_whose_last_step_comes_to_no_disk_has_failed_and_goes_on_later(
    bench: Bench, small: Path, run_dir: Path
) -> None:
    """Finished means durable. On the way a full disk is told and borne; the step before it stands."""
    options = (f"checkpoint.every={EVERY}", f"run.steps={STEPS}", "model.layers=4")
    command = bench.start("train", small, *options)
    wait_until(lambda: events(run_dir, "checkpoint"), 60, "the first checkpoint")
    (vault,) = bench.pids("ray::VaultActor")
    limit(vault, LIMIT_BYTES)
    ended = command.wait()
    assert ended.status == 1, ended.err
    assert "the last checkpoint could not be written: step 24: " in ended.verdict
    assert "File too large" in ended.verdict
    assert "the one before still stands" in ended.verdict
    faults = events(run_dir, "fault")
    assert {fault["class"] for fault in faults} == {"disk"}
    assert "the one before still stands" in faults[0]["message"]
    stands = max(event["step"] for event in events(run_dir, "checkpoint"))
    assert checkpoints(run_dir)[-1] == f"step-{stands:08d}", "nothing half written is left"
    again = bench.run("train", small, *options)
    assert again.status == 0, again.err
    assert events(run_dir, "restored")[-1]["from_step"] == stands
    assert checkpoints(run_dir)[-1] == f"step-{STEPS:08d}"


@pytest.mark.ray
@pytest.mark.campaign
def test_a_stopped_vault_is_started_again_and_writes_what_is_due(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """It answers nobody while its ranks do; they wait with the next due step, and no longer."""
    options = (f"checkpoint.every={EVERY}", f"run.steps={STEPS}", "model.pause_s=0.1", "checkpoint.keep=99")
    command = bench.start("train", paced, *options)
    reached(run_dir, EVERY + 2)
    (vault,) = bench.pids("ray::VaultActor")
    os.kill(vault, signal.SIGSTOP)
    wait_until(lambda: set(bench.pids("ray::VaultActor")) - {vault}, 60, "another vault")
    ended = command.wait()
    assert ended.status == 0, ended.err
    assert [event["step"] for event in events(run_dir, "checkpoint")] == list(range(EVERY, STEPS + 1, EVERY))
    assert not events(run_dir, "verdict"), "nothing was wrong with the ranks"
