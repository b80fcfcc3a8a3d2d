"""`kill -9` of the controller: the ranks train on, another one takes over, and the record has no seam."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import Bench, Command, command_line, events, final_tensors, lines, reached, wait_until

STEPS = 100
SLOW = ("model.pause_s=0.05", f"run.steps={STEPS}", "checkpoint.every=0", "run.start_timeout_s=200")
BACK_WITHIN_S = 60.0  # two seconds on two idle cores, and these are not idle


def kill_controller(bench: Bench) -> int:
    """End the process of the controller; its id."""
    (pid,) = controllers(bench)
    os.kill(pid, signal.SIGKILL)
    return pid


def controllers(bench: Bench) -> list[int]:
    """Processes of controllers; a named actor's title begins with its name now and then."""
    return [pid for pid in bench.pids("ray::") if "Controller" in command_line(pid)]


def taken_over(run_dir: Path, times: int) -> None:
    """Wait until a controller has taken over for the time `times`."""
    told = lambda: len(controllers_lost(run_dir)) >= times  # noqa: E731
    wait_until(told, BACK_WITHIN_S, f"controller number {times + 1}")


def controllers_lost(run_dir: Path) -> list[dict[str, Any]]:
    return [event for event in events(run_dir, "fault") if event["class"] == "controller"]


def check_record(run_dir: Path, *, again: int = 0) -> None:
    """Every step once and in order, but for those that were trained again; the summary says so."""
    told = lines(run_dir / "metrics.jsonl")
    first = [line["step"] for line in told if "attempt" not in line]
    assert first == list(range(1, STEPS + 1))
    assert len(told) == STEPS + again
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["lost_steps"]) == ("finished", again)
    assert len(events(run_dir, "run_started")) == len(events(run_dir, "run_finished")) == 1


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)  # two runs, on a machine that may be busy
def test_a_run_whose_controller_is_killed_twice_ends_as_if_nothing_had_happened(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """The ranks need no controller for a step: no rank starts again, and the parameters are equal to the bit.

    The second one is killed near the end, so that the ranks are done before there is another to tell it to.
    """
    undisturbed = bench.folder / "undisturbed"
    assert bench.run("train", paced, *SLOW[1:], f"run.dir={undisturbed}").status == 0  # without the pauses
    command = bench.start("train", paced, *SLOW)
    reached(run_dir, 5)
    first = kill_controller(bench)
    taken_over(run_dir, 1)
    (second,) = controllers(bench)
    assert first != second
    reached(run_dir, STEPS - 5)
    kill_controller(bench)
    ended = command.wait()
    assert ended.status == 0, ended.err
    check_record(run_dir)
    (formed,) = events(run_dir, "formed")
    assert formed["epoch"] == 1
    assert not events(run_dir, "verdict")
    assert json.loads((run_dir / "summary.json").read_text())["restarts"] == 0
    assert final_tensors(run_dir) == final_tensors(undisturbed)
    losses = [[line["loss"] for line in lines(f / "metrics.jsonl")] for f in (run_dir, undisturbed)]
    assert losses[0] == losses[1]


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_a_rank_that_is_killed_with_the_controller_is_replaced_by_the_next_one(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """Nobody is there who could be told of the rank's end; the new controller finds that it is gone."""
    command = bench.start("train", paced, *SLOW, "snapshot.spares=1")
    reached(run_dir, 5)
    (formed,) = events(run_dir, "formed")
    kill_controller(bench)
    os.kill(formed["pids"][1], signal.SIGKILL)
    ended = command.wait()
    assert ended.status == 0, ended.err
    (verdict,) = events(run_dir, "verdict")
    assert (verdict["class"], verdict["ranks"]) == ("died", [1])
    again = events(run_dir, "formed")[-1]
    assert again["pids"] == [formed["pids"][0], formed["spare_pids"][0]]
    (restored,) = events(run_dir, "restored")
    assert restored["source"] == "memory"
    assert restored["lost_steps"] <= 1
    check_record(run_dir, again=restored["lost_steps"])


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_what_ranks_had_done_while_there_was_no_controller_is_told_though_all_of_them_died_then(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """Nobody who made those steps is left to tell of them."""
    command = bench.start("train", paced, *SLOW, "snapshot.spares=2")
    reached(run_dir, 5)
    (formed,) = events(run_dir, "formed")
    kill_controller(bench)
    wait_until(lambda: False, 0.5, "")  # it takes a second until there is another one
    for pid in formed["pids"]:
        os.kill(pid, signal.SIGKILL)
    ended = command.wait()
    assert ended.status == 0, ended.err
    (restored,) = events(run_dir, "restored")
    assert restored["source"] == "memory"
    check_record(run_dir, again=restored["lost_steps"])


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_ctrl_c_is_heard_although_there_is_no_controller_at_that_moment(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """The command asks again until somebody has heard it."""
    command = start_long(bench, paced, run_dir)
    kill_controller(bench)
    command.process.send_signal(signal.SIGINT)
    ended = command.wait()
    assert ended.status == 0, ended.err
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "stopped"
    assert len(controllers_lost(run_dir)) == 1


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_a_controller_that_is_lost_again_and_again_ends_the_run(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """Something of its own kills it; to start it for ever would hide that."""
    command = start_long(bench, paced, run_dir)
    for times in range(1, 6):
        kill_controller(bench)
        taken_over(run_dir, times)
    ended = command.wait()
    assert ended.status == 1
    assert "the controller of the run was lost 5 times in 10 minutes" in ended.verdict
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "failed"


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("when", ["starting", "recovering"])
def test_a_controller_killed_before_the_ranks_train_begins_again_there(
    bench: Bench, paced: Path, run_dir: Path, when: str
) -> None:
    """What it had begun is found by name, and ended or gone on with."""
    command = bench.start("train", paced, *SLOW, "snapshot.spares=1")
    if when == "starting":
        wait_until(lambda: events(run_dir, "run_started"), 60, "the start")
    else:
        reached(run_dir, 5)
        os.kill(events(run_dir, "formed")[0]["pids"][0], signal.SIGKILL)
        wait_until(lambda: events(run_dir, "verdict"), 20, "the verdict")
    kill_controller(bench)
    ended = command.wait()
    assert ended.status == 0, ended.err
    check_record(run_dir, again=len(lines(run_dir / "metrics.jsonl")) - STEPS)


def start_long(bench: Bench, paced: Path, run_dir: Path) -> Command:
    """A run that would last for an hour, at its fifth step."""
    command = bench.start("train", paced, "model.pause_s=0.1", "run.steps=36000", "checkpoint.every=0")
    reached(run_dir, 5)
    return command
