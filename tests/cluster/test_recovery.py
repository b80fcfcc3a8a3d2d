"""A run that loses a rank goes on in place: real Ray, real signals, and the same numbers to the bit."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Bench, Command, events, final_tensors, lines, reached, wait_until

STEPS = 40
LAYOUTS = {
    "dp_shard": ("parallel.dp_shard=2",),
    "tp": ("parallel.tp=2", "model.kv_heads=2"),
    "pp": ("parallel.pp=2",),
}
PROMISED_LOST_STEPS = 1  # the step that a kill in the middle of an update tears; none otherwise
PHASES = ("detect_s", "decide_s", "fence_s", "regroup_s", "restore_s", "catch_up_s")
SAME_BUT_FOR_ROUNDING = 1e-4  # of some hundred steps; sums of one rank and of two differ in their order
RESUMED_WITHIN_S = 20.0  # 0.3 s on two idle cores, and these are not idle


def train(bench: Bench, config: Path, run_dir: Path, *options: str) -> Command:
    """Start a run that takes some seconds, checkpoints only at its end and lives on memory before."""
    fixed = (f"run.dir={run_dir}", f"run.steps={STEPS}", "checkpoint.every=0")
    return bench.start("train", config, *fixed, *options)


def summary(run_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return values


def numbers(run_dir: Path) -> dict[int, tuple[float, ...]]:
    """What each step came to when it was trained last."""
    keys = ("loss", "grad_norm", "tokens", "lr")
    return {line["step"]: tuple(line[key] for key in keys) for line in lines(run_dir / "metrics.jsonl")}


def check_unbroken(run_dir: Path, *, trained_twice: int) -> None:
    """Every step is told, in order, and those that were trained twice say so."""
    told = lines(run_dir / "metrics.jsonl")
    assert sorted({line["step"] for line in told}) == list(range(1, STEPS + 1))
    seen: set[int] = set()
    for line in told:
        assert ("attempt" in line) == (line["step"] in seen), line
        seen.add(line["step"])
    assert len(told) == STEPS + trained_twice
    assert summary(run_dir)["lost_steps"] == trained_twice


def check_equal(run_dir: Path, undisturbed: Path) -> None:
    """Same parameters, moments and cursor of samples, and same figures of every step, to the bit."""
    assert numbers(run_dir) == numbers(undisturbed)
    assert final_tensors(run_dir) == final_tensors(undisturbed)


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """Undisturbed runs by layout, each made once."""
    made: dict[str, Path] = {}

    def run_of(layout: str, config: Path) -> Path:
        if layout not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            bench = Bench(folder)
            ended = train(bench, config, folder / "run", *LAYOUTS[layout]).wait()
            bench.close()
            assert ended.status == 0, ended.err
            made[layout] = folder / "run"
        return made[layout]

    return run_of


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_rank_is_replaced_and_the_run_ends_as_if_nothing_had_happened(
    bench: Bench,
    small: Path,
    run_dir: Path,
    runs_of: Callable[[str, Path], Path],
    layout: str,
    seed: int,
) -> None:
    """`kill -9` of a random rank at a random instant: a spare takes its number and its memory."""
    undisturbed = runs_of(layout, small)
    draw = random.Random(f"{layout} {seed}")
    rank, step, pause_s = draw.randrange(2), draw.randrange(2, STEPS - 8), draw.uniform(0.0, 0.05)
    command = train(bench, small, run_dir, *LAYOUTS[layout], "snapshot.spares=1")
    reached(run_dir, step)
    wait_until(lambda: False, pause_s, "")
    (formed,) = events(run_dir, "formed")
    os.kill(formed["pids"][rank], signal.SIGKILL)
    ended = command.wait()
    assert ended.status == 0, ended.err
    (verdict,), (remedy,) = events(run_dir, "verdict"), events(run_dir, "remedy")
    assert (verdict["class"], verdict["ranks"]) == ("died", [rank])
    assert "SIGKILL" in verdict["sentence"]
    assert (remedy["action"], remedy["ranks"]) == ("replace", [rank])
    again = events(run_dir, "formed")[-1]
    assert again["epoch"] == 2
    expected = [*formed["pids"]]
    expected[rank] = formed["spare_pids"][0]
    assert again["pids"] == expected, "the others go on in the same processes"
    (restored,) = events(run_dir, "restored")
    assert restored["source"] == "memory"
    assert restored["lost_steps"] <= PROMISED_LOST_STEPS
    assert set(PHASES) <= set(restored)
    assert sum(restored[phase] for phase in PHASES) < RESUMED_WITHIN_S
    assert summary(run_dir)["restarts"] == 1
    check_unbroken(run_dir, trained_twice=restored["lost_steps"])
    check_equal(run_dir, undisturbed)


@pytest.mark.ray
@pytest.mark.campaign
def test_a_stopped_rank_is_replaced_and_its_process_ended(
    bench: Bench, small: Path, run_dir: Path, runs_of: Callable[[str, Path], Path]
) -> None:
    """SIGSTOP leaves a process that fails nowhere and answers nobody; the others would wait for minutes."""
    undisturbed = runs_of("dp_shard", small)
    command = train(bench, small, run_dir, *LAYOUTS["dp_shard"], "snapshot.spares=1")
    reached(run_dir, 5)
    stopped = events(run_dir, "formed")[0]["pids"][0]
    os.kill(stopped, signal.SIGSTOP)
    ended = command.wait()
    assert ended.status == 0, ended.err
    (verdict,) = events(run_dir, "verdict")
    assert (verdict["class"], verdict["ranks"]) == ("stopped", [0])
    assert stopped not in events(run_dir, "formed")[-1]["pids"]
    check_unbroken(run_dir, trained_twice=events(run_dir, "restored")[0]["lost_steps"])
    check_equal(run_dir, undisturbed)


@pytest.mark.ray
def test_without_a_spare_the_run_goes_on_with_fewer_ranks_until_there_is_one(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """Same global batch on one rank instead of two, so the losses stay, but for rounding. The process that
    lives through it changes its number, and with it what it holds.
    """
    steps = 400  # long enough for a new process to come up
    options = ("checkpoint.every=0", "snapshot.spares=0", "parallel.dp_shard=2")
    command = bench.start("train", paced, *options, "model.pause_s=0.05", f"run.steps={steps}")
    reached(run_dir, 5)
    os.kill(events(run_dir, "formed")[0]["pids"][0], signal.SIGKILL)
    wait_until(lambda: len(events(run_dir, "formed")) == 2, 20, "ranks that form again")
    shrunk = events(run_dir, "formed")[1]
    assert shrunk["world_size"] == 1
    assert events(run_dir, "remedy")[0]["action"] == "shrink"
    wait_until(lambda: len(events(run_dir, "formed")) == 3, 60, "a run that is whole again")
    (resized,) = events(run_dir, "resized")
    assert resized["world_size"] == 2
    command.process.send_signal(signal.SIGTERM)
    assert command.wait().status == 0
    told = lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in told if "attempt" not in line] == list(range(1, told[-1]["step"] + 1))
    assert all(event["source"] == "memory" for event in events(run_dir, "restored"))
    last = told[-1]["step"]
    assert last > resized["step"]
    undisturbed = run_dir.with_name("undisturbed")
    again = bench.run("train", paced, *options, f"run.dir={undisturbed}", f"run.steps={last}")
    assert again.status == 0, again.err
    expected = numbers(undisturbed)
    for step, found in numbers(run_dir).items():
        # a part of the state in the wrong place is a thousand times as much
        assert found == pytest.approx(expected[step], rel=SAME_BUT_FOR_ROUNDING), f"step {step}"


@pytest.mark.ray
def test_an_error_that_comes_back_at_the_same_step_ends_the_run_with_its_place(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """A bug in the user's model is tried once more, in the same processes, and then told as it is."""
    ended = bench.run("train", paced, "model.trouble=raise", "model.rank=1", "model.step=3")
    assert ended.status == 1, ended.err
    first, second = events(run_dir, "verdict")
    assert first["sentence"] == second["sentence"] == ended.verdict
    assert "rank 1 failed at step 3: ArithmeticError: the flux capacitor is empty" in ended.verdict
    assert "ArithmeticError" in second["evidence"]["traceback"]
    assert [remedy["action"] for remedy in events(run_dir, "remedy")] == ["replace", "stop"]
    pids = [formed["pids"] for formed in events(run_dir, "formed")]
    assert pids[0] == pids[1], "nothing was wrong with the processes"
    assert "Traceback" not in ended.err
    assert [event["step"] for event in events(run_dir, "checkpoint")] == [2], "what was in memory is on disk"
    assert final_tensors(run_dir)[0]["step"] == 2


@pytest.mark.ray
@pytest.mark.campaign
def test_a_rank_without_memory_is_replaced(bench: Bench, paced: Path, run_dir: Path) -> None:
    """Its process keeps what it has allocated, so another try in the same one would meet the same."""
    options = ("model.trouble=hog_once", "model.rank=1", "model.step=5", "snapshot.spares=1")
    ended = bench.run("train", paced, *options)
    assert ended.status == 0, ended.err
    (verdict,), (remedy,) = events(run_dir, "verdict"), events(run_dir, "remedy")
    assert (verdict["class"], verdict["ranks"]) == ("oom", [1])
    assert "rank 1 ran out of memory at step 5: RuntimeError" in verdict["sentence"]
    assert (remedy["action"], remedy["ranks"]) == ("replace", [1])
    first, again = events(run_dir, "formed")
    assert again["pids"] == [first["pids"][0], first["spare_pids"][0]]


@pytest.mark.ray
@pytest.mark.campaign
def test_when_every_rank_is_killed_at_once_new_ones_go_on_from_memory(
    bench: Bench, small: Path, run_dir: Path, runs_of: Callable[[str, Path], Path]
) -> None:
    """Without a spare too: nobody is left, but all that they knew is."""
    undisturbed = runs_of("dp_shard", small)
    command = train(bench, small, run_dir, *LAYOUTS["dp_shard"], "snapshot.spares=0")
    reached(run_dir, 12)
    for pid in events(run_dir, "formed")[0]["pids"]:
        os.kill(pid, signal.SIGKILL)
    ended = command.wait()
    assert ended.status == 0, ended.err
    assert [event["action"] for event in events(run_dir, "remedy")] == ["replace"]
    (restored,) = events(run_dir, "restored")
    assert restored["source"] == "memory"
    assert restored["lost_steps"] <= PROMISED_LOST_STEPS
    check_unbroken(run_dir, trained_twice=restored["lost_steps"])
    check_equal(run_dir, undisturbed)


@pytest.mark.ray
@pytest.mark.campaign
def test_a_second_kill_while_the_ranks_recover_is_survived(bench: Bench, paced: Path, run_dir: Path) -> None:
    """Faults come together: the survivor of the first dies while the spare takes over."""
    options = ("model.pause_s=0.05", "checkpoint.every=0", "snapshot.spares=2", "run.steps=100")
    command = bench.start("train", paced, *options)
    reached(run_dir, 5)
    pids = events(run_dir, "formed")[0]["pids"]
    os.kill(pids[0], signal.SIGKILL)
    wait_until(lambda: events(run_dir, "verdict"), 20, "the first verdict")
    os.kill(pids[1], signal.SIGKILL)
    ended = command.wait()
    assert ended.status == 0, ended.err
    steps = [line["step"] for line in lines(run_dir / "metrics.jsonl") if "attempt" not in line]
    assert steps == list(range(1, 101))
