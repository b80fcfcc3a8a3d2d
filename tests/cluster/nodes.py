"""Several Ray nodes on this machine, each with an address, processes and a folder of state of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from commands import Bench, command_line, events, final_tensors, free_port, lines, wait_until

from rayfold.cluster.reaper import has_variable
from rayfold.faulttol.header import ImageError
from rayfold.faulttol.pins import header_of

NODE_MARK = "RAYFOLD_TEST_NODE"
START_S = 60.0
PROTECTED_S = 100.0  # a round takes tenths of a second on idle cores
STARTS_S = 400.0  # ten seconds on idle cores, for each four processes
RECOVERS_S = 100.0  # 2 s on idle cores
ENDS_S = 400.0  # a run takes some seconds on two idle cores, and all its processes give way to others
SHAPE = (
    "model.dim=48",
    "model.heads=6",
    "model.kv_heads=6",
    "model.layers=3",
    "data.seq_len=48",
    "batch.size=6",
)
TIMES = ("run.collective_timeout_s=60", "run.start_timeout_s=200")


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int = field(compare=False)  # another when that has ended
    started: str  # ids are used again


class Cluster:
    """A head and further nodes, each of one CPU, on this machine."""

    def __init__(self, folder: Path, count: int, *, zones: Mapping[int, str] | None = None) -> None:
        """`zones`: the zone label of nodes by their numbers."""
        self._bench, self.count, self._zones = Bench(folder), 1, zones or {}
        self._raylets: dict[int, _Process] = {}  # by node
        self._known: dict[int, list[_Process]] = {}  # by node, as seen last
        self._port = free_port()
        self.env = {**self._bench.env, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        # When a node is gone, Ray's own processes on the head are busy for as long as the placement group of
        # the run is not whole, and would leave nothing of their core to ranks that give way to them.
        self.env |= {"RAY_enable_metrics_collection": "0", "RAY_worker_niceness": "0"}
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
        """Start one more node, or one that was lost."""
        self._start(number, f"--address={self.address}")
        self.count = max(self.count, number + 1)

    def complete(self, count: int) -> None:
        """Start those of the first `count` nodes that are not there."""
        for number in range(1, count):
            if not self.raylet(number):
                self.add(number)

    def _start(self, number: int, *options: str) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "start", *options, "--num-cpus=1"]
        command += ["--object-store-memory=100000000", "--disable-usage-stats"]
        labels = f"name=node{number}" + (f",zone={zone}" if (zone := self._zones.get(number)) else "")
        command += [f"--node-ip-address=127.0.0.{number + 1}", f"--labels={labels}"]
        names = ("metrics-export-port", "dashboard-agent-listen-port", "runtime-env-agent-port")
        command += [f"--{name}={free_port()}" for name in names]
        env = self.env | {NODE_MARK: f"node{number}"}
        # one core each, so that a rank has one thread wherever it is: the bits of a sum depend on it
        command = ["taskset", "-c", str(number % (os.cpu_count() or 1)), *command]
        with open(self._bench.folder / f"node{number}.log", "w") as log:  # not a pipe: daemons would keep it
            subprocess.run(command, env=env, stdout=log, stderr=log, timeout=START_S, check=True)
        pids = self._bench.pids("raylet/raylet")
        (pid,) = [pid for pid in pids if has_variable(pid, NODE_MARK, f"node{number}")]
        self._raylets[number] = _processes()[pid]
        self._known[number] = [self._raylets[number]]

    def raylet(self, number: int) -> int | None:
        """The process by which Ray manages a node, if it is there."""
        seen = _processes()
        known = self._raylets.get(number)
        return known.pid if known is not None and seen.get(known.pid) == known else None

    def processes(self, number: int) -> list[int]:
        """All processes of a node: its raylet and whatever descends from it, or did so when this was asked
        before.
        """
        seen = _processes()
        found = [each for each in self._known.get(number, ()) if seen.get(each.pid) == each]
        for each in found:  # grows
            found += [child for child in seen.values() if child.parent == each.pid and child not in found]
        self._known[number] = found
        return [each.pid for each in found]

    def node_of(self, pid: int) -> int:
        """The number of the node that a process is on."""
        return next(number for number in range(self.count) if pid in self.processes(number))

    def nodes_of(self, run_dir: Path) -> list[int]:
        """The number of each rank's node, in the run's present epoch."""
        homes = {pid: number for number in range(self.count) for pid in self.processes(number)}
        return [homes[pid] for pid in events(run_dir, "formed")[-1]["pids"]]

    def spares(self, run_dir: Path) -> list[int]:
        """How many of the run's spares are ready on each node."""
        ranks = events(run_dir, "formed")[-1]["pids"]
        nodes = [
            [command_line(pid) for pid in self.processes(n) if pid not in ranks] for n in range(self.count)
        ]
        ready = [
            [t for t in titles if t.startswith("ray::Worker") and "__init__" not in t] for titles in nodes
        ]
        return list(map(len, ready))

    def kill(self, number: int) -> None:
        """As when its power fails: nothing of the node gets to say anything."""
        for pid in self.processes(number):
            send(pid, signal.SIGKILL)

    def vaults(self, number: int) -> list[int]:
        """The processes of vaults on a node."""
        return [pid for pid in self.processes(number) if "ray::VaultActor" in command_line(pid)]

    def workers(self) -> list[int]:
        """Processes of ranks, controllers and vaults."""
        kinds = ("Worker", "Controller", "VaultActor")
        return [pid for pid in self._bench.pids("ray::") if any(kind in command_line(pid) for kind in kinds)]

    def close(self) -> None:
        """End all nodes; only their own processes."""
        for pid in self._bench.processes():
            send(pid, signal.SIGKILL)
        self._bench.close()


def join(bench: Bench, cluster: Cluster) -> str:
    """The override that joins the cluster; commands get its way of authentication."""
    bench.env["RAY_AUTH_MODE"] = "disabled"
    return f"run.address={cluster.address}"


def safe_step(run_dir: Path) -> int:
    """The step that all ranks keep since other nodes have what protects it, -1: none."""
    kept = []
    for node in set(events(run_dir, "formed")[-1]["nodes"]):
        for path in Path("/dev/shm").glob(f"*-state/{node[:16]}/rank-*.slot-0"):
            with contextlib.suppress(OSError, ImageError), header_of(path) as header:
                kept.append(header.kept)
    return min(kept, default=-1)


def awaits_step(run_dir: Path) -> bool:
    """Whether a round of protection is under way, whose step is not protected yet."""
    for node in set(events(run_dir, "formed")[-1]["nodes"]):
        for path in Path("/dev/shm").glob(f"*-state/{node[:16]}/rank-*.slot-0"):
            with contextlib.suppress(OSError, ImageError), header_of(path) as header:
                return header.awaited >= 0
    return False


def protected_since(run_dir: Path, step: int) -> None:
    """Wait until a step after `step` is safe."""
    wait_until(lambda: safe_step(run_dir) > step, PROTECTED_S, f"a step after {step} that is safe")


def first_protected(run_dir: Path) -> None:
    """Wait until a run that was just started is protected."""
    wait_until(lambda: events(run_dir, "formed") and safe_step(run_dir) > 0, STARTS_S, "a safe step")


def run_alone(folder: Path, config: Path, *options: str) -> Path:
    """The folder of a run to which nothing happens, on one node."""
    bench, run_dir = Bench(folder), folder / "run"
    ended = bench.start("train", config, f"run.dir={run_dir}", "snapshot.enabled=false", *options).wait(
        ENDS_S
    )
    bench.close()
    assert ended.status == 0, ended.err
    return run_dir


def check_as_if_nothing_had_happened(run_dir: Path, undisturbed: Path) -> None:
    """Every step told, those trained again marked, every sample once, same parameters to the bit."""
    told, expected = lines(run_dir / "metrics.jsonl"), lines(undisturbed / "metrics.jsonl")
    again = [line["step"] for line in told if "attempt" in line]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["lost_steps"] == len(again) == len(told) - len(expected)
    keys = ("step", "loss", "grad_norm", "tokens")
    last = {line["step"]: [line[key] for key in keys] for line in told}
    assert last == {line["step"]: [line[key] for key in keys] for line in expected}
    assert final_tensors(run_dir) == final_tensors(undisturbed)  # the cursor of samples is among them


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may be gone by now."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _processes() -> dict[int, _Process]:
    """All that are alive."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    found[int(name)] = _Process(int(name), int(fields[1]), fields[19])
    return found
