"""Stopping on request: once with a checkpoint, twice at once, and never with anything left behind."""

import json
import signal
from pathlib import Path

import pytest
from commands import Bench, Command, events, lines, reached, wait_until

SLOW = ("model.pause_s=0.1", "run.steps=400", "checkpoint.every=0")


def checkpoints(run_dir: Path) -> list[str]:
    """Names of what lies in the run's folder of checkpoints."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def summary(run_dir: Path) -> dict[str, object]:
    """The run's summary."""
    value: dict[str, object] = json.loads((run_dir / "summary.json").read_text())
    return value


def train_slowly(bench: Bench, paced: Path) -> Command:
    """A run on a terminal that would last forty seconds."""
    return bench.start("train", paced, *SLOW, on_terminal=True)


@pytest.mark.ray
@pytest.mark.timeout(600)  # two runs, on a machine that may be busy
def test_ctrl_c_saves_the_step_it_reached_and_twice_ends_at_once(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """The key as a terminal sends it, to the command and every process that it started in the foreground."""
    command = train_slowly(bench, paced)
    reached(run_dir, 3)
    second = bench.run("train", paced, *SLOW, timeout_s=30)
    assert second.status == 2, "two commands would write one record"
    assert "another rayfold command is training there" in second.verdict
    command.press_ctrl_c()
    ended = command.wait(30)
    assert ended.status == 0, ended.out
    assert "Ctrl-C again stops at once" in ended.out
    stopped = summary(run_dir)
    step = lines(run_dir / "metrics.jsonl")[-1]["step"]
    assert (stopped["status"], stopped["steps"]) == ("stopped", step)
    assert checkpoints(run_dir) == [f"step-{step:08d}"]
    assert events(run_dir, "run_finished")[-1]["status"] == "stopped"
    assert not events(run_dir, "verdict")

    command = train_slowly(bench, paced)
    reached(run_dir, step + 2)
    command.press_ctrl_c()
    wait_until(lambda: "Ctrl-C again" in command.shown(), 10, "the answer to the first Ctrl-C")
    command.press_ctrl_c()
    ended = command.wait(15)
    assert events(run_dir, "restored")[0]["from_step"] == step, "the same command went on from the stop"
    if ended.status == 0:  # it stopped cleanly in the instant between the two keys
        assert summary(run_dir)["status"] == "stopped"
    else:
        assert ended.status == 130, ended.out
        assert "stopped at once" in ended.verdict
        assert "Traceback" not in ended.out


@pytest.mark.ray
@pytest.mark.parametrize(
    "at", ["Ray is starting", pytest.param("the ranks form", marks=pytest.mark.campaign)]
)
def test_ctrl_c_before_training_stops_without_a_step(
    bench: Bench, paced: Path, run_dir: Path, at: str
) -> None:
    """Whoever sees a mistake while the run starts need not wait for it to train."""
    command = train_slowly(bench, paced)
    if at == "Ray is starting":
        wait_until(bench.sessions, 30, "a session")
    else:
        wait_until(lambda: events(run_dir, "run_started"), 60, "the start")
    command.press_ctrl_c()
    ended = command.wait(45)
    assert ended.status == 0, ended.out
    assert summary(run_dir)["status"] == "stopped"
    assert not lines(run_dir / "metrics.jsonl")


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)  # two runs, on a machine that may be busy
def test_sigterm_is_as_good_as_ctrl_c_and_a_step_that_never_ends_does_not_keep_the_command(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """A scheduler sends SIGTERM and waits; a second one ends the command although no step ends any more."""
    command = bench.start("train", paced, "model.trouble=sleep", "model.step=3", "checkpoint.every=0")
    reached(run_dir, 2)
    command.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "stopping after this step" in command.shown(), 10, "the answer to SIGTERM")
    assert command.process.poll() is None
    command.process.send_signal(signal.SIGTERM)
    ended = command.wait(15)
    assert ended.status == 130
    assert "stopped at once" in ended.verdict

    command = bench.start("train", paced, *SLOW)
    reached(run_dir, 3)
    command.process.send_signal(signal.SIGTERM)
    ended = command.wait(30)
    assert ended.status == 0, ended.err
    assert summary(run_dir)["status"] == "stopped"
    assert checkpoints(run_dir) == [f"step-{summary(run_dir)['steps']:08d}"]
