"""Which life of a run is the present one: an integer in the run's store, changed by compare-and-set alone.

After a fault the run goes on under the next epoch. A rank that was given up may come back (SIGCONT, a healed
network): it belongs to an epoch that is over, and the fence keeps it out.

The store must outlive every worker: the controller's process holds it, and one that is started again opens
another where the last one stood. All waits are bounded by its timeout.
"""

import uuid

from torch.distributed import DistError, PrefixStore, Store

KEY = "rayfold/epoch"


class Fenced(RuntimeError):
    """A process belongs to an epoch that is over, or cannot tell; it must neither join, commit nor record."""


def current(store: Store) -> int:
    """The run's epoch; 0 in a new store. Raises Fenced if the store does not answer."""
    return _epoch_of(_read(store, "a process"))


def bump(store: Store, expected: int) -> int:
    """Begin epoch `expected` + 1 and return it.

    Raises Fenced if the run is not at `expected`: of several processes that bump, one wins.
    """
    who = f"a process that would begin epoch {expected + 1}"
    seen = _read(store, who)
    # Two that bump at once would write the same number, and both find it: the winner knows its own mark.
    mine = f"{expected + 1} {uuid.uuid4().hex}"
    if _epoch_of(seen) == expected:
        seen = _compare_set(store, seen, mine, who)
    if seen != mine:
        raise Fenced(
            f"epoch {expected + 1} cannot begin here: the run is at epoch {_epoch_of(seen)}, not at "
            f"{expected}, as another process began one. Follow that one's decision, or end this process"
        )
    return expected + 1


def begin_at(store: Store, epoch: int) -> None:
    """Let a new store stand at `epoch`, where that of a run was lost. Raises Fenced if it is not new."""
    mine = f"{epoch} {uuid.uuid4().hex}"
    seen = _compare_set(store, "", mine, f"a process that would go on at epoch {epoch}")
    if seen != mine:
        raise Fenced(f"the run's store is at epoch {_epoch_of(seen)} already, and was to begin at {epoch}")


def scoped(store: Store, epoch: int) -> PrefixStore:
    """The part of the store where the process groups of `epoch` keep their keys."""
    return PrefixStore(f"epoch-{epoch}", store)


class Fence:
    """Tells a process of one epoch whether that is still the run's. A check is one question to the store."""

    def __init__(self, store: Store, epoch: int, *, who: str = "a rank") -> None:
        self._store = store
        self._who = f"{who} of epoch {epoch}"
        self.epoch = epoch

    def check(self) -> None:
        """Raises Fenced when the run is at another epoch, or the store does not answer within its timeout."""
        now = _epoch_of(_read(self._store, self._who))
        if now != self.epoch:
            raise Fenced(
                f"{self._who} in a run that is at epoch {now}: it was given up and the others went on "
                "without it. It may neither join, commit nor record; end this process"
            )


def _read(store: Store, who: str) -> str:
    # As a compare-and-set that begins epoch 0 where there is none: a plain get would wait for the key.
    return _compare_set(store, "", "0 new", who)


def _compare_set(store: Store, expected: str, desired: str, who: str) -> str:
    """The value after: `desired` if it was `expected`, else what it was."""
    try:
        value: bytes = store.compare_set(KEY, expected, desired)
    except DistError as error:
        raise Fenced(
            f"{who} cannot tell which epoch the run is at, as the run's store does not answer ({error}). "
            "If the controller ended, so did the run; end this process"
        ) from error
    return value.decode()


def _epoch_of(value: str) -> int:
    number = value.split(" ")[0]
    if not number.isdecimal():
        raise Fenced(
            f'key "{KEY}" of the run\'s store holds "{value[:40]}", which is no epoch; another program '
            "writes to this store, use a store of the run's own"
        )
    return int(number)
