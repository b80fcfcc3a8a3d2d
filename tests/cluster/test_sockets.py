"""Breaking gloo from another thread: whoever waits raises at once, whatever else talks goes on."""

import os
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from rayfold.cluster.sockets import break_connections_to, break_gloo, forget_groups, gloo_sockets

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fdinfo"), reason="needs Linux")
WORLD, STUCK = 4, 2
WITHIN_S = 1.0


def another_connection() -> tuple[socket.socket, socket.socket]:
    """A connected pair over a listening socket of this process, as gRPC or a web server would have."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return client, server.accept()[0]


def reduce_until_broken(group: dist.ProcessGroup) -> tuple[float, bool]:
    """Reduce until it raises, broken by a control thread; when it raised, and whether others could talk."""
    told: dict[str, float] = {}
    x = torch.ones(1000)

    def waits() -> None:
        try:
            while True:
                dist.all_reduce(x, group=group)
        except RuntimeError:
            told["raised"] = time.monotonic()

    thread = threading.Thread(target=waits, daemon=True)
    thread.start()
    client, served = another_connection()  # opened while the groups are in use
    time.sleep(0.5)
    begun = time.monotonic()
    break_gloo()
    thread.join(10.0)
    client.sendall(b"still here")
    others = served.recv(10) == b"still here"
    return told["raised"] - begun, others


def test_ranks_that_wait_for_a_stopped_one_raise_at_once_and_form_a_new_group() -> None:
    """Gloo's own way out is its timeout of half an hour; nobody else's connection may be harmed."""
    timeout = timedelta(seconds=60)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)

    def on_rank() -> tuple[float, bool, float, int]:
        rank = dist.get_rank()
        group = dist.new_group(range(WORLD))
        dist.all_reduce(torch.ones(1), group=group)
        assert len(gloo_sockets()) == 2 * (WORLD - 1)
        dist.barrier()
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timeout)
        if rank == STUCK:
            store.set("pid", str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
            return 0.0, True, 4.0, 0
        after_s, others = reduce_until_broken(group)
        dist.destroy_process_group()
        left = len(gloo_sockets())
        number = [r for r in range(WORLD) if r != STUCK].index(rank)
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("epoch-2", store), rank=number, world_size=WORLD - 1
        )
        total = torch.ones(1)
        dist.all_reduce(total)
        if rank == 0:
            os.kill(int(store.get("pid")), signal.SIGCONT)
        return after_s, others, total.item() + 1, left

    for after_s, others, size, left in run_ranks(WORLD, on_rank, timeout_s=60):
        assert after_s < WITHIN_S
        assert others, "a connection of somebody else's was cut"
        assert size == WORLD
        assert left == 0


def test_a_rank_that_waits_on_the_store_is_let_go() -> None:
    """While a new group forms its ranks wait on keys of one that may have died meanwhile."""
    timeout = timedelta(seconds=60)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timeout)
    told: dict[str, float] = {}

    def waits() -> None:
        try:
            client.get("never told")
        except RuntimeError:
            told["raised"] = time.monotonic()

    thread = threading.Thread(target=waits, daemon=True)
    thread.start()
    time.sleep(0.2)
    begun = time.monotonic()
    assert break_connections_to(server.port) >= 1
    thread.join(10.0)
    assert told["raised"] - begun < WITHIN_S


def test_a_rank_whose_attempt_to_join_was_broken_off_joins_one_that_has_made_none() -> None:
    """A rank dies while all form: the others try again, with a new process that has never tried."""
    timeout = timedelta(seconds=20)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)

    def on_rank() -> float:
        rank = dist.get_rank()
        forget_groups()
        if rank == 0:
            alone = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timeout)
            threading.Timer(0.5, break_connections_to, (server.port,)).start()
            with pytest.raises(RuntimeError):
                dist.init_process_group(
                    "gloo", store=dist.PrefixStore("epoch-1", alone), rank=0, world_size=2
                )
            forget_groups()
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timeout)
        scoped = dist.PrefixStore("epoch-2", store)
        dist.init_process_group("gloo", store=scoped, rank=rank, world_size=2)
        total = torch.ones(1)
        dist.all_reduce(total, group=dist.new_group([0, 1]))
        return total.item()

    assert run_ranks(2, on_rank, timeout_s=60) == [2.0, 2.0]
