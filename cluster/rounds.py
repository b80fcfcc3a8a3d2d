"""Rounds that the vaults of a run do together, one after the other, for the ranks of one epoch.

They go on beside training, from a thread of the controller's process, and end when their epoch does.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from .vault import Vaults

LOOK_EVERY_S = 0.1  # at whether a round is to be given up
ANSWER_S = 30.0  # for a call that moves no state, on a machine that is busy


@dataclass(frozen=True)
class Epoch:
    """Whose steps the rounds are about."""

    number: int
    homes: tuple[str, ...]  # node of each rank

    def ranks_on(self, nodes: Iterable[str]) -> dict[str, list[int]]:
        """The ranks on each of `nodes`."""
        return {node: [rank for rank, home in enumerate(self.homes) if home == node] for node in nodes}


class RoundFailed(RuntimeError):
    """A round came to nothing; what it was for is as it was before."""


class NoAnswer(RoundFailed):
    """A vault did not do what it was asked."""

    def __init__(self, message: str, cause: BaseException | None = None) -> None:
        """`cause` is what the vault raised, if it answered."""
        super().__init__(message)
        self.cause = cause


class Rounds:
    """Does `_round` again and again between `begin` and `pause`. Methods are called by the controller's
    threads.
    """

    def __init__(self, vaults: Vaults, *, name: str) -> None:
        self._vaults = vaults
        self._changed = threading.Condition()
        self._epoch: Epoch | None = None  # None: no rounds
        self._busy = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def begin(self, epoch: int, homes: Sequence[str]) -> None:
        """Do rounds for the ranks of `epoch`; `homes` is the node of each."""
        with self._changed:
            self._epoch = Epoch(epoch, tuple(homes))
            self._changed.notify_all()

    def pause(self) -> None:
        """No rounds until `begin`; one that is under way ends soon, and comes to nothing."""
        with self._changed:
            self._epoch = None
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._epoch, self._closed = None, True
            self._changed.notify_all()
        self._thread.join(ANSWER_S)

    def _round(self, epoch: Epoch) -> float:
        """Do one, whatever comes of it; the seconds until the next."""
        raise NotImplementedError

    def _run(self) -> None:
        while True:
            with self._changed:
                # no time limit: it ends with `begin` or `close`, and as a daemon with the process
                self._changed.wait_for(lambda: self._epoch is not None or self._closed)
                if self._closed:
                    return
                epoch = self._epoch
                self._busy = True
            pause_s = self._round(epoch) if epoch is not None else 0.0
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._epoch is not epoch or self._closed, pause_s)  # noqa: B023

    def _ask(
        self,
        calls: Mapping[str, Any],
        *,
        timeout_s: float = ANSWER_S,
        wanted: Callable[[], bool],
    ) -> dict[str, Any]:
        """The answers of all. Raises NoAnswer when one has none, and RoundFailed when they are not `wanted`
        any more.
        """
        waiting, deadline = list(calls.values()), time.monotonic() + timeout_s
        while waiting and time.monotonic() < deadline:
            if not wanted():
                raise RoundFailed("it was given up")
            waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_EVERY_S)[1]
        return {node: answer_of(node, ref, timeout_s) for node, ref in calls.items()}

    def _goes_on(self, epoch: Epoch) -> bool:
        return self._epoch is epoch


def answer_of(node: str, ref: Any, timeout_s: float) -> Any:
    """What a vault answered within the time that it had. Raises NoAnswer."""
    if not ray.wait([ref], timeout=0)[0]:
        raise NoAnswer(f"the vault of node {node} did not answer within {timeout_s:.0f} s")
    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise NoAnswer(f"node {node}: {error.cause}", error.cause) from None
    except RayError as error:
        raise NoAnswer(f"the vault of node {node} does not answer ({type(error).__name__})") from None
