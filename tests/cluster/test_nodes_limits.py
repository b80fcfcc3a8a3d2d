"""Where redundancy between nodes ends; nodes that cannot be used, and nodes that fail again and again."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Bench, command_line, events, lines, wait_until
from nodes import (
    ENDS_S,
    RECOVERS_S,
    SHAPE,
    TIMES,
    Cluster,
    check_as_if_nothing_had_happened,
    first_protected,
    join,
    protected_since,
    run_alone,
    safe_step,
    send,
)

DETECTED_WITHIN_S = 20.0  # half a second on idle cores; Ray takes a minute
STEPS = 200
FIXED = (*SHAPE, *TIMES, "run.workers=3")
PIPELINE, SHARDED, TENSOR = ("parallel.pp=3",), ("parallel.dp_shard=3",), ("parallel.tp=3",)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes; those that a test has lost are started again for the next."""
    made = Cluster(tmp_path_factory.mktemp("cluster"), 3, zones={1: "left", 2: "right"})
    yield made
    made.close()


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", [SHARDED, PIPELINE, TENSOR], ids=["sharded", "pipeline", "tensor"])
def test_two_nodes_of_three_lost_at_once_are_more_than_xor_bears(
    cluster: Cluster,
    bench: Bench,
    small: Path,
    run_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    layout: tuple[str, ...],
) -> None:
    """The run says so, and goes on from the newest checkpoint."""
    cluster.complete(3)
    options = (*layout, *FIXED, f"run.steps={STEPS}", "checkpoint.every=10")
    command = bench.start(
        "train", small, f"run.dir={run_dir}", join(bench, cluster), *options, "snapshot.spares=6"
    )
    first_protected(run_dir)
    wait_until(lambda: cluster.spares(run_dir)[0] >= 2, RECOVERS_S, "two spares on the head")
    wait_until(lambda: lines(run_dir / "metrics.jsonl")[-1]["step"] > 25, RECOVERS_S, "two checkpoints")
    for pid in cluster.processes(1) + cluster.processes(2):
        send(pid, signal.SIGKILL)
    ended = command.wait(ENDS_S)
    assert ended.status == 0, ended.err
    restored = events(run_dir, "restored")[-1]
    assert restored["source"] == "disk"
    assert restored["from_step"] % 10 == 0
    assert restored["from_step"] >= 10
    told = " ".join(event.get("message", "") for event in events(run_dir, "snapshot"))
    assert "xor bears the loss of 1 of a group at once" in told
    alone = run_alone(tmp_path_factory.mktemp("undisturbed"), small, *options)
    check_as_if_nothing_had_happened(run_dir, alone)
    wait_until(lambda: not cluster.workers(), 30, "the end of all that the run started")


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", [PIPELINE, SHARDED], ids=["pipeline", "sharded"])
def test_a_node_that_has_three_faults_gets_no_more_ranks(
    cluster: Cluster, bench: Bench, small: Path, run_dir: Path, layout: tuple[str, ...]
) -> None:
    """Its spares are nearest to its memory, and are taken no more all the same."""
    cluster.complete(3)
    options = (*layout, *FIXED, "run.steps=2000", "checkpoint.every=0", "snapshot.spares=3")
    command = bench.start("train", small, f"run.dir={run_dir}", join(bench, cluster), *options)
    first_protected(run_dir)
    flapping = 1
    for number in range(1, 4):
        formed, nodes = events(run_dir, "formed")[-1], cluster.nodes_of(run_dir)
        near = flapping if number < 3 else 0
        wait_until(lambda: all(cluster.spares(run_dir)[n] for n in {near, 0}), RECOVERS_S, "spares")  # noqa: B023
        send(formed["pids"][nodes.index(flapping)], signal.SIGKILL)
        wait_until(lambda: len(events(run_dir, "restored")) == number, RECOVERS_S, "a recovery")  # noqa: B023
        print(events(run_dir, "remedy")[-1]["sentence"])
    flapped = formed["nodes"][nodes.index(flapping)][:12]
    assert [event.get("quarantined") for event in events(run_dir, "remedy")] == [None, None, [flapped]]
    assert "gets no more ranks" in events(run_dir, "remedy")[-1]["sentence"]
    assert flapping not in cluster.nodes_of(run_dir)
    wait_until(lambda: cluster.spares(run_dir)[0], RECOVERS_S, "a spare")
    send(events(run_dir, "formed")[-1]["pids"][0], signal.SIGKILL)
    wait_until(lambda: len(events(run_dir, "restored")) == 4, RECOVERS_S, "a recovery")
    assert flapping not in cluster.nodes_of(run_dir)
    command.process.send_signal(signal.SIGINT)
    assert command.wait(ENDS_S).status == 0
    wait_until(lambda: not cluster.workers(), 30, "the end of all that the run started")


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("layout", "controller_too"), [(SHARDED, False), (PIPELINE, True)], ids=["sharded", "pipeline-controller"]
)
def test_a_node_whose_raylet_is_stopped_is_left_at_once_though_its_ranks_live(
    cluster: Cluster,
    bench: Bench,
    small: Path,
    run_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    layout: tuple[str, ...],
    controller_too: bool,
) -> None:
    """Ray takes a minute to see it, and meanwhile nothing that is large comes from there. Those that are left
    there are ended, as they are not of the run any more. With a controller that is lost before it can act,
    its successor hears of it.
    """
    cluster.complete(3)
    options = (*layout, *FIXED, "checkpoint.every=0")
    endless = ("run.steps=1000000", "snapshot.spares=3")
    command = bench.start("train", small, f"run.dir={run_dir}", join(bench, cluster), *options, *endless)
    first_protected(run_dir)
    wait_until(lambda: cluster.spares(run_dir)[0], RECOVERS_S, "a spare on the head")
    raylet, orphans, safe = cluster.raylet(1), set(cluster.processes(1)), safe_step(run_dir)
    assert raylet is not None
    send(raylet, signal.SIGSTOP)
    if controller_too:
        (controller,) = [pid for pid in cluster.processes(0) if "ray::Controller" in command_line(pid)]
        wait_until(lambda: False, 0.4, "")  # half a second is what a stop may last
        send(controller, signal.SIGKILL)
    try:
        wait_until(lambda: events(run_dir, "restored"), RECOVERS_S, "a recovery")
        (restored,) = events(run_dir, "restored")
        (verdict,) = events(run_dir, "verdict")
        assert "Ray's own process on its machine was halted" in verdict["sentence"]
        assert restored["source"] == "parity"
        assert restored["from_step"] >= safe
        assert restored["detect_s"] < DETECTED_WITHIN_S
        assert 1 not in cluster.nodes_of(run_dir)
        left = lambda: orphans & set(cluster.workers())  # noqa: E731
        wait_until(lambda: not left(), RECOVERS_S, "the end of all that was left of the run there")
        protected_since(run_dir, restored["from_step"])
        caught_up = lambda: step_of(run_dir) > events(run_dir, "formed")[-1]["step"]  # noqa: E731
        wait_until(caught_up, RECOVERS_S, "steps that were not made before")
        command.process.send_signal(signal.SIGTERM)
        assert command.wait(ENDS_S).status == 0
    finally:
        send(raylet, signal.SIGCONT)
        send(raylet, signal.SIGKILL)
    alone = run_alone(
        tmp_path_factory.mktemp("undisturbed"), small, *options, f"run.steps={step_of(run_dir)}"
    )
    check_as_if_nothing_had_happened(run_dir, alone)
    wait_until(lambda: not cluster.processes(1), RECOVERS_S, "the end of the node")


def step_of(run_dir: Path) -> int:
    """The step that was recorded last."""
    step: int = lines(run_dir / "metrics.jsonl")[-1]["step"]
    return step
