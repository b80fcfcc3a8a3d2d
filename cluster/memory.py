"""What a rank is told of the memory of its node, and how it takes a part of it."""

import fcntl
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError

from .machine import machine_bytes

if TYPE_CHECKING:
    from ..faulttol.listing import Listed
    from ..faulttol.vault import RankFiles
    from ..runtime.place import SnapshotPlace


READ_BYTES = 16 << 20  # at once from another node: far below what Ray's object store holds
READ_S = 30.0  # for that much, over a network of 1 MB/s


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Where the state of a rank may lie."""

    run: str
    node: str
    folder: str
    slots: int
    share: float  # of the machine's memory that all ranks there may take
    beside: float  # what the node keeps of others for each byte of a copy of its own
    recorded: int  # last step in the record of the run
    vaults: dict[str, Any]  # of every node by name
    elsewhere: "tuple[Listed, ...]" = ()  # images on nodes that have no rank
    untold: tuple[Mapping[str, Any], ...] = ()  # lines of steps that are in no record
    writes: bool = False  # whether the vaults write checkpoints
    durable: int = 0  # newest step on disk

    def place(self, epoch: int, leaving: Callable[[], bool] = lambda: False) -> "SnapshotPlace":
        """The same for the trainer, in `epoch`, until it is `leaving` that."""
        from ..runtime.place import SnapshotPlace

        return SnapshotPlace(
            run=self.run,
            node=self.node,
            folder=Path(self.folder),
            epoch=epoch,
            reserve=self._reserve,
            fetch=self._fetch,
            elsewhere=self.elsewhere,
            newest=self.recorded,
            recorded=self.recorded,
            writes=self.writes,
            durable=self.durable,
            leaving=leaving,
        )

    def _reserve(self, rank: int, nbytes: int) -> "RankFiles":
        from ..faulttol.vault import Vault

        budget = int(self.share * machine_bytes())
        os.makedirs(self.folder, exist_ok=True)
        with open(lock_of(Path(self.folder)), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one rank of the node at a time; let go of by the kernel
            vault = Vault(self.folder, budget, run=self.run, slots=self.slots)
            return vault.reserve(rank, nbytes, beside=2 * self.beside)  # the next is stored beside the last

    def _fetch(self, where: str) -> Path:
        """A copy of another node's file, `<node>:<path>`, which the caller removes. Raises OSError when that
        cannot be had.
        """
        node, _, path = where.partition(":")
        if node not in self.vaults:
            raise FileNotFoundError(f"{where}: its node is lost, or none of this run")
        # ranks of this node may fetch the same
        copy = Path(self.folder) / f"{node}-{Path(path).name}.{os.getpid()}.copy"
        try:
            with open(copy, "wb") as file:
                while data := ray.get(
                    self.vaults[node].read.remote(path, file.tell(), READ_BYTES), timeout=READ_S
                ):
                    file.write(data)
        except RayTaskError as error:
            copy.unlink()
            raise OSError(f"{where}: {error.cause}") from None
        except RayError as error:
            copy.unlink()
            raise OSError(f"{where}: its node does not answer ({type(error).__name__})") from None
        return copy


def lock_of(folder: Path) -> Path:
    """The file by which the ranks of a node take turns."""
    return folder.with_suffix(".lock")
