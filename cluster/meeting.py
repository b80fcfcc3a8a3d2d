"""Where the ranks of a run meet: a store in the controller's process, and the epoch that it guards.

Ranks need the store to find each other, and not again before the next epoch: gloo's connections stand by
then. So a store that is lost with its controller disturbs nobody who trains, and the next controller opens
its own.
"""

import threading
from datetime import timedelta
from typing import Any

import ray

from .fleet import FleetError


class Meeting:
    """Opens the store in a thread, since that imports torch, which takes seconds."""

    def __init__(self, epoch: int, *, timeout_s: float) -> None:
        """The store begins at `epoch`; `timeout_s` bounds each wait for it and on it."""
        self.epoch = epoch
        self._timeout_s = timeout_s
        self._store: Any = None
        self._error = "it took longer"
        self._opening = threading.Thread(target=self._open, name="store", daemon=True)
        self._opening.start()

    @property
    def place(self) -> tuple[str, int]:
        """Host and port. Raises FleetError when there is no store."""
        return self._host, int(self._opened().port)

    def next_epoch(self) -> int:
        """Begin the next epoch, and return it: whoever belongs to the last can no longer join, commit or
        record. Raises FleetError when there is no store.
        """
        from ..faulttol.epoch import bump

        self.epoch = bump(self._opened(), self.epoch)
        return self.epoch

    def _opened(self) -> Any:
        self._opening.join(self._timeout_s)
        if self._store is None:
            raise FleetError(
                f"the store where the ranks meet could not be opened beside the controller: {self._error}"
            )
        return self._store

    def _open(self) -> None:
        try:
            from torch.distributed import TCPStore

            from ..faulttol.epoch import begin_at

            self._host = ray.util.get_node_ip_address()
            timeout = timedelta(seconds=self._timeout_s)
            store = TCPStore(self._host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            begin_at(store, self.epoch)
        except Exception as error:  # whatever it is, the run ends with its text
            self._error = f"{type(error).__name__}: {error}"
            return
        self._store = store
