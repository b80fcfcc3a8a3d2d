"""Signals that are heard while Python is busy elsewhere: real processes, real signals, no Ray."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

HEARD_S = 10.0  # at once; a busy machine may take a moment
PROGRAM = """
import ctypes, os, signal, sys, time
from rayfold.cluster.signals import hear

def heard():
    print("heard", flush=True)

hear({signal.SIGTERM: heard})
if sys.argv[1] == "fork" and (child := os.fork()):
    print(child, flush=True)
    print("the child ended by", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    print(os.getpid(), flush=True)
waits, _ = os.pipe()
print("woken", ctypes.CDLL(None).read(waits, ctypes.create_string_buffer(1), 1), flush=True)
"""


@pytest.fixture(params=["alone"])
def program(request: pytest.FixtureRequest) -> Iterator["subprocess.Popen[str]"]:
    """A process that hears SIGTERM, and whose first thread waits in native code."""
    command = [sys.executable, "-c", PROGRAM, request.param]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate(timeout=HEARD_S)


def line_of(process: "subprocess.Popen[str]") -> str:
    """The next line that it writes."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.timeout(60)
def test_a_signal_is_heard_at_once_and_disturbs_nothing(program: "subprocess.Popen[str]") -> None:
    """A rank may be in native code for seconds, and its notice to leave is as short as that."""
    assert line_of(program) == str(program.pid)
    for _ in range(3):
        os.kill(program.pid, signal.SIGTERM)
        assert line_of(program) == "heard", "and it waits on"
    assert program.poll() is None


@pytest.mark.timeout(60)
@pytest.mark.parametrize("program", ["fork"], indirect=True)
def test_a_signal_to_a_child_is_none_to_its_parent(program: "subprocess.Popen[str]") -> None:
    """Programs end the processes that they have forked by SIGTERM, and those share the socket."""
    lines = {line_of(program), line_of(program)}
    (child,) = {int(line) for line in lines} - {program.pid}
    os.kill(child, signal.SIGTERM)
    assert line_of(program) == f"the child ended by {-signal.SIGTERM}"
    os.kill(program.pid, signal.SIGTERM)
    assert line_of(program) == "heard"
