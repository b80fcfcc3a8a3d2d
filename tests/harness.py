"""Run a function on N ranks of this machine; every parity test goes through here.

Ranks are forked, so they start in a tenth of a second and inherit what the test built; gloo connects them.
"""

import multiprocessing
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

# Forked ranks inherit these; imported by each rank they would cost seconds.
import torch._dynamo
import torch.distributed as dist
import torch.distributed.tensor.parallel

_FORK = multiprocessing.get_context("fork")
_AFTER_FIRST_ERROR_S = 2.0  # an earlier failure of another rank may still be on its way


def run_ranks(world_size: int, fn: Callable[[], Any], *, timeout_s: float = 60.0) -> list[Any]:
    """Call `fn()` on every rank and return its results in rank order (plain values, not tensors).

    Raises AssertionError with the traceback of the rank that failed first: the others fail too, later, only
    because a peer left.
    """
    outcomes = _FORK.Queue()
    with tempfile.TemporaryDirectory() as folder:
        shared = (world_size, f"file://{folder}/store", fn, outcomes)
        ranks = [
            _FORK.Process(target=_rank_main, args=(rank, *shared), daemon=True) for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(outcomes, world_size, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _rank_main(rank: int, world_size: int, store: str, fn: Callable[[], Any], outcomes: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        outcomes.put((rank, fn(), None))
    except BaseException:
        outcomes.put((rank, None, (time.monotonic(), traceback.format_exc())))


def _collect(outcomes: Any, world_size: int, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    errors: dict[int, tuple[float, str]] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) + len(errors) < world_size:
        try:
            rank, result, error = outcomes.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if error is None:
            results[rank] = result
        else:
            errors[rank] = error
            deadline = min(deadline, time.monotonic() + _AFTER_FIRST_ERROR_S)
    if errors:
        first = min(errors, key=lambda r: errors[r][0])
        raise AssertionError(f"rank {first} of {world_size} failed first:\n{errors[first][1]}")
    if missing := sorted(set(range(world_size)) - set(results)):
        raise AssertionError(f"ranks {missing} of {world_size} did not finish in {timeout_s:.0f} s")
    return [results[rank] for rank in range(world_size)]
