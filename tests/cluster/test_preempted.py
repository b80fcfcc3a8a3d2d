"""A node or a process is about to be taken away, and the run leaves it first: no step is lost."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Bench, Command, events, lines, reached, wait_until
from test_chaos import campaign, train_undisturbed
from test_chaos import check_as_if_nothing_had_happened as check_same
from test_nodes import Cluster, check_as_if_nothing_had_happened, join, start

NOTICE_S = 90  # what a machine is given to leave
TIMES, APART = 7, 60  # notices in one run, and steps between two: a spare is up again by then
LAYOUTS = {
    "dp_shard": ("parallel.dp_shard=2",),
    "tp": ("parallel.tp=2", "model.kv_heads=2"),
    "pp": ("parallel.pp=2",),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, of which one is taken away and then the other."""
    made = Cluster(tmp_path_factory.mktemp("pair"), 2)
    yield made
    made.close()


def drain(pair: Cluster, node: str) -> None:
    """Tell Ray, as a cloud does, that a node will be gone."""
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", pair.address]
    command += ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command += ["--deadline-remaining-seconds", str(NOTICE_S)]
    subprocess.run(command, env=pair.env, check=True, timeout=60, capture_output=True)


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_the_ranks_of_a_node_that_is_drained_go_to_spares_elsewhere_without_losing_a_step(
    pair: Cluster, bench: Bench, paced: Path, run_dir: Path, tmp_path: Path
) -> None:
    """And the last node of a run is left by saving and stopping, with the reason."""
    undisturbed = tmp_path / "undisturbed"
    assert start(bench, paced, undisturbed, 2).wait().status == 0
    where = join(bench, pair)
    command = start(bench, paced, run_dir, 2, where, "snapshot.spares=2", "model.pause_s=0.3")
    reached(run_dir, 3)
    (formed,) = events(run_dir, "formed")
    assert len(set(formed["nodes"])) == 2
    drain(pair, formed["nodes"][1])
    ended = command.wait()
    assert ended.status == 0, ended.err
    (preempted,) = events(run_dir, "preempted")
    assert (preempted["node"], preempted["ranks"]) == (formed["nodes"][1], [1])
    assert preempted["deadline_unix"] > preempted["time_unix"]
    again = events(run_dir, "formed")[1]
    assert set(again["nodes"]) == {formed["nodes"][0]}
    assert again["pids"][0] == formed["pids"][0]
    (restored,) = events(run_dir, "restored")
    assert restored["lost_steps"] == 0
    check_as_if_nothing_had_happened(run_dir, undisturbed)
    wait_until(lambda: not pair.workers(), 30, "the end of the run's processes")

    last = tmp_path / "last"
    command = start(bench, paced, last, 1, where, "run.steps=100000", "snapshot.spares=0")
    reached(last, 3)
    drain(pair, events(last, "formed")[0]["nodes"][0])
    ended = command.wait()
    assert ended.status == 0, ended.err
    summary = json.loads((last / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert "rank 0 got notice to leave" in summary["verdict"]
    assert events(last, "checkpoint")[-1]["step"] == lines(last / "metrics.jsonl")[-1]["step"]


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_that_get_sigterm_go_on_until_a_spare_has_their_place(
    bench: Bench, small: Path, run_dir: Path, tmp_path_factory: pytest.TempPathFactory, layout: str
) -> None:
    """Notice after notice, at any moment of a step: nothing is trained again, and no bit is another."""
    sections = [f'kind = "preempt"\nat_step = [{APART * i}, {APART * i + 20}]' for i in range(1, TIMES + 1)]
    options = (f"run.steps={APART * (TIMES + 1)}", "checkpoint.every=0", *LAYOUTS[layout])
    ended = bench.run("chaos", campaign(bench.folder, *sections), small, *options, "snapshot.spares=2")
    report = json.loads((run_dir / "chaos.json").read_text())
    assert (report["status"], report["injected"], report["lost_steps"]) == ("finished", TIMES, 0), ended.err
    assert {event["action"] for event in events(run_dir, "remedy")} == {"replace"}
    gone = {pid for formed in events(run_dir, "formed") for pid in formed["pids"]}
    assert len(gone) == 2 + TIMES, "each notice ended one process"
    undisturbed = train_undisturbed(tmp_path_factory.mktemp("undisturbed"), small, *options)
    check_same(run_dir, undisturbed)


def training(bench: Bench, config: Path, run_dir: Path, *options: str) -> Command:
    """A run that goes on until it is stopped, and has come to its third step."""
    endless = ("run.steps=100000", "checkpoint.every=0", "model.pause_s=0.05")
    command = bench.start("train", config, *endless, *options)
    reached(run_dir, 3)
    return command


def stopped(command: Command, run_dir: Path) -> list[int]:
    """Stop the run; all of its steps, which are told once each."""
    command.process.send_signal(signal.SIGTERM)
    ended = command.wait()
    assert ended.status == 0, ended.err
    steps = [line["step"] for line in lines(run_dir / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)), "no step is lost or trained twice"
    return steps


def formed(run_dir: Path, times: int) -> list[dict[str, Any]]:
    """How the ranks have formed, when they have so often and are at work."""
    wait_until(lambda: len(events(run_dir, "formed")) >= times, 60, f"epoch {times}")
    reached(run_dir, events(run_dir, "formed")[times - 1]["step"] + 3)
    return events(run_dir, "formed")


def formed_without(run_dir: Path, gone: list[int]) -> dict[str, Any]:
    """How two ranks have formed at last, none of them in a process that is `gone`, when they are at work."""

    def last() -> dict[str, Any] | None:
        one: dict[str, Any] = events(run_dir, "formed")[-1]
        return one if one["world_size"] == 2 and not set(gone) & set(one["pids"]) else None

    found: dict[str, Any] = wait_until(last, 60, f"two ranks in other processes than {gone}")
    reached(run_dir, found["step"] + 3)
    return found


@pytest.mark.ray
@pytest.mark.campaign
def test_without_a_spare_a_rank_with_notice_is_left_out_and_another_comes(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """Fewer ranks for as long as a new process needs to start."""
    command = training(bench, paced, run_dir, "snapshot.spares=0", "parallel.dp_shard=2")
    os.kill(formed(run_dir, 1)[0]["pids"][0], signal.SIGTERM)
    first, shrunk, whole = formed(run_dir, 3)
    assert (shrunk["world_size"], shrunk["pids"]) == (1, first["pids"][1:])
    assert (whole["world_size"], whole["pids"][0]) == (2, first["pids"][1])
    stopped(command, run_dir)


@pytest.mark.ray
@pytest.mark.campaign
def test_where_nobody_can_take_its_place_the_run_saves_and_stops(
    bench: Bench, paced: Path, run_dir: Path
) -> None:
    """As it does on a node that is to be taken away: all that was trained is on disk."""
    command = training(bench, paced, run_dir, "run.workers=1", "snapshot.spares=0")
    os.kill(formed(run_dir, 1)[0]["pids"][0], signal.SIGTERM)
    ended = command.wait()
    assert ended.status == 0, ended.err
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert "rank 0 got notice to leave" in summary["verdict"]
    assert events(run_dir, "checkpoint")[-1]["step"] == lines(run_dir / "metrics.jsonl")[-1]["step"]


@pytest.mark.ray
@pytest.mark.campaign
def test_a_spare_with_notice_gets_no_rank(bench: Bench, paced: Path, run_dir: Path) -> None:
    """It would be gone a moment later; another one is started in its stead."""
    command = training(bench, paced, run_dir, "snapshot.spares=1")
    (first,) = formed(run_dir, 1)
    os.kill(first["spare_pids"][0], signal.SIGTERM)
    wait_until(lambda: first["spare_pids"][0] not in bench.pids("ray::Worker"), 30, "the end of the spare")
    wait_until(lambda: len(bench.pids("ray::Worker")) == 3, 60, "another spare")
    os.kill(first["pids"][1], signal.SIGTERM)
    last = formed_without(run_dir, [first["pids"][1], *first["spare_pids"]])
    assert last["pids"][0] == first["pids"][0]
    stopped(command, run_dir)


@pytest.mark.ray
@pytest.mark.campaign
def test_notice_to_all_ranks_at_once_is_borne(bench: Bench, paced: Path, run_dir: Path) -> None:
    """Nobody who trains may stay: the spare goes on alone with what they have in memory."""
    command = training(bench, paced, run_dir, "snapshot.spares=1", "parallel.dp_shard=2")
    (first,) = formed(run_dir, 1)
    for pid in first["pids"]:
        os.kill(pid, signal.SIGTERM)
    formed_without(run_dir, first["pids"])
    stopped(command, run_dir)


@pytest.mark.ray
@pytest.mark.campaign
def test_notice_is_not_forgotten_with_the_controller(bench: Bench, paced: Path, run_dir: Path) -> None:
    """It was told to one that is killed at the same moment; its successor hears of it too."""
    command = training(bench, paced, run_dir, "snapshot.spares=1")
    (first,) = formed(run_dir, 1)
    (controller,) = bench.pids("ray::Controller")
    os.kill(first["pids"][1], signal.SIGTERM)
    os.kill(controller, signal.SIGKILL)
    _, again = formed(run_dir, 2)
    assert again["pids"] == [first["pids"][0], first["spare_pids"][0]]
    assert [event["ranks"] for event in events(run_dir, "preempted")] == [[1]]
    stopped(command, run_dir)


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_a_kill_while_a_rank_gives_its_place_away_is_survived(
    bench: Bench, small: Path, run_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The one that is to stay dies, or the spare that has just become a rank."""
    times, apart = 4, 120
    sections = [
        f'kind = "{kind}"\nat_step = {apart * i}\nrank = {i % 2}'
        for i in range(1, times + 1)
        for kind in ("preempt", "kill_in_recovery")
    ]
    options = (f"run.steps={apart * (times + 1)}", "checkpoint.every=0")
    ended = bench.run("chaos", campaign(bench.folder, *sections), small, *options, "snapshot.spares=8")
    report = json.loads((run_dir / "chaos.json").read_text())
    injected = [fault for fault in report["faults"] if fault["kept"] is not None]
    assert report["status"] == "finished", ended.err
    assert len({fault["kind"] for fault in injected}) == 2, "a kill fell into such a moment"
    assert all(fault["outcome"]["lost_steps"] <= 1 for fault in injected)
    undisturbed = train_undisturbed(tmp_path_factory.mktemp("undisturbed"), small, *options)
    check_same(run_dir, undisturbed)
