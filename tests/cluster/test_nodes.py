"""A run on several nodes: what is lost with a rank, or a whole node, comes back from the others' memory.

The nodes are Ray nodes of this machine, each with an address, processes and a folder of state of its own.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import (
    Bench,
    Command,
    command_line,
    events,
    final_tensors,
    free_port,
    lines,
    reached,
    wait_until,
)

from rayfold.cluster.reaper import has_variable

NODE_MARK = "RAYFOLD_TEST_NODE"
START_S = 60.0
STEPS = 60
ENDS_S = 400.0  # a run takes ten seconds on two idle cores, and all its processes give way to others
RESUMED_WITHIN_S = 30.0  # 2 s on two idle cores: 1.5 of them until a silent node counts as lost


class Cluster:
    """A head and further nodes, each of one CPU, on this machine."""

    def __init__(self, folder: Path, count: int) -> None:
        self._bench, self.count = Bench(folder), 1
        self._port = free_port()
        self.env = {**self._bench.env, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        head = ["--head", f"--port={self._port}", f"--temp-dir={self._bench.short}/ray"]
        head += ["--include-dashboard=false", f"--ray-client-server-port={free_port()}"]
        self._start(0, *head)
        for number in range(1, count):
            self.add(number)

    @property
    def address(self) -> str:
        """Where the cluster is joined."""
        return f"127.0.0.1:{self._port}"

    def add(self, number: int) -> None:
        """Start one more node."""
        self._start(number, f"--address={self.address}")
        self.count = number + 1

    def _start(self, number: int, *options: str) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", *options, "--num-cpus=1"]
        command += ["--object-store-memory=100000000", "--disable-usage-stats"]
        command += [f"--node-ip-address=127.0.0.{number + 1}", f"--labels=name=node{number}"]
        names = ("metrics-export-port", "dashboard-agent-listen-port", "runtime-env-agent-port")
        command += [f"--{name}={free_port()}" for name in names]
        env = self.env | {NODE_MARK: f"node{number}"}
        # one core each, so that a rank has one thread wherever it is: the bits of a sum depend on it
        command = ["taskset", "-c", str(number % (os.cpu_count() or 1)), *command]
        with open(self._bench.folder / f"node{number}.log", "w") as log:  # not a pipe: daemons would keep it
            subprocess.run(command, env=env, stdout=log, stderr=log, timeout=START_S, check=True)

    def processes(self, number: int) -> list[int]:
        """All processes of a node: its raylet and whatever descends from it."""
        raylets = [
            pid for pid in self._bench.pids("raylet/raylet") if has_variable(pid, NODE_MARK, f"node{number}")
        ]
        found, parents = list(raylets), _parents()
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def node_of(self, pid: int) -> int:
        """The number of the node that a process is on."""
        return next(number for number in range(self.count) if pid in self.processes(number))

    def kill_rank_and_node(self, formed: dict[str, Any]) -> int:
        """Kill a node that has a rank and is not the head, as when its power fails: nothing of it gets to say
        anything. The rank.
        """
        (controller,) = self._bench.pids("ray::Controller")
        assert self.node_of(controller) == 0, "it is where the command is"
        rank, number = next((r, n) for r, n in enumerate(map(self.node_of, formed["pids"])) if n)
        for pid in self.processes(number):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return rank

    def vaults(self, number: int) -> list[int]:
        """The processes of vaults on a node."""
        return [pid for pid in self.processes(number) if "ray::VaultActor" in command_line(pid)]

    def workers(self) -> list[int]:
        """Processes of ranks, controllers and vaults."""
        titles = ("ray::Worker", "ray::Controller", "ray::VaultActor")
        return [pid for title in titles for pid in self._bench.pids(title)]

    def close(self) -> None:
        """End all nodes; only their own processes."""
        for pid in self._bench.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._bench.close()


def _parents() -> dict[int, int]:
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                found[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes for all tests here, which lose one after the other."""
    made = Cluster(tmp_path_factory.mktemp("cluster"), 3)
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, int], Path]:
    """What a run of so many ranks comes to when nothing happens, on one node."""
    made: dict[int, Path] = {}

    def run_of(config: Path, ranks: int) -> Path:
        if ranks not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            bench = Bench(folder)
            ended = start(bench, config, folder / "run", ranks, "snapshot.enabled=false").wait()
            bench.close()
            assert ended.status == 0, ended.err
            made[ranks] = folder / "run"
        return made[ranks]

    return run_of


def start(bench: Bench, config: Path, run_dir: Path, ranks: int, *options: str) -> Command:
    """A run that takes some seconds, checkpoints only at its end and lives on memory before."""
    fixed = (f"run.dir={run_dir}", f"run.steps={STEPS}", "checkpoint.every=0", f"run.workers={ranks}")
    fixed += (
        f"parallel.dp_shard={ranks}",
        "batch.size=6",
        "run.collective_timeout_s=60",
        "run.start_timeout_s=200",
    )
    return bench.start("train", config, *fixed, *options)


def join(bench: Bench, cluster: Cluster) -> str:
    """The override that joins the cluster; commands get its way of authentication."""
    bench.env["RAY_AUTH_MODE"] = "disabled"
    return f"run.address={cluster.address}"


def protected(run_dir: Path) -> list[dict[str, Any]]:
    """The times that the run was said to be protected."""
    return [event for event in events(run_dir, "snapshot") if event.get("protected")]


def check_as_if_nothing_had_happened(run_dir: Path, undisturbed: Path) -> None:
    """Every step told, those trained again marked, every sample once, same parameters to the bit."""
    told = lines(run_dir / "metrics.jsonl")
    assert sorted({line["step"] for line in told}) == list(range(1, STEPS + 1))
    again = [line["step"] for line in told if "attempt" in line]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["lost_steps"] == len(again) == len(told) - STEPS
    # the cursor of samples is part of the progress: none was left out, none came twice
    assert final_tensors(run_dir) == final_tensors(undisturbed)
    keys = ("loss", "grad_norm", "tokens")
    for folder in (run_dir, undisturbed):
        assert {line["step"]: [line[key] for key in keys] for line in lines(folder / "metrics.jsonl")} == {
            line["step"]: [line[key] for key in keys] for line in lines(undisturbed / "metrics.jsonl")
        }


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_lost_node_of_three_is_made_up_for_from_parity(
    cluster: Cluster, bench: Bench, small: Path, run_dir: Path, undisturbed: Callable[[Path, int], Path]
) -> None:
    """SIGKILL of all processes of a node: XOR of the others' blocks has what it held."""
    command = start(bench, small, run_dir, 3, join(bench, cluster), "snapshot.spares=2")
    wait_until(lambda: protected(run_dir), 100, "a run that is protected")
    reached(run_dir, 12)
    (formed,) = events(run_dir, "formed")
    assert len(set(formed["nodes"])) == 3
    rank = cluster.kill_rank_and_node(formed)
    ended = command.wait(ENDS_S)
    assert ended.status == 0, ended.err
    check_lost_node(run_dir, rank, "parity")
    check_as_if_nothing_had_happened(run_dir, undisturbed(small, 3))
    assert cluster.workers() == []


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_a_killed_rank_of_another_node_is_replaced(
    cluster: Cluster, bench: Bench, small: Path, run_dir: Path, undisturbed: Callable[[Path, int], Path]
) -> None:
    """Its state lies in its node's memory, and the only spare, on another node, fetches it from there. The
    node's vault was killed just before.
    """
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
    cluster: Cluster, bench: Bench, small: Path, run_dir: Path, undisturbed: Callable[[Path, int], Path]
) -> None:
    """The other node has all that it held, of the step that was protected last."""
    command = start(bench, small, run_dir, 2, join(bench, cluster), "snapshot.spares=2")
    wait_until(lambda: protected(run_dir), 100, "a run that is protected")
    reached(run_dir, 12)
    (formed,) = events(run_dir, "formed")
    rank = cluster.kill_rank_and_node(formed)
    ended = command.wait(ENDS_S)
    assert ended.status == 0, ended.err
    check_lost_node(run_dir, rank, "peer")
    check_as_if_nothing_had_happened(run_dir, undisturbed(small, 2))
    assert cluster.workers() == []


def check_lost_node(run_dir: Path, rank: int, source: str) -> None:
    """One fault, of a node; all went back to a step that had been protected, and no further."""
    (verdict,), (remedy,) = events(run_dir, "verdict"), events(run_dir, "remedy")
    assert (verdict["class"], verdict["ranks"]) == ("died", [rank])
    assert "does not answer" in verdict["sentence"]
    assert remedy["action"] == "replace"
    assert "went down" in remedy["sentence"]
    (restored,) = events(run_dir, "restored")
    assert restored["source"] == source
    assert restored["from_step"] >= protected(run_dir)[0]["safe_step"]
    assert restored["detect_s"] < RESUMED_WITHIN_S
    assert [event["protected"] for event in events(run_dir, "snapshot") if "protected" in event][:2] == [1, 0]


@pytest.mark.ray
@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_a_damaged_copy_is_refused_and_the_run_goes_on_from_disk(
    cluster: Cluster, bench: Bench, small: Path, run_dir: Path, undisturbed: Callable[[Path, int], Path]
) -> None:
    """Bits flip in memory too; a run that starts from them would never be noticed to be wrong."""
    cluster.add(cluster.count)
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
    cluster.kill_rank_and_node(formed)
    ended = command.wait(ENDS_S)
    assert ended.status == 0, ended.err
    (restored,) = events(run_dir, "restored")
    assert restored["source"] == "disk"
    assert any("damaged" in event.get("message", "") for event in events(run_dir, "snapshot"))
    check_as_if_nothing_had_happened(run_dir, undisturbed(small, 2))
