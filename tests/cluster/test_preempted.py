"""A node is about to be taken away, and the run leaves it first: no step is lost."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Bench, events, lines, reached, wait_until
from test_nodes import Cluster, check_as_if_nothing_had_happened, join, start

NOTICE_S = 90  # what a machine is given to leave


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
