"""Six nodes keep P and Q for one another: any two of them may be lost."""

import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Bench, events, lines, wait_until
from nodes import (
    ENDS_S,
    SHAPE,
    TIMES,
    Cluster,
    check_as_if_nothing_had_happened,
    first_protected,
    join,
    run_alone,
    safe_step,
    send,
)

NODES, SPARES, STEPS = 6, 3, 120
LAYOUTS = {
    "pipeline and sharded": ("parallel.pp=3", "parallel.dp_shard=2"),
    "tensor and replicated": ("parallel.tp=3", "parallel.dp_replicate=2"),
}
FIXED = (*SHAPE, *TIMES, "checkpoint.every=0", f"run.steps={STEPS}", f"run.workers={NODES}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Six nodes; those that a test has lost are started again for the next."""
    made = Cluster(tmp_path_factory.mktemp("cluster"), NODES)
    yield made
    made.close()


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs to which nothing happened, by layout."""
    return {}


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("how", ["one", "two at once", "another in the recovery"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lost_nodes_of_six_are_made_up_for(
    cluster: Cluster,
    bench: Bench,
    small: Path,
    run_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    baselines: dict[str, Path],
    layout: str,
    how: str,
    seed: int,
) -> None:
    """From two parities of four blocks, on nodes that do not share a process."""
    cluster.complete(NODES)
    options = (*LAYOUTS[layout], *FIXED, f"snapshot.spares={SPARES}")
    command = bench.start("train", small, f"run.dir={run_dir}", join(bench, cluster), *options)
    first_protected(run_dir)
    nodes = cluster.nodes_of(run_dir)
    assert sorted(nodes) == list(range(NODES))
    wait_until(lambda: sum(cluster.spares(run_dir)) == SPARES, ENDS_S, "spares")
    without_spares = [node for node, spares in enumerate(cluster.spares(run_dir)) if node and not spares]
    lost = [without_spares[(seed + i) % len(without_spares)] for i in range(1 if how == "one" else 2)]
    safe, at = safe_step(run_dir), lines(run_dir / "metrics.jsonl")[-1]["step"]
    dying = [cluster.processes(number) for number in lost]
    at_once = dying[:1] if how == "another in the recovery" else dying
    for pid in itertools.chain(*at_once):
        send(pid, signal.SIGKILL)
    if how == "another in the recovery":
        wait_until(lambda: events(run_dir, "verdict"), ENDS_S, "a verdict about the first")
        for pid in dying[1]:
            send(pid, signal.SIGKILL)
    ended = command.wait(ENDS_S)
    assert ended.status == 0, ended.err
    told = [
        (event["source"], event["from_step"], event["lost_steps"]) for event in events(run_dir, "restored")
    ]
    print(f"lost {lost} after step {at}, safe {safe}, restored {told}")
    assert events(run_dir, "snapshot")[0]["scheme"] == "pq"
    assert told
    # a rank may have a twin on a node that is left
    sources = {"parity"} if "parallel.dp_replicate=2" not in LAYOUTS[layout] else {"parity", "peer"}
    assert all(source in sources and step >= safe for source, step, _ in told), events(run_dir, "snapshot")
    ranks = {rank for event in events(run_dir, "remedy") for rank in event["ranks"]}
    assert ranks == {nodes.index(node) for node in lost}
    if layout not in baselines:
        folder = tmp_path_factory.mktemp("undisturbed")
        baselines[layout] = run_alone(folder, small, *LAYOUTS[layout], *FIXED)
    check_as_if_nothing_had_happened(run_dir, baselines[layout])
    wait_until(lambda: not cluster.workers(), 30, "the end of all that the run started")
