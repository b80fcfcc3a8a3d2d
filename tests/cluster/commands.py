"""Run the real `rayfold` command as a user does, and see all that it starts.

Every command gets a home and a temporary folder of its own and a mark in its environment, which all processes
it starts inherit. So what belongs to a test is known exactly, whatever else runs on the machine.
"""

import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayfold.cluster.reaper import MARK, has_variable, writes_below
from rayfold.runtime.checkpoint.format import read_index
from rayfold.runtime.checkpoint.shelf import Shelf
from rayfold.runtime.checkpoint.storage import read_chunk

RAYFOLD = str(Path(sys.executable).with_name("rayfold"))
TEST_MARK = "RAYFOLD_TEST"
RUN_TIMEOUT_S = 200.0  # a whole small run takes 15 s on two idle cores, and ten times that on busy ones
GONE_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def verdict(self) -> str:
        """The last line of standard error."""
        return self.err.rstrip().splitlines()[-1]

    @property
    def result(self) -> dict[str, Any]:
        """The JSON object on the last line of standard output."""
        value: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return value


class Command:
    """A started command, with or without a terminal of its own (`on_terminal`)."""

    def __init__(
        self, args: tuple[str, ...], *, cwd: Path, env: dict[str, str], on_terminal: bool = False
    ) -> None:
        self._terminal, self._shown = -1, bytearray()
        self._read: list[threading.Thread] = []
        self._text: dict[str, str] = {"out": "", "err": ""}
        if on_terminal:
            self._terminal, slave = pty.openpty()
            self.process = subprocess.Popen(
                args,
                cwd=cwd,
                env=env,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )
            os.close(slave)
            self._start(self._read_terminal)
            return
        self.process = subprocess.Popen(
            args,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._start(lambda: self._read_pipe("out", self.process.stdout))
        self._start(lambda: self._read_pipe("err", self.process.stderr))

    def wait(self, timeout_s: float = RUN_TIMEOUT_S) -> Ended:
        """Wait for the end of the command and of all its output."""
        status = self.process.wait(timeout_s)
        for thread in self._read:
            thread.join(GONE_TIMEOUT_S)
        return Ended(status, self._text["out"], self._text["err"])

    def shown(self) -> str:
        """What it has written so far, on both outputs or its terminal."""
        return self._text["out"] + self._text["err"]

    def press_ctrl_c(self) -> None:
        """The key itself: the terminal sends SIGINT to every process in its foreground."""
        os.write(self._terminal, b"\x03")

    def kill(self) -> None:
        """End the command itself without a chance to clean up."""
        self.process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End the command if it still runs, and close what reads its output."""
        if self.process.poll() is None:
            self.kill()
            self.process.wait(GONE_TIMEOUT_S)
        for thread in self._read:
            thread.join(GONE_TIMEOUT_S)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        if self._terminal >= 0:
            os.close(self._terminal)
            self._terminal = -1

    def _start(self, target: Callable[[], None]) -> None:
        self._read.append(threading.Thread(target=target, daemon=True))
        self._read[-1].start()

    def _read_pipe(self, name: str, stream: Any) -> None:
        for line in stream:
            self._text[name] += line

    def _read_terminal(self) -> None:
        with contextlib.suppress(OSError):  # a terminal nobody holds any more reads as an input error
            while data := os.read(self._terminal, 4096):
                self._shown += data
                self._text["out"] = self._text["err"] = self._shown.decode(errors="replace")


@dataclass
class Bench:
    """One test's place to run commands: folders, environment, and an account of what they leave behind."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    short: Path = field(init=False)  # Ray keeps sockets below it, whose paths end at 107 characters
    env: dict[str, str] = field(init=False)
    _commands: list[Command] = field(default_factory=list)
    _ports: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.short = Path(tempfile.mkdtemp(prefix="rf-", dir="/tmp"))
        (self.folder / "home").mkdir()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "RAYFOLD"))}
        self.env = {
            **kept,
            TEST_MARK: self.mark,
            "TMPDIR": str(self.short),
            "HOME": str(self.folder / "home"),
            "COLUMNS": "120",
        }
        self._shared_memory = set(os.listdir("/dev/shm"))

    def start(self, *args: str | Path, on_terminal: bool = False, cwd: Path | None = None) -> Command:
        """Start `rayfold ARGS` in the bench's folder."""
        command = Command(
            (RAYFOLD, *map(str, args)), cwd=cwd or self.folder, env=self.env, on_terminal=on_terminal
        )
        self._commands.append(command)
        return command

    def run(self, *args: str | Path, timeout_s: float = RUN_TIMEOUT_S, cwd: Path | None = None) -> Ended:
        """Run `rayfold ARGS` to its end."""
        return self.start(*args, cwd=cwd).wait(timeout_s)

    def processes(self) -> list[int]:
        """Ids of the live commands of this test and of all processes that they started, however deep."""
        return [pid for pid in _live_processes() if self._started(pid)]

    def sessions(self) -> set[str]:
        """Folders of the embedded Ray sessions that are up."""
        marks = (_variable(pid, MARK) for pid in self.processes())
        return {mark for mark in marks if mark}

    def remember_ports(self) -> set[int]:
        """Note the ports that the commands' processes listen on right now; they must be closed in the end."""
        inodes = {inode for pid in self.processes() for inode in _sockets(pid)}
        ports = {port for port, inode in _listening().items() if inode in inodes}
        self._ports |= ports
        return ports

    def pids(self, title: str) -> list[int]:
        """The bench's processes whose command line contains `title`."""
        return [pid for pid in self.processes() if title in command_line(pid)]

    def left_behind(self) -> list[str]:
        """What is still there after all commands have ended, given a moment to go; empty if all is clean."""
        wait_until(lambda: not self._left(), GONE_TIMEOUT_S, "")
        return self._left()

    def close(self) -> None:
        """End whatever is left, so that one failed test does not disturb the next."""
        for command in self._commands:
            command.close()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.short, ignore_errors=True)

    def _started(self, pid: int) -> bool:
        with contextlib.suppress(OSError):  # gone meanwhile
            return has_variable(pid, TEST_MARK, self.mark) or writes_below(pid, str(self.short))
        return False

    def _left(self) -> list[str]:
        left = [f"process {pid}: {command_line(pid)}" for pid in self.processes()]
        # torch's compiler makes its cache folder when it is imported; it is meant to outlast the process
        left += [f"temporary {p}" for p in self.short.iterdir() if not p.name.startswith("torchinductor_")]
        left += [f"in the home folder: {path}" for path in (self.folder / "home").iterdir()]
        left += [f"/dev/shm/{name}" for name in set(os.listdir("/dev/shm")) - self._shared_memory]
        left += [f"port {port} still listens" for port in self._ports & _listening().keys()]
        return left


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true value of `condition`; without `what` also a false one at the end, else an error."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert value or not what, f"{what} did not happen within {timeout_s:.0f} s"
    return value


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON lines file that may still be written to; none where it is not there yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind."""
    return [event for event in lines(run_dir / "events.jsonl") if event["kind"] == kind]


def reached(run_dir: Path, step: int, *, timeout_s: float = RUN_TIMEOUT_S) -> None:
    """Wait until the record of the run holds `step`."""
    at = lambda: any(line["step"] >= step for line in lines(run_dir / "metrics.jsonl"))  # noqa: E731
    wait_until(at, timeout_s, f"step {step} of {run_dir}")


def final_tensors(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Progress and all tensors of the newest checkpoint, as bytes by name and position."""
    shelf = Shelf(run_dir / "checkpoints", keep=1)
    folder = shelf.path(shelf.steps()[0])
    index = read_index(folder)
    tensors = {
        name: {
            chunk.offsets: read_chunk(folder, entry, chunk).numpy().tobytes()
            for chunk in sorted(entry.chunks, key=lambda c: c.offsets)
        }
        for name, entry in index.tensors.items()
    }
    return index.progress, tensors


def command_line(pid: int) -> str:
    """The command line of a process, as it calls itself; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _live_processes() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state not in "ZX":
                yield int(name)


def _environment(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _variable(pid: int, name: str) -> str:
    return next((e.partition("=")[2] for e in _environment(pid) if e.startswith(f"{name}=")), "")


def _sockets(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for handle in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{handle}")
                if target.startswith("socket:["):
                    yield target[8:-1]


def _listening() -> dict[int, str]:
    """Listening TCP ports of this machine and the inode of each one's socket."""
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            parts = line.split()
            if parts[3] == "0A":
                found[int(parts[1].rpartition(":")[2], 16)] = parts[9]
    return found
