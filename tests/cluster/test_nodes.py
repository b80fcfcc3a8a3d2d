"""A run on several nodes: what is lost with a rank, or a whole node, comes back from the others' memory.

The nodes are Ray nodes of this machine, each with an address, processes and a folder of state of its own.
"""

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Bench, Command, events, reached, wait_until
from nodes import (
    ENDS_S,
    RECOVERS_S,
    TIMES,
    Cluster,
    check_as_if_nothing_had_happened,
    first_protected,
    join,
    protected_since,
    run_alone,
    safe_step,
)

STEPS = 60
LONG = "run.steps=80"  # for two losses
RESUMED_WITHIN_S = 30.0  # 2 s on two idle cores: 1.5 of them until a silent node counts as lost


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes for all tests here, which lose one after the other."""
    made = Cluster(tmp_path_factory.mktemp("cluster"), 3)
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """What a run of so many ranks comes to when nothing happens, on one node."""
    made: dict[tuple[int | str, ...], Path] = {}

    def run_of(config: Path, ranks: int, *options: str) -> Path:
        key = (ranks, *options)
        if key not in made:
            made[key] = run_alone(tmp_path_factory.mktemp("undisturbed"), config, *fixed(ranks), *options)
        return made[key]

    return run_of


def fixed(ranks: int) -> tuple[str, ...]:
    """A run that takes some seconds, checkpoints only at its end and lives on memory before."""
    ends = (f"run.steps={STEPS}", "checkpoint.every=0", "batch.size=6")
    return (*TIMES, *ends, f"run.workers={ranks}", f"parallel.dp_shard={ranks}")


def start(bench: Bench, config: Path, run_dir: Path, ranks: int, *options: str) -> Command:
    """Such a run; where it is, `options` say."""
    return bench.start("train", config, f"run.dir={run_dir}", *fixed(ranks), *options)


def protected(run_dir: Path) -> list[dict[str, Any]]:
    """The times that the run was said to be protected."""
    return [event for event in events(run_dir, "snapshot") if event.get("protected")]


@pytest.mark.ray
@pytest.mark.parametrize(
    ("losses", "seed"),
    [
        pytest.param(losses, seed, marks=[pytest.mark.campaign] if losses > 1 or seed > 2 else [])
        for losses in (1, 2)
        for seed in range(20)
    ],
)
@pytest.mark.timeout(900)
def test_lost_nodes_of_three_are_made_up_for_from_parity_and_then_from_a_copy(
    cluster: Cluster,
    bench: Bench,
    small: Path,
    run_dir: Path,
    undisturbed: Callable[..., Path],
    losses: int,
    seed: int,
) -> None:
    """SIGKILL of all processes of a drawn node at a drawn moment: XOR of the others' blocks has what it held.
    The two nodes that are left hold copies of each other from then on, so the second may be lost too.
    """
    draw = random.Random(seed)
    cluster.complete(3)
    steps = LONG if losses > 1 else f"run.steps={STEPS}"
    command = start(bench, small, run_dir, 3, join(bench, cluster), steps, f"snapshot.spares={3 * losses}")
    first_protected(run_dir)
    reached(run_dir, 8 + draw.randrange(16))
    time.sleep(0.2 * draw.random())  # somewhere in a step, and in a round
    (formed,) = events(run_dir, "formed")
    assert len(set(formed["nodes"])) == 3
    rank = kill_rank_and_node(cluster, formed, which=draw.randrange(2))
    if losses > 1:
        wait_until(lambda: events(run_dir, "restored"), RECOVERS_S, "a recovery")
        protected_since(run_dir, events(run_dir, "restored")[0]["from_step"])
        safe, nodes = safe_step(run_dir), cluster.nodes_of(run_dir)
        last = next(node for node in nodes if node)
        wait_until(lambda: cluster.spares(run_dir)[0] >= nodes.count(last), RECOVERS_S, "spares there")
        cluster.kill(last)
    ended = command.wait(ENDS_S)
    assert ended.status == 0, ended.err
    check_lost_node(run_dir, [rank], "parity")
    if losses > 1:
        check_lost_node(run_dir, [r for r, node in enumerate(nodes) if node == last], "peer", number=1)
        assert events(run_dir, "restored")[1]["from_step"] >= safe
    check_as_if_nothing_had_happened(run_dir, undisturbed(small, 3, steps))
    assert cluster.workers() == []


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_a_killed_rank_of_another_node_is_replaced(
    cluster: Cluster, bench: Bench, small: Path, run_dir: Path, undisturbed: Callable[..., Path]
) -> None:
    """Its state lies in its node's memory, and the only spare, on another node, fetches it from there. The
    node's vault was killed just before.
    """
    cluster.complete(2)
    command = start(bench, small, run_dir, 2, join(bench, cluster), "snapshot.spares=1")
    reached(run_dir, 6)
    (formed,) = events(run_dir, "formed")
    assert len(set(formed["nodes"])) == 2
    home = cluster.node_of(formed["pids"][1])
    (vault,) = cluster.vaults(home)
    os.kill(vault, signal.SIGKILL)
    wait_until(lambda: cluster.vaults(home) not in ([], [vault]), 60, "another vault on the node")
    assert not events(run_dir, "verdict"), "a node whose ranks answer is not lost"
    os.kill(formed["pids"][1], signal.SIGKILL)
    ended = command.wait(ENDS_S)
    assert ended.status == 0, ended.err
    (restored,) = events(run_dir, "restored")
    assert restored["source"] == "peer", "the only spare is where rank 0 is"
    assert restored["lost_steps"] <= 1
    check_as_if_nothing_had_happened(run_dir, undisturbed(small, 2))


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_a_lost_node_of_two_is_made_up_for_from_its_copy(
    cluster: Cluster, bench: Bench, small: Path, run_dir: Path, undisturbed: Callable[..., Path]
) -> None:
    """The other node has all that it held, of the step that was protected last."""
    cluster.complete(2)
    command = start(bench, small, run_dir, 2, join(bench, cluster), "snapshot.spares=2")
    wait_until(lambda: protected(run_dir), 100, "a run that is protected")
    reached(run_dir, 12)
    (formed,) = events(run_dir, "formed")
    rank = kill_rank_and_node(cluster, formed)
    ended = command.wait(ENDS_S)
    assert ended.status == 0, ended.err
    check_lost_node(run_dir, [rank], "peer")
    check_as_if_nothing_had_happened(run_dir, undisturbed(small, 2))
    assert cluster.workers() == []


def kill_rank_and_node(cluster: Cluster, formed: dict[str, Any], *, which: int = 0) -> int:
    """Kill a node that has a rank and is not the head, where controller and command are; the rank."""
    found = [(r, n) for r, n in enumerate(map(cluster.node_of, formed["pids"])) if n]
    rank, number = found[which]
    cluster.kill(number)
    return rank


def check_lost_node(run_dir: Path, ranks: list[int], source: str, *, number: int = 0) -> None:
    """One fault, of a node; all went back to a step that had been protected, and no further."""
    verdict, remedy = events(run_dir, "verdict")[number], events(run_dir, "remedy")[number]
    assert (verdict["class"], verdict["ranks"]) == ("died", ranks)
    assert "its machine" in verdict["sentence"]
    assert remedy["action"] == "replace"
    assert "went down" in remedy["sentence"]
    restored = events(run_dir, "restored")[number]
    assert restored["source"] == source
    assert restored["from_step"] >= protected(run_dir)[number]["safe_step"]
    assert restored["detect_s"] < RESUMED_WITHIN_S
    levels = [event["protected"] for event in events(run_dir, "snapshot") if "protected" in event]
    assert levels[2 * number : 2 * number + 2] == [1, 0]


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_a_damaged_copy_is_refused_and_the_run_goes_on_from_disk(
    cluster: Cluster, bench: Bench, small: Path, run_dir: Path, undisturbed: Callable[..., Path]
) -> None:
    """Bits flip in memory too; a run that starts from them would never be noticed to be wrong."""
    cluster.complete(2)
    command = start(bench, small, run_dir, 2, join(bench, cluster), "snapshot.spares=2", "checkpoint.every=5")
    wait_until(lambda: protected(run_dir), 100, "a run that is protected")
    reached(run_dir, 12)
    (formed,) = events(run_dir, "formed")
    held = [Path("/dev/shm").glob(f"*-state/{node[:16]}/parity-*.blob") for node in formed["nodes"]]
    for path in itertools.chain(*held):
        with open(path, "r+b") as file:
            file.seek(path.stat().st_size - 200)
            byte = file.read(1)
            file.seek(path.stat().st_size - 200)
            file.write(bytes([byte[0] ^ 1]))
    kill_rank_and_node(cluster, formed)
    ended = command.wait(ENDS_S)
    assert ended.status == 0, ended.err
    (restored,) = events(run_dir, "restored")
    assert restored["source"] == "disk"
    assert any("damaged" in event.get("message", "") for event in events(run_dir, "snapshot"))
    check_as_if_nothing_had_happened(run_dir, undisturbed(small, 2))
