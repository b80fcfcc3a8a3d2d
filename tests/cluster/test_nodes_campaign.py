"""Runs on several nodes that lose one thing after the other, and come to what they would have without.

A campaign draws from its seed what is lost, where and when: processes of three nodes, then a node, of the two
that are left processes again, and then one of them. The end of the run is on the head alone, and its
parameters tell whether each recovery was right.
"""

import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import Bench, events, lines, wait_until
from nodes import (
    ENDS_S,
    RECOVERS_S,
    SHAPE,
    TIMES,
    Cluster,
    awaits_step,
    check_as_if_nothing_had_happened,
    first_protected,
    join,
    protected_since,
    run_alone,
    safe_step,
    send,
)

LAYOUTS = {
    "sharded": ("parallel.dp_shard=3",),
    "replicated": ("parallel.dp_replicate=3",),
    "tensor": ("parallel.tp=3",),
    "pipeline": ("parallel.pp=3",),
}
FIXED = (*SHAPE, *TIMES, "checkpoint.every=0", "run.workers=3")
PROCESSES = ("vault killed", "vault stopped", "vault and rank killed", "rank killed", "rank stopped")
NODES = ("node", "raylet", "node in a round", "node and a rank in the recovery")


class Losses:
    """Takes something away from a run, and returns when it is whole again."""

    def __init__(self, cluster: Cluster, run_dir: Path, draw: random.Random, *, twins: bool) -> None:
        """`twins`: every rank has another with the same state, on another node."""
        self._cluster, self._dir, self._draw, self._twins = cluster, run_dir, draw, twins
        self._since = 0  # what is protected of later steps outlived the last loss

    def of(self, what: str) -> None:
        """Wait until spares are ready and a step is safe, then for a moment of the seed's; then lose it."""
        nodes = self._cluster.nodes_of(self._dir)
        wait_until(lambda: self._spared(nodes), RECOVERS_S, "spares")
        protected_since(self._dir, self._since)
        self._pass_steps(self._draw.randrange(12))
        sign = signal.SIGSTOP if "stopped" in what else signal.SIGKILL
        match what.split()[0]:
            case "node" | "raylet":
                self._node(what)
            case "rank":
                self._processes(self._draw.randrange(len(nodes)), sign=sign)
            case "vault" if "rank" in what:
                self._processes(self._draw.randrange(len(nodes)), sign=sign, vault=True)
            case "vault":
                self._vault(self._draw.choice(nodes), sign)

    def _spared(self, nodes: list[int]) -> bool:
        """Whether there is a spare on each node that has ranks, and one elsewhere for each of them."""
        spares = self._cluster.spares(self._dir)
        elsewhere = all(sum(spares) - spares[node] >= nodes.count(node) for node in nodes if node)
        return elsewhere and all(spares[node] for node in nodes)

    def _step(self) -> int:
        step: int = lines(self._dir / "metrics.jsonl")[-1]["step"]
        return step

    def _pass_steps(self, count: int) -> None:
        until = self._step() + count
        wait_until(lambda: self._step() >= until, RECOVERS_S, f"step {until}")

    def _vault(self, number: int, sign: int) -> None:
        """Another takes its place, and the ranks do not notice."""
        (vault,) = self._cluster.vaults(number)
        verdicts = events(self._dir, "verdict")
        send(vault, sign)
        wait_until(lambda: self._cluster.vaults(number) not in ([], [vault]), RECOVERS_S, "another vault")
        self._since = self._step()
        assert events(self._dir, "verdict") == verdicts, "a node whose ranks answer is not lost"

    def _processes(self, rank: int, *, sign: int, vault: bool = False) -> None:
        """What the rank had lies in the memory of its node, and on other nodes."""
        pid, number = events(self._dir, "formed")[-1]["pids"][rank], self._cluster.nodes_of(self._dir)[rank]
        with self._recovery(("memory", "peer", "parity")):
            for each in (*(self._cluster.vaults(number) if vault else ()), pid):
                send(each, sign)
        wait_until(lambda: self._cluster.vaults(number), RECOVERS_S, "a vault")

    def _node(self, what: str) -> None:
        """A node with ranks, not the head: all its processes, or Ray's own, which takes the others along."""
        nodes, pids = self._cluster.nodes_of(self._dir), events(self._dir, "formed")[-1]["pids"]
        number = self._draw.choice([node for node in nodes if node])
        other = self._draw.choice([pid for pid, node in zip(pids, nodes, strict=True) if node != number])
        vaults = sum(bool(self._cluster.vaults(node)) for node in range(self._cluster.count))
        raylet, verdicts = self._cluster.raylet(number), len(events(self._dir, "verdict"))
        processes = self._cluster.processes(number)
        with self._recovery(("parity" if vaults > 2 and not self._twins else "peer",)):
            if "round" in what:
                wait_until(lambda: awaits_step(self._dir), RECOVERS_S, "a round")
            for pid in [raylet] if what == "raylet" and raylet is not None else processes:
                send(pid, signal.SIGKILL)
            if "recovery" in what:
                wait_until(lambda: len(events(self._dir, "verdict")) > verdicts, RECOVERS_S, "a verdict")
                send(other, signal.SIGKILL)
        told = events(self._dir, "verdict")[verdicts:]
        assert any("its machine" in verdict["sentence"] for verdict in told)
        wait_until(lambda: not self._cluster.processes(number), RECOVERS_S, "the end of the node's processes")

    @contextmanager
    def _recovery(self, sources: tuple[str, ...]) -> Iterator[None]:
        """The loss inside is borne: the same world, from memory, and from no earlier than the safe step."""
        safe, before = safe_step(self._dir), len(events(self._dir, "restored"))
        yield
        wait_until(lambda: len(events(self._dir, "restored")) > before, RECOVERS_S, "a recovery")
        restored = events(self._dir, "restored")[-1]
        assert events(self._dir, "remedy")[-1]["action"] == "replace"
        assert restored["source"] in sources
        assert restored["from_step"] >= safe >= 0
        self._since = restored["from_step"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes; those that a test has lost are started again for the next."""
    made = Cluster(tmp_path_factory.mktemp("cluster"), 3)
    yield made
    made.close()


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_bears_one_loss_after_the_other(
    cluster: Cluster,
    bench: Bench,
    small: Path,
    run_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    layout: str,
    seed: int,
) -> None:
    """Each loss by itself is borne by the redundancy that was made after the one before."""
    cluster.complete(3)
    draw = random.Random(f"{layout} {seed}")
    options = (*LAYOUTS[layout], *FIXED)
    endless = ("run.steps=1000000", "snapshot.spares=4")
    command = bench.start("train", small, f"run.dir={run_dir}", join(bench, cluster), *options, *endless)
    first_protected(run_dir)
    losses = Losses(cluster, run_dir, draw, twins=layout == "replicated")
    planned = [draw.choice(PROCESSES), draw.choice(NODES), draw.choice(PROCESSES), draw.choice(NODES[:3])]
    for what in planned:
        print(f"{what}, after step {lines(run_dir / 'metrics.jsonl')[-1]['step']}")
        losses.of(what)
    command.process.send_signal(signal.SIGTERM)
    ended = command.wait(ENDS_S)
    assert ended.status == 0, ended.err
    steps = lines(run_dir / "metrics.jsonl")[-1]["step"]
    alone = run_alone(tmp_path_factory.mktemp("undisturbed"), small, *options, f"run.steps={steps}")
    check_as_if_nothing_had_happened(run_dir, alone)
    wait_until(lambda: not cluster.workers(), 30, "the end of all that the run started")
