"""SIGKILL of everything at once, and of each kind of process alone: nothing lost, repeated or left behind."""

import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import Bench, Command, events, final_tensors, lines, reached, wait_until

from rayfold.cluster.reaper import memory_folder

KILLS, SAMPLE, SEED = 20, 1, 11
STEPS, EVERY = 12, 3


def record(run_dir: Path) -> dict[int, dict[str, Any]]:
    """What each step was when it was trained last."""
    return {line["step"]: line for line in lines(run_dir / "metrics.jsonl")}


def kill_everything(bench: Bench, command: Command) -> None:
    """As a machine that loses its power: nobody has the time to tell anyone."""
    command.kill()
    while pids := bench.processes():
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def power_is_back(bench: Bench) -> None:
    """A machine starts with an empty /tmp and no memory of before."""
    for session in bench.short.iterdir():
        shutil.rmtree(memory_folder(str(session)), ignore_errors=True)
        shutil.rmtree(session, ignore_errors=True)


def same_run_killed_at(bench: Bench, config: Path, run_dir: Path, step: int, pause_s: float) -> None:
    """Train up to `step`, lose everything `pause_s` later, and let the same command finish."""
    command = bench.start("train", config, f"run.dir={run_dir}")
    reached(run_dir, step)
    wait_until(lambda: False, pause_s, "")
    kill_everything(bench, command)
    command.close()
    power_is_back(bench)
    ended = bench.run("train", config, f"run.dir={run_dir}")
    assert ended.status == 0, ended.err


def check_equal(run_dir: Path, undisturbed: Path) -> None:
    """Same parameters to the bit, same losses, same samples; what was trained twice says so."""
    progress, tensors = final_tensors(run_dir)
    expected_progress, expected_tensors = final_tensors(undisturbed)
    assert progress == expected_progress
    assert tensors == expected_tensors
    ours, theirs = record(run_dir), record(undisturbed)
    assert {s: (v["loss"], v["grad_norm"], v["tokens"], v["lr"]) for s, v in ours.items()} == {
        s: (v["loss"], v["grad_norm"], v["tokens"], v["lr"]) for s, v in theirs.items()
    }
    seen: set[int] = set()
    for line in lines(run_dir / "metrics.jsonl"):
        assert ("attempt" in line) == (line["step"] in seen), line
        seen.add(line["step"])
    restored = events(run_dir, "restored")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["lost_steps"] == len(lines(run_dir / "metrics.jsonl")) - STEPS
    assert not restored or restored[0]["from_step"] % EVERY == 0


def kill_and_compare(bench: Bench, small: Path, kills: list[tuple[int, float]]) -> None:
    """One undisturbed run, and one for each kill."""
    config = small.with_name("killed.toml")
    text = small.read_text().replace("steps = 8", f"steps = {STEPS}").replace("every = 4", f"every = {EVERY}")
    config.write_text(text)
    undisturbed = bench.folder / "undisturbed"
    assert bench.run("train", config, f"run.dir={undisturbed}").status == 0
    for number, (step, pause_s) in enumerate(kills):
        run_dir = bench.folder / f"killed-{number}"
        same_run_killed_at(bench, config, run_dir, step, pause_s)
        check_equal(run_dir, undisturbed)


def kills() -> list[tuple[int, float]]:
    """The campaign: a step and how long after it, so that a kill also meets a checkpoint being written."""
    draw = random.Random(SEED)
    return [(draw.randint(1, STEPS - 1), draw.uniform(0.0, 0.3)) for _ in range(KILLS)]


@pytest.mark.ray
@pytest.mark.timeout(600)  # three runs of 15 s
def test_a_run_killed_whole_ends_as_if_nothing_had_happened(bench: Bench, small: Path) -> None:
    """A seeded sample of the campaign below."""
    kill_and_compare(bench, small, kills()[:SAMPLE])


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_twenty_kills_at_random_instants_change_nothing(bench: Bench, small: Path) -> None:
    """Whatever the instant, between two steps or in the middle of a checkpoint."""
    kill_and_compare(bench, small, kills())


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)  # two runs, on a machine that may be busy
def test_no_step_is_missing_from_the_record_when_a_long_validation_is_cut_short(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """A checkpoint that stood before its step was written down would hide that step for good."""
    options = ("run.steps=4", "run.eval_every=2", "checkpoint.every=2", "model.pause_s=0.5")
    command = bench.start("train", paced, *options)
    reached(run_dir, 1)
    wait_until(lambda: False, 1.5, "")  # step 2 is trained and its validation, of a second or more, goes on
    kill_everything(bench, command)
    command.close()
    power_is_back(bench)
    assert bench.run("train", paced, *options).status == 0
    assert sorted({line["step"] for line in lines(run_dir / "metrics.jsonl")}) == [1, 2, 3, 4]


@pytest.mark.ray
def test_killing_the_command_alone_ends_all_that_it_started(bench: Bench, paced: Path, run_dir: Path) -> None:
    """`kill -9` leaves the command no last word; the reaper has it. The run's last checkpoint stands."""
    command = bench.start("train", paced, "model.pause_s=0.1", "run.steps=400")
    reached(run_dir, 4)
    bench.remember_ports()
    command.kill()
    assert command.wait(10).status == -signal.SIGKILL
    assert bench.left_behind() == []
    assert not (run_dir / "summary.json").exists(), "nobody could have written it"


# Titles as Ray gives them to its processes, and what the command says of the loss of each.
PROCESSES = {
    "raylet": "raylet/raylet",
    "gcs": "gcs/gcs_server",
}


@pytest.mark.ray
@pytest.mark.parametrize("what", ["gcs", pytest.param("raylet", marks=pytest.mark.campaign)])
def test_losing_a_process_of_the_runtime_ends_the_run_with_a_sentence(
    bench: Bench, paced: Path, run_dir: Path, what: str
) -> None:
    """Not a hang and not a page of tracebacks: exit 1, one line, a summary, and a folder to go on from."""
    command = bench.start("train", paced, "model.pause_s=0.1", "run.steps=100000", "checkpoint.every=2")
    reached(run_dir, 4)
    (pid,) = bench.pids(PROCESSES[what])
    os.kill(pid, signal.SIGKILL)
    ended = command.wait(60)
    assert ended.status == 1, ended.err
    assert "the same command goes on" in ended.verdict
    assert "Traceback" not in ended.err
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["verdict"] == ended.verdict.removeprefix("rayfold: ")
    assert events(run_dir, "verdict")[-1]["sentence"] == summary["verdict"]
