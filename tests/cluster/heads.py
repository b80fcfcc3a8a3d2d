"""A Ray cluster of one node that a user has started: commands join it."""

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

from commands import Bench, command_line, free_port

CPUS = 4


class Head:
    """A Ray head node of a user's, with its own processes, ports and folder."""

    def __init__(self, folder: Path, **env: str) -> None:
        """`env` is added to the environment of all of its processes."""
        self._bench = Bench(folder)
        free: set[int] = set()
        while len(free) < 6:  # the kernel may offer a port again that nobody listens on yet
            free.add(free_port())
        self.port, self.metrics_port, *others = free
        self.env = {**self._bench.env, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **env}
        ports = {
            "port": self.port,
            "metrics-export-port": self.metrics_port,
            "ray-client-server-port": others[0],
            "dashboard-agent-listen-port": others[1],
            "dashboard-agent-grpc-port": others[2],
            "runtime-env-agent-port": others[3],
        }
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--include-dashboard=false"]
        command += [f"--num-cpus={CPUS}", "--object-store-memory=100000000", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", f"--temp-dir={self._bench.short}/ray"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        self.log = folder / "head.log"  # not a pipe: the daemons inherit it and would keep it open
        with open(self.log, "w") as log:
            subprocess.run(command, env=self.env, stdout=log, stderr=log, timeout=100, check=True)

    @property
    def address(self) -> str:
        """Where the cluster is joined."""
        return f"127.0.0.1:{self.port}"

    def ask(self, code: str) -> str:
        """Evaluate an expression as another user of the cluster, who is connected to it."""
        program = f"import ray; ray.init({self.address!r}, log_to_driver=False); print({code})"
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return ended.stdout.strip().splitlines()[-1]

    def workers(self) -> list[int]:
        """Processes of ranks, controllers and vaults that are alive on the cluster."""
        kinds = ("Worker", "Controller", "VaultActor")  # behind the name of an actor that has one
        return [pid for pid in self._bench.pids("ray::") if any(kind in command_line(pid) for kind in kinds)]

    def metrics(self) -> str:
        """What Prometheus would read from the node."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as page:
            text: str = page.read().decode()
            return text

    def kill(self, *titles: str) -> None:
        """`kill -9` of the processes with one of these in their command line."""
        for title in titles:
            for pid in self._bench.pids(title):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End the node; only its own processes."""
        for pid in self._bench.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._bench.close()
