"""A connection to Ray for the length of one command: an embedded cluster of its own, or a running one.

An embedded cluster listens under a random token, keeps its files in a folder of its own and is ended by the
reaper (`reaper.py`) whatever happens to the command. Nothing of a joined cluster is started or stopped.
"""

import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from . import reaper

OBJECT_STORE_BYTES = 100 << 20  # commands and metrics only; Ray's default would take a third of the memory
REAPER_WAIT_S = 15.0
KNOCK_TIMEOUT_S = 10.0
HEAD_LOOK_S = 2.0  # between knocks at a head, and how long one may take
HEAD_LOST_S = 20.0  # one that keeps its state elsewhere is back within seconds; Ray gives up after a minute
NEEDED_PROCESSES = frozenset({"gcs_server", "raylet"})  # a run goes on without log monitor or dashboard


class SessionError(RuntimeError):
    """No Ray to run on."""


class SessionLost(RuntimeError):
    """Ray itself died under the run; names its processes that are gone."""


@contextmanager
def ray_session(address: str, *, cpus: int, gpus: int, namespace: str) -> Iterator[None]:
    """Be connected to Ray inside the `with`. Raises SessionError when a cluster at `address` cannot be
    joined.

    `address` is "local" for an embedded cluster of `cpus` and `gpus`, else what `ray.init` takes.
    """
    # Ray reads these when it is initialised; a user's own setting stays
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # workers use this environment, not one rebuilt by uv
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if address == "local":
        with _embedded(cpus=cpus, gpus=gpus, namespace=namespace):
            yield
        return
    try:
        _knock(address)
        ray.init(address=address, namespace=namespace, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise SessionError(
            f'run.address = "{address}": no Ray cluster can be joined there ({_one_line(error)}); start '
            'one with "ray start --head", or set run.address="local"'
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError when nobody listens at host:port; Ray would try for more than a minute."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_TIMEOUT_S).close()


def check_embedded() -> None:
    """Raise SessionLost when a process of the embedded Ray is gone; says nothing about a joined cluster.

    Ray's own answer to a lost GCS is to wait, and then to end this process without a word.
    """
    node = ray._private.worker.global_worker.node
    dead = [name for name, _ in node.dead_processes()] if node is not None else []
    if lost := NEEDED_PROCESSES.intersection(dead):
        raise SessionLost(", ".join(sorted(lost)))


class JoinedHead:
    """Whether the head of the cluster at an address, that of its GCS, can be reached.

    Ray's own answer to one that is lost is to end this process, after a minute, without a word.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._heard = self._asked = time.monotonic()

    def check(self) -> None:
        """Raise SessionLost when nobody has listened there for `HEAD_LOST_S`; looks now and then."""
        if (now := time.monotonic()) - self._asked < HEAD_LOOK_S:
            return
        if now - self._asked > HEAD_LOST_S:
            self._heard = now  # nobody has looked for so long
        self._asked = now
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), HEAD_LOOK_S).close()
            self._heard = now
        except OSError:
            if now - self._heard > HEAD_LOST_S:
                raise SessionLost(f"the head of the cluster at {self._address}") from None


@contextmanager
def _embedded(*, cpus: int, gpus: int, namespace: str) -> Iterator[None]:
    reaper.clear_abandoned_memory()
    folder = tempfile.mkdtemp(prefix="rayfold-")  # short: sockets lie in it, whose paths end at 107 letters
    read_end, write_end = os.pipe()
    watcher = subprocess.Popen(
        [sys.executable, "-I", reaper.__file__, folder, str(read_end)],
        pass_fds=[read_end],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )
    os.close(read_end)
    os.set_inheritable(write_end, False)
    os.environ[reaper.MARK] = folder
    # Ray guards a new cluster with a token; without one given it would write one into the home folder, for
    # good
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            namespace=namespace,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        yield
    finally:
        ray.shutdown()
        del os.environ[reaper.MARK]
        os.close(write_end)
        try:
            watcher.wait(REAPER_WAIT_S)
        except subprocess.TimeoutExpired:
            watcher.kill()
            raise SessionError(
                f"processes of the Ray session in {folder} would not end; see ps and remove it"
            ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
