"""What a vault does with its files: it pins steps of its ranks, stores parities, serves, makes again, and
writes checkpoints.

Rounds are driven by the controller (`protect.py`, `durable.py`), step by step; a vault pulls what it needs
from the other vaults. Everything it must remember is in its files. No torch here, a vault is light.
"""

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from ..faulttol.coding import Fetch, Want, make_again, parity_pieces
from ..faulttol.header import DamagedImage, ImageError
from ..faulttol.listing import Listed, images_in
from ..faulttol.pins import Held, Pins, read_span
from ..faulttol.protection import PROTECTS, Parity, Recipe
from ..faulttol.vault import Vault, rank_of
from ..runtime.checkpoint.streaming import Holding, Share, Wrote, look_at, write_share

FETCH_S = 60.0  # for one piece of each block, all at once, over a network of a few MB/s
LOOK_EVERY_S = 0.02  # at slots of the node while a step is awaited: a small fraction of the quickest steps
DUE_LOOK_S = 0.05  # at whether a step is due on disk: a moment of what writing one takes
CANCEL_LOOK_S = 0.2  # how soon a round that was given up ends, whatever it waits for

# threads: others are served while one pulls, or waits
GROUPS = {"serve": 4, "protect": 1, "rebuild": 1, "due": 1, "disk": 1}


class Cannot(ImageError):
    """A piece that could not be had from another node, or a round that was given up."""


class Keeper:
    """The files of one node, for the others. Public methods are called through Ray and may run at once."""

    def __init__(self, folder: Path, *, run: str, node: str, budget: int) -> None:
        self._folder, self._run, self._node, self._budget = folder, run, node, budget
        self._vault: Vault | None = None
        self._lock = threading.Lock()
        self._given_up = threading.Event()  # of the round under way; each round has its own
        self._writing_given_up = threading.Event()  # likewise of a checkpoint

    @ray.method(concurrency_group="serve")
    def piece(self, want: Want) -> bytes:
        """A part of this node's files or of one of its blobs. Raises DamagedImage, OSError."""
        return self._piece(want)

    @ray.method(concurrency_group="serve")
    def images(self) -> list[Listed]:
        """What a rank may start from here."""
        return images_in(self._folder, run=self._run, node=self._node)

    @ray.method(concurrency_group="serve")
    def stored(self) -> list[tuple[str, dict[str, Any]]]:
        """Parities for other nodes: blobs and what they say."""
        images = self._keep().inventory()
        return [(Path(i.path).name, i.progress[PROTECTS]) for i in images if PROTECTS in i.progress]

    @ray.method(concurrency_group="serve")
    def give_up(self) -> None:
        """End the round under way."""
        self._given_up.set()

    @ray.method(concurrency_group="serve")
    def due_now(self, ranks: Sequence[int]) -> int | None:
        """As `Pins.due`."""
        return Pins(self._folder, ranks, None).due()

    @ray.method(concurrency_group="due")
    def due(self, ranks: Sequence[int], wait_s: float) -> int | None:
        """As `Pins.due`, within `wait_s`, once every rank has passed that step."""
        deadline = time.monotonic() + wait_s
        while True:
            pins = Pins(self._folder, ranks, None)  # anew: files may not be made yet
            step = pins.due()
            if step is not None and pins.passed(step):
                return step
            if time.monotonic() >= deadline:
                return None
            time.sleep(DUE_LOOK_S)

    @ray.method(concurrency_group="serve")
    def passed(self, ranks: Sequence[int], step: int) -> bool:
        """As `Pins.passed`."""
        return Pins(self._folder, ranks, None).passed(step)

    @ray.method(concurrency_group="disk")
    def whole(self, ranks: Sequence[int]) -> set[int]:
        """As `Pins.whole`, of any epoch."""
        return Pins(self._folder, ranks, None).whole()

    @ray.method(concurrency_group="disk")
    def holdings(self, ranks: Sequence[int], step: int) -> dict[int, Holding]:
        """What the images of a step hold, by rank. Raises Unusable and DamagedImage."""
        self._writing_given_up = threading.Event()
        pins = Pins(self._folder, ranks, None)
        return {rank: look_at(pins.image_of(rank, step), step) for rank in ranks}

    @ray.method(concurrency_group="disk")
    def write_down(self, shares: Sequence[Share], folder: Path) -> list[Wrote]:
        """As `write_share`, for each."""
        given_up = self._writing_given_up
        return [write_share(share, folder, given_up.is_set) for share in shares]

    @ray.method(concurrency_group="serve")
    def wrote(self, ranks: Sequence[int], step: int) -> None:
        """As `Pins.wrote`."""
        Pins(self._folder, ranks, None).wrote(step)

    @ray.method(concurrency_group="serve")
    def give_up_writing(self) -> None:
        """End the checkpoint under way."""
        self._writing_given_up.set()

    @ray.method(concurrency_group="protect")
    def newest(self, ranks: Sequence[int], epoch: int) -> int | None:
        """As `Pins.newest`; begins a round."""
        self._given_up = threading.Event()
        return Pins(self._folder, ranks, epoch).newest()

    @ray.method(concurrency_group="protect")
    def wait_for(self, ranks: Sequence[int], epoch: int, step: int) -> None:
        """As `Pins.wait_for`."""
        Pins(self._folder, ranks, epoch).wait_for(step)

    @ray.method(concurrency_group="protect")
    def reached(self, ranks: Sequence[int], epoch: int, step: int, wait_s: float) -> set[int] | None:
        """As `Pins.reached`, within `wait_s`."""
        pins, deadline = Pins(self._folder, ranks, epoch), time.monotonic() + wait_s
        while (steps := pins.reached(step)) is None and time.monotonic() < deadline:
            if self._given_up.wait(LOOK_EVERY_S):
                break
        return steps

    @ray.method(concurrency_group="protect")
    def held(self, ranks: Sequence[int], epoch: int, step: int, blocks: int) -> Held:
        """As `Pins.held`."""
        return Pins(self._folder, ranks, epoch).held(step, blocks=blocks)

    @ray.method(concurrency_group="protect")
    def store(self, parities: Sequence[Parity], turn: int, peers: Mapping[str, Any]) -> list[str]:
        """Pull, code and keep these; names of their blobs. Raises what `Vault.store` does, and Cannot."""
        given_up, made = self._given_up, []
        for parity in parities:
            fetch = self._fetch(peers, given_up)
            path = self._keep().store(
                parity.name(turn),
                parity_pieces(parity, fetch),
                nbytes=parity.length,
                step=parity.step,
                epoch=parity.epoch,
                progress={PROTECTS: parity.to_json()},
            )
            made.append(path.name)
        return made

    @ray.method(concurrency_group="protect")
    def still_there(self, ranks: Sequence[int], epoch: int, step: int) -> bool:
        """As `Pins.still_there`."""
        return Pins(self._folder, ranks, epoch).still_there(step)

    @ray.method(concurrency_group="protect")
    def settle(self, ranks: Sequence[int], epoch: int, step: int | None, blobs: Collection[str]) -> None:
        """Keep `step`, which is protected on all nodes, and no other: other blobs, and files of ranks that
        live elsewhere by now, are nothing to anybody. None: nothing is protected now that was not before.
        """
        Pins(self._folder, ranks, epoch).settle(step)
        if step is None:
            return
        vault = self._keep()
        for info in vault.inventory():
            name, rank = Path(info.path).name, rank_of(info)
            if rank is None and name not in blobs:
                vault.discard(name)
            elif rank is not None and rank not in ranks:
                vault.release(rank)

    @ray.method(concurrency_group="rebuild")
    def make_again(self, recipe: Recipe, peers: Mapping[str, Any]) -> None:
        """Make the images of a lost node's ranks here. Raises NotProtected, VaultFull, OSError."""
        self._keep().check_room(
            f"the state of node {recipe.node} at step {recipe.step}", sum(size for _, size in recipe.files)
        )
        make_again(recipe, self._folder, self._fetch(peers, threading.Event()))

    def _keep(self) -> Vault:
        with self._lock:
            if self._vault is None:  # one for all: a new one clears what looks unfinished
                self._vault = Vault(self._folder, self._budget, run=self._run)
            return self._vault

    def _piece(self, want: Want) -> bytes:
        if want.blob:
            return bytes(self._keep().read(want.blob, want.start, want.length))
        if any("/" in name for name, _ in want.files):
            raise DamagedImage(f"{want.files}: are no files of this vault, which keeps {self._folder}")
        return read_span(self._folder, want.files, want.start, want.length)

    def _fetch(self, peers: Mapping[str, Any], given_up: threading.Event) -> Fetch:
        """Pieces from this node and from those of `peers`."""

        def fetch(wants: Sequence[Want]) -> list[bytes | ImageError]:
            asked = [self._ask(want, peers) for want in wants]
            waiting = [ref for ref in asked if isinstance(ref, ray.ObjectRef)]
            deadline = time.monotonic() + FETCH_S
            while waiting and time.monotonic() < deadline:
                if given_up.is_set():
                    raise Cannot("the round was given up")
                waiting = ray.wait(waiting, num_returns=len(waiting), timeout=CANCEL_LOOK_S)[1]
            return [self._got(ref, want) for ref, want in zip(asked, wants, strict=True)]

        return fetch

    def _ask(self, want: Want, peers: Mapping[str, Any]) -> Any:
        if not want.length:
            return b""
        if want.node == self._node:
            try:
                return self._piece(want)
            except (ImageError, OSError) as error:
                return Cannot(str(error))
        if want.node not in peers:
            return Cannot(f"node {want.node} is lost")
        return peers[want.node].piece.remote(want)

    def _got(self, ref: Any, want: Want) -> bytes | ImageError:
        if not isinstance(ref, ray.ObjectRef):
            value: bytes | ImageError = ref
            return value
        if not ray.wait([ref], timeout=0)[0]:
            return Cannot(f"node {want.node} did not send {want.length} bytes within {FETCH_S:.0f} s")
        try:
            found: bytes = ray.get(ref)
        except RayTaskError as error:
            return Cannot(f"node {want.node}: {error.cause}")
        except RayError as error:
            return Cannot(f"node {want.node} does not answer ({type(error).__name__})")
        return found
