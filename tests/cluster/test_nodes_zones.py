"""Twelve nodes in three zones: two groups, each with as much of a zone as it can lose."""

import itertools
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Bench, events, wait_until
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

NODES, STEPS = 12, 60
ZONES = {number: "abc"[number // 4] for number in range(NODES)}  # neighbours, so that a group would have all
LAYOUT = ("parallel.pp=3", "parallel.tp=2", "parallel.dp_shard=2")
FIXED = (*SHAPE, *TIMES, *LAYOUT, "checkpoint.every=0", f"run.steps={STEPS}", f"run.workers={NODES}")


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes a zone."""
    made = Cluster(tmp_path_factory.mktemp("cluster"), NODES, zones=ZONES)
    yield made
    made.close()


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(1500)
def test_a_whole_zone_may_be_lost(
    cluster: Cluster, bench: Bench, small: Path, run_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Four nodes at once, two of each group, whose P and Q bear two."""
    command = bench.start(
        "train", small, f"run.dir={run_dir}", join(bench, cluster), *FIXED, "snapshot.spares=8"
    )
    first_protected(run_dir)
    assert sorted(cluster.nodes_of(run_dir)) == list(range(NODES))
    lost = [number for number, zone in ZONES.items() if zone == "c"]
    kept = slice(0, lost[0])
    wait_until(lambda: sum(cluster.spares(run_dir)[kept]) >= len(lost), ENDS_S, "spares in other zones")
    safe = safe_step(run_dir)
    for pid in list(itertools.chain(*map(cluster.processes, lost))):
        send(pid, signal.SIGKILL)
    ended = command.wait(ENDS_S)
    assert ended.status == 0, ended.err
    told = [(event["source"], event["from_step"]) for event in events(run_dir, "restored")]
    print(f"safe {safe}, restored {told}")
    assert told
    assert all(source == "parity" and step >= safe for source, step in told), events(run_dir, "snapshot")
    alone = run_alone(tmp_path_factory.mktemp("undisturbed"), small, *FIXED)
    check_as_if_nothing_had_happened(run_dir, alone)
    wait_until(lambda: not cluster.workers(), 30, "the end of all that the run started")
