"""A running Ray cluster that the command joins: it trains there, gives everything back and stops nothing."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import RUN_TIMEOUT_S, Bench, command_line, events, lines, reached, wait_until
from heads import CPUS, Head

from rayfold.cluster.controller import controller_name

FIGURES = ("step", "loss", "tokens_per_second", "step_seconds", "grad_norm", "learning_rate", "memory_bytes")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """One cluster for all tests here: it takes ten seconds to start."""
    made = Head(tmp_path_factory.mktemp("head"))
    yield made
    made.close()


def join(bench: Bench, head: Head) -> str:
    """The override that joins the cluster; commands get its way of authentication."""
    bench.env["RAY_AUTH_MODE"] = "disabled"
    return f"run.address={head.address}"


def is_free(head: Head) -> bool:
    """Whether the cluster is up and all of it can be used again."""
    return head.ask("ray.available_resources().get('CPU')") == f"{CPUS}.0"


@pytest.mark.ray
@pytest.mark.timeout(600)  # starts a cluster, and waits ten seconds for Ray to export its metrics
def test_two_runs_share_a_cluster_show_their_figures_and_leave_it_as_it_was(
    bench: Bench, head: Head, paced: Path, tmp_path: Path
) -> None:
    """Two teams on one cluster: each trains its own run, both are seen by Prometheus, and nothing stays."""
    first, second = tmp_path / "first", tmp_path / "second"
    where = join(bench, head)
    slow = ("model.pause_s=0.1", "run.steps=220", "checkpoint.every=0")
    one = bench.start("train", paced, where, f"run.dir={first}", "run.name=first", *slow)
    two = bench.start("train", paced, where, f"run.dir={second}", "run.name=second", *slow)
    reached(first, 1)
    reached(second, 1)

    def shown() -> bool:
        text = head.metrics()
        return all(f"rayfold_{name}{{" in text for name in FIGURES) and 'run="first"' in text

    wait_until(shown, 40, "the figures of the runs as Ray metrics")
    wait_until(lambda: 'run="second"' in head.metrics(), 30, "the figures of the second run")
    for command, run_dir in ((one, first), (two, second)):
        ended = command.wait()
        assert ended.status == 0, ended.err
        assert [line["step"] for line in lines(run_dir / "metrics.jsonl")] == list(range(1, 221))
        assert not events(run_dir, "fault")
    assert lines(first / "metrics.jsonl")[-1]["loss"] == lines(second / "metrics.jsonl")[-1]["loss"]
    wait_until(lambda: is_free(head), 30, "all resources free again")
    assert head.workers() == []


@pytest.mark.ray
@pytest.mark.timeout(600)  # two runs and a cluster, on a machine that may be busy
def test_a_run_outlives_its_command_and_the_same_command_finds_it_again(
    bench: Bench, head: Head, paced: Path, run_dir: Path
) -> None:
    """The run is the cluster's: a closed laptop does not end it, and who comes back sees it and stops it."""
    options = (join(bench, head), "model.pause_s=0.05", "checkpoint.every=0", "run.start_timeout_s=200")
    command = bench.start("train", paced, *options, "run.steps=2000")
    reached(run_dir, 2)
    command.kill()
    command.wait(10)
    refused = bench.run("train", paced, *options, "run.steps=3000", "optim.lr=0.5", timeout_s=60)
    assert refused.status == 2
    assert "run.steps is 2000 there and 3000 here" in refused.err
    assert "optim.lr is 0.01 there and 0.5 here" in refused.err
    local = bench.run("train", paced, "model.pause_s=0.05", timeout_s=90)
    assert local.status == 2, "two controllers would write one record"
    assert "a run goes on there that was started on a Ray cluster" in local.err
    at = lines(run_dir / "metrics.jsonl")[-1]["step"]
    again = bench.start("train", paced, *options, "run.steps=2000")
    wait_until(lambda: "the run is under way, after step" in again.shown(), 60, "the view of the run")
    reached(run_dir, at + 2)
    again.process.send_signal(signal.SIGINT)
    ended = again.wait(60)
    assert ended.status == 0, ended.err
    stopped = json.loads((run_dir / "summary.json").read_text())
    assert (stopped["status"], stopped["restarts"]) == ("stopped", 0)
    assert len(events(run_dir, "run_started")) == 1
    wait_until(lambda: not head.workers(), 20, "the end of the run's processes")

    steps = stopped["steps"] + 60  # nobody will be there to see the last of them
    command = bench.start("train", paced, *options, f"run.steps={steps}")
    reached(run_dir, stopped["steps"] + 2)
    command.kill()
    command.wait(10)
    wait_until(lambda: len(events(run_dir, "run_finished")) == 2, 60, "the end of the run")
    wait_until(lambda: not head.workers(), 30, "the end of the run's processes")
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "finished"
    assert [line["step"] for line in lines(run_dir / "metrics.jsonl")] == list(range(1, steps + 1))
    wait_until(lambda: is_free(head), 30, "all resources free again")


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.parametrize("how", ["two signals", "controller"])
def test_a_run_that_is_ended_at_once_gives_its_part_of_the_cluster_back(
    bench: Bench, head: Head, paced: Path, run_dir: Path, how: str
) -> None:
    """Nobody owns its processes; they end by themselves when they have no controller any more."""
    command = bench.start("train", paced, join(bench, head), "model.trouble=sleep", "model.step=3")
    reached(run_dir, 2)
    assert head.workers()
    if how == "controller":
        command.kill()
        head.ask(f"ray.kill(ray.get_actor({controller_name(run_dir)!r}, namespace='rayfold'))")
    else:
        command.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping after this step" in command.shown(), 10, "the answer to SIGTERM")
        command.process.send_signal(signal.SIGTERM)
        assert command.wait(30).status == 130
    wait_until(lambda: not head.workers(), 30, "the end of the run's processes")
    wait_until(lambda: is_free(head), 30, "all resources free again")


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_without_its_command_a_run_still_replaces_its_controller_and_its_ranks(
    bench: Bench, head: Head, paced: Path, run_dir: Path
) -> None:
    """Ray counts the command's job as finished by then, and must start processes for it all the same."""
    options = (join(bench, head), "model.pause_s=0.05", "run.steps=400", "snapshot.spares=1")
    options += ("run.start_timeout_s=200",)
    command = bench.start("train", paced, *options)
    reached(run_dir, 2)
    command.kill()
    (controller,) = [pid for pid in head.workers() if "Controller" in command_line(pid)]
    os.kill(controller, signal.SIGKILL)
    wait_until(lambda: events(run_dir, "fault"), 60, "another controller")
    os.kill(events(run_dir, "formed")[0]["pids"][0], signal.SIGKILL)
    wait_until(lambda: len(events(run_dir, "formed")) == 2, 60, "ranks that form again")
    wait_until(lambda: events(run_dir, "run_finished"), 120, "the end of the run")
    steps = [line["step"] for line in lines(run_dir / "metrics.jsonl") if "attempt" not in line]
    assert steps == list(range(1, 401))
    wait_until(lambda: not head.workers(), 30, "the end of the run's processes")
    wait_until(lambda: is_free(head), 30, "all resources free again")


@pytest.mark.ray
@pytest.mark.campaign
def test_a_stopped_worker_does_not_keep_its_place_on_the_cluster(
    bench: Bench, head: Head, paced: Path, run_dir: Path
) -> None:
    """A process that answers nobody, not even Ray, must be ended all the same when the run ends with it."""
    options = (
        "snapshot.enabled=false",
        "model.pause_s=0.1",
        "run.steps=1000",
        "run.collective_timeout_s=5",
        "checkpoint.every=0",
    )
    command = bench.start("train", paced, join(bench, head), *options)
    reached(run_dir, 2)
    os.kill(events(run_dir, "formed")[0]["pids"][1], signal.SIGSTOP)
    ended = command.wait(60)
    assert ended.status == 1
    assert "rank 1 did not come" in ended.verdict
    wait_until(lambda: not head.workers(), 20, "the end of the stopped process")
    wait_until(lambda: is_free(head), 30, "all resources free again")


@pytest.mark.ray
def test_more_ranks_than_the_cluster_has_are_refused_in_numbers(
    bench: Bench, head: Head, paced: Path, run_dir: Path
) -> None:
    """Exit 1 after run.start_timeout_s, saying what is needed and what is there; Ctrl-C is faster."""
    asked = ("run.workers=8", "batch.size=8")
    ended = bench.run("train", paced, join(bench, head), *asked, "run.start_timeout_s=3", timeout_s=90)
    assert ended.status == 1
    assert "run.workers = 8" in ended.verdict
    assert f"'CPU': {CPUS}" in ended.verdict
    command = bench.start("train", paced, join(bench, head), *asked, "run.start_timeout_s=600")
    wait_until(lambda: len(events(run_dir, "run_started")) == 2, RUN_TIMEOUT_S, "the second start")
    command.process.send_signal(signal.SIGINT)
    assert command.wait(20).status == 0
    wait_until(lambda: is_free(head), 30, "all resources free again")
