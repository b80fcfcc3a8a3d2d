"""Epochs: one bump wins, and whoever belongs to an older one is kept out.

On a real store, with threads and with processes that race.
"""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from rayfold.faulttol.epoch import KEY, Fence, Fenced, begin_at, bump, current, scoped

TIMEOUT = timedelta(seconds=20)  # for each answer of the store; a busy machine is slow
RACERS, ROUNDS = 6, 30


def client(port: int) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=TIMEOUT, wait_for_workers=False)


def test_a_new_store_is_at_epoch_0_and_counts_from_there(store: dist.TCPStore) -> None:
    """No key has to be put there first, and asking waits for nobody."""
    assert current(store) == 0
    assert [bump(store, 0), bump(store, 1), current(store)] == [1, 2, 2]


def test_a_store_that_takes_the_place_of_a_lost_one_stands_where_that_stood(store: dist.TCPStore) -> None:
    """A controller that is started again must not begin an epoch for a second time."""
    begin_at(store, 4)
    assert [current(store), bump(store, 4)] == [4, 5]
    with pytest.raises(Fenced, match="at epoch 5 already"):
        begin_at(store, 4)


@pytest.mark.parametrize("expected", [0, 2, 7])
def test_a_bump_from_another_epoch_is_refused(store: dist.TCPStore, expected: int) -> None:
    """A controller that slept must not undo what was decided since."""
    bump(store, 0)
    with pytest.raises(Fenced, match=f"the run is at epoch 1, not at {expected}"):
        bump(store, expected)
    assert current(store) == 1


def wins(store: dist.Store, expected: int) -> bool:
    try:
        return bump(store, expected) == expected + 1
    except Fenced:
        return False


def test_of_racing_threads_one_bump_wins(store: dist.TCPStore) -> None:
    """All write the same number: without a mark of its own every loser would think it had won."""
    start = threading.Barrier(RACERS)

    def race(own: dist.TCPStore) -> list[bool]:
        told = []
        for expected in range(ROUNDS):
            start.wait(TIMEOUT.seconds)
            told.append(wins(own, expected))
        return told

    clients = [client(store.port) for _ in range(RACERS)]
    with ThreadPoolExecutor(RACERS) as threads:
        told = list(threads.map(race, clients, timeout=TIMEOUT.seconds))
    assert [sum(one) for one in zip(*told, strict=True)] == [1] * ROUNDS
    assert current(store) == ROUNDS


def test_of_racing_processes_one_bump_wins(store: dist.TCPStore) -> None:
    """Two controllers after a partition are two processes."""
    fork = multiprocessing.get_context("fork")
    outcomes = fork.Queue()
    born, start = fork.Barrier(4), fork.Barrier(4)

    def race() -> None:
        # the store's thread serves nobody, and holds no lock, while others are forked
        born.wait(TIMEOUT.seconds)
        own = client(store.port)
        start.wait(TIMEOUT.seconds)
        outcomes.put([wins(own, expected) for expected in range(ROUNDS)])

    racers = [fork.Process(target=race, daemon=True) for _ in range(4)]
    for racer in racers:
        racer.start()
    try:
        told = [outcomes.get(timeout=TIMEOUT.seconds) for _ in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.join()
    assert [sum(one) for one in zip(*told, strict=True)] == [1] * ROUNDS
    assert current(store) == ROUNDS


def test_a_fence_holds_back_the_past_and_the_future(store: dist.TCPStore) -> None:
    """A rank that was stopped and goes on again finds the run elsewhere, before it can do harm."""
    for expected in range(5):
        bump(store, expected)
    Fence(client(store.port), 5).check()
    for epoch in (3, 6):
        with pytest.raises(Fenced, match=f"rank 2 of epoch {epoch} in a run that is at epoch 5"):
            Fence(store, epoch, who="rank 2").check()


def test_a_fence_without_a_store_is_closed() -> None:
    """Who cannot ask cannot know, and must not commit."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=TIMEOUT, wait_for_workers=False)
    fence = Fence(client(server.port), current(server))
    fence.check()
    del server
    with pytest.raises(Fenced, match=r"a rank of epoch 0 cannot tell .* does not answer"):
        fence.check()


def test_epochs_do_not_see_each_other_s_keys(store: dist.TCPStore) -> None:
    """Process groups of two epochs use the same names; an old rank must meet nobody there."""
    scoped(store, 1).set("address", "old")
    assert not scoped(store, 2).check(["address"])
    assert scoped(client(store.port), 1).get("address") == b"old"
    assert current(store) == 0


def test_a_foreign_value_is_refused(store: dist.TCPStore) -> None:
    """Someone else's key of that name is not read as a number of ours."""
    store.set(KEY, "hello")
    with pytest.raises(Fenced, match='holds "hello", which is no epoch'):
        current(store)
