"""Protection across nodes: what is lost with a node is made again from the others, or said to be gone.

Nodes are vaults in folders of this machine; pieces are fetched straight from their files.
"""

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from killed import memory_folder

from rayfold.faulttol.coding import PIECE_BYTES, Want, make_again, parity_pieces
from rayfold.faulttol.header import CHUNK_BYTES, HEADER_BYTES, DamagedImage, ImageError
from rayfold.faulttol.image import Image
from rayfold.faulttol.listing import images_in
from rayfold.faulttol.pins import Pins, read_span
from rayfold.faulttol.placement import Node, protection_for
from rayfold.faulttol.protection import PROTECTS, NotProtected, Parity, Stored, orders, recipes
from rayfold.faulttol.slots import Slots
from rayfold.faulttol.vault import Vault, VaultFull

EPOCH = 3
BUDGET = 1 << 30


def data_of(rank: int, step: int, nbytes: int) -> np.ndarray:
    return np.random.default_rng([rank, step]).integers(0, 256, nbytes, dtype=np.uint8)


class Rank:
    """A rank that commits steps into its slots."""

    def __init__(self, vault: Vault, rank: int, nbytes: int) -> None:
        self.rank, self.nbytes = rank, nbytes
        self.slots = Slots.open(vault.reserve(rank, nbytes).slots)

    def commit(self, step: int, *, epoch: int = EPOCH) -> None:
        slot, data = self.slots.next_to_fill(), data_of(self.rank, step, self.nbytes)
        slot.begin(self.nbytes, b"")
        for chunk in range(slot.chunks()):
            slot.put(chunk, data[chunk * CHUNK_BYTES : slot.end_of(chunk)])
        said = {"rank": self.rank, "world_size": 9, "twin": self.rank, "copies": 1, "began": {}}
        slot.seal(step=step, epoch=epoch, fingerprint="f", progress=said)
        slot.commit()


class Nodes:
    """Several nodes: `homes[i]` are the ranks of node i."""

    def __init__(self, folder: Path, homes: Sequence[Sequence[int]], nbytes: Sequence[int]) -> None:
        self.vaults = {f"n{i}": Vault(folder / f"n{i}", BUDGET, run="r", slots=3) for i in range(len(homes))}
        self.ranks = {f"n{i}": list(ranks) for i, ranks in enumerate(homes)}
        self.lives = [
            Rank(self.vaults[node], rank, nbytes[rank])
            for node, ranks in self.ranks.items()
            for rank in ranks
        ]
        self.lost: set[str] = set()

    def commit(self, *steps: int) -> None:
        for step in steps:
            for rank in self.lives:
                rank.commit(step)

    def pins(self, node: str) -> Pins:
        return Pins(self.vaults[node].folder, self.ranks[node], EPOCH)

    def fetch(self, wants: Sequence[Want]) -> list[bytes | ImageError]:
        found: list[bytes | ImageError] = []
        for want in wants:
            assert want.node not in self.lost
            vault = self.vaults[want.node]
            try:
                if want.blob:
                    found.append(bytes(vault.read(want.blob, want.start, want.length)))
                else:
                    found.append(read_span(vault.folder, want.files, want.start, want.length))
            except ImageError as error:
                found.append(error)
        return found

    def protect(self, step: int, turn: int = 0) -> None:
        """A whole round."""
        for group in protection_for([Node(name) for name in self.vaults]):
            held = {node: self.pins(node).held(step, blocks=group.blocks) for node in group.ids}
            for node, ordered in orders(group, held, step=step, epoch=EPOCH).items():
                for parity in ordered:
                    self.vaults[node].store(
                        parity.name(turn),
                        parity_pieces(parity, self.fetch),
                        nbytes=parity.length,
                        step=step,
                        epoch=EPOCH,
                        progress={PROTECTS: parity.to_json()},
                    )

    def stored(self) -> list[Stored]:
        return [
            Stored(node, Path(info.path).name, Parity.from_json(info.progress[PROTECTS]))
            for node, vault in self.vaults.items()
            if node not in self.lost
            for info in vault.inventory()
            if PROTECTS in info.progress
        ]

    def lose(self, nodes: Collection[str]) -> dict[str, bytes]:
        """Nodes are gone; what their ranks held of the newest step, by rank."""
        self.lost |= set(nodes)
        gone: dict[str, bytes] = {}
        for node in nodes:
            for path in sorted(self.vaults[node].folder.iterdir()):
                gone[f"{node}/{path.name}"] = path.read_bytes()
                path.unlink()
        return gone

    def make_again(self) -> dict[str, list[Path]]:
        target = next(node for node in self.vaults if node not in self.lost)
        return {
            recipe.node: make_again(recipe, self.vaults[target].folder, self.fetch)
            for recipe in recipes(sorted(self.lost), self.stored())
        }


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as made:
        yield made


SIZES = [5000, PIECE_BYTES + 77, 1, 300_000, 2 * CHUNK_BYTES, 64, 9000, 10_000]
CASES = [
    (2, ["n0"], "peer"),
    (2, ["n1"], "peer"),
    (4, ["n2"], "parity"),
    (4, ["n0"], "parity"),
    (7, ["n6"], "parity"),
    (7, ["n0", "n1"], "parity"),
    (7, ["n1", "n5"], "parity"),
    (7, ["n3", "n4"], "parity"),
]


@pytest.mark.parametrize(("count", "lost", "kind"), CASES)
def test_what_lost_nodes_held_is_made_again_to_the_byte(
    folder: Path, count: int, lost: list[str], kind: str
) -> None:
    """Copies, XOR and P with Q; nodes hold unlike amounts, and one of them two ranks."""
    homes = [[0, 1]] + [[rank] for rank in range(2, count + 1)]
    nodes = Nodes(folder, homes, SIZES)
    nodes.commit(1, 2)
    nodes.protect(2)
    for node in nodes.vaults:
        nodes.pins(node).settle(2)
    nodes.commit(3, 4, 5)
    nodes.lose(lost)
    for node, paths in nodes.make_again().items():
        made = [Image.open(path) for path in paths]
        assert [image.progress["rank"] for image in made] == nodes.ranks[node]
        for image in made:
            rank = image.progress["rank"]
            assert (image.step, image.fingerprint) == (2, "f")
            assert bytes(image.read(0, image.nbytes)) == data_of(rank, 2, SIZES[rank]).tobytes()
    target = next(node for node in nodes.vaults if node not in nodes.lost)
    listed = images_in(nodes.vaults[target].folder, run="r", node=target)
    made_again = [image.source for image in listed if image.source.kind == kind]
    assert sorted(source.rank for source in made_again) == sorted(r for n in lost for r in nodes.ranks[n])
    assert {source.step for source in made_again} == {2}


def test_a_node_without_ranks_holds_parity_and_loses_nothing(folder: Path) -> None:
    """Two nodes of three train; the third keeps what makes up for either."""
    nodes = Nodes(folder, [[0], [1], []], SIZES)
    nodes.commit(1)
    nodes.protect(1)
    nodes.lose(["n1"])
    assert list(nodes.make_again()) == ["n1"]
    nodes = Nodes(folder / "again", [[0], [1], []], SIZES)
    nodes.commit(1)
    nodes.protect(1)
    nodes.lose(["n2"])
    assert all(not paths for paths in nodes.make_again().values())


@pytest.mark.parametrize(("count", "lost"), [(2, ["n0", "n1"]), (4, ["n0", "n3"]), (7, ["n0", "n1", "n2"])])
def test_more_losses_than_parities_are_said(folder: Path, count: int, lost: list[str]) -> None:
    """No guess: the sentence says how many were lost and how many are borne."""
    nodes = Nodes(folder, [[rank] for rank in range(count)], SIZES)
    nodes.commit(1)
    nodes.protect(1)
    nodes.lose(lost)
    with pytest.raises(NotProtected, match="n0"):
        recipes(lost, nodes.stored())


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 16]))


def test_a_flipped_bit_in_the_only_copy_is_refused(folder: Path) -> None:
    """What is left of two nodes is one copy; a damaged one must not become somebody's parameters."""
    nodes = Nodes(folder, [[0], [1]], SIZES)
    nodes.commit(1)
    nodes.protect(1)
    nodes.lose(["n0"])
    flip(nodes.vaults["n1"].folder / "parity-0-1-p.blob", 2 * HEADER_BYTES + 100)
    with pytest.raises(NotProtected, match="damaged"):
        nodes.make_again()
    assert not [path for path in nodes.vaults["n1"].folder.iterdir() if path.name.startswith("peer")]


@pytest.mark.parametrize("what", ["p", "q", "slot"])
def test_with_two_parities_one_damaged_block_is_gone_round(folder: Path, what: str) -> None:
    """A lost node and a flipped bit in P, in Q or in a survivor's slot: two losses, and two are borne."""
    nodes = Nodes(folder, [[rank] for rank in range(6)], [40_000] * 6)
    nodes.commit(1)
    nodes.protect(1)
    nodes.lose(["n2"])
    for node in ["n0", "n1", "n3"] if what == "slot" else list(nodes.vaults):
        for path in nodes.vaults[node].folder.iterdir():
            if what == "slot" and path.name.endswith("slot-0") and node == "n0":
                flip(path, HEADER_BYTES + 5)
            elif path.name.endswith(f"-{what}.blob"):
                flip(path, HEADER_BYTES + 7)
    (paths,) = nodes.make_again().values()
    image = Image.open(paths[0])
    assert bytes(image.read(0, image.nbytes)) == data_of(2, 1, 40_000).tobytes()


def test_a_damaged_source_is_found_before_it_is_protected(folder: Path) -> None:
    """Redundancy of garbage is worth nothing, and would be found out only when it is needed."""
    nodes = Nodes(folder, [[0], [1]], SIZES)
    nodes.commit(1)
    flip(next(nodes.vaults["n0"].folder.glob("*.slot-0")), HEADER_BYTES + 11)
    with pytest.raises(ImageError, match="crc"):
        nodes.protect(1)


def test_a_round_that_was_not_finished_leaves_the_one_before(folder: Path) -> None:
    """A node dies while step 5 is stored: step 3 is still pinned everywhere and stored whole."""
    nodes = Nodes(folder, [[0], [1], [2]], [9000] * 3)
    nodes.commit(1, 2, 3)
    nodes.protect(3)
    for node in nodes.vaults:
        nodes.pins(node).settle(3)  # changes words in the first slot, which may be one that is protected
        nodes.pins(node).wait_for(5)
    nodes.commit(4, 5, 6, 7, 8)
    nodes.protect(5, turn=1)
    (nodes.vaults["n1"].folder / "parity-1-1-p.blob").unlink()
    nodes.lose(["n0"])
    (paths,) = nodes.make_again().values()
    assert Image.open(paths[0]).step == 3
    assert [nodes.pins(node).still_there(3) for node in ("n1", "n2")] == [True, True]


def test_ranks_keep_the_same_step_however_unlike_their_pace(folder: Path) -> None:
    """The word says a step to come: whoever is ahead when it is written keeps the same one as the others."""
    nodes = Nodes(folder, [[0], [1]], SIZES)
    nodes.commit(1, 2)
    assert [nodes.pins(node).newest() for node in nodes.vaults] == [2, 2]
    nodes.pins("n0").wait_for(4)
    nodes.commit(3)
    nodes.pins("n1").wait_for(4)
    assert nodes.pins("n0").reached(4) is None
    nodes.commit(6, 9, 12, 15)  # copies need not be made of every step
    assert [nodes.pins(node).reached(4) for node in nodes.vaults] == [{6}, {6}]
    for node in nodes.vaults:
        nodes.pins(node).settle(6)
    nodes.commit(18, 21)
    nodes.pins("n0").wait_for(22)
    nodes.commit(24, 27, 30, 33)
    assert nodes.pins("n0").reached(22) == {24}
    assert nodes.pins("n0").still_there(6)
    assert nodes.pins("n1").still_there(6)
    assert not nodes.pins("n1").still_there(24)
    newest = nodes.lives[0].slots.sealed()
    assert newest is not None
    assert newest.step == 33, "both pinned steps stand, and the slot left is filled again and again"
    nodes.pins("n0").settle(-1)
    nodes.commit(36, 39, 42)
    assert not nodes.pins("n0").still_there(6)


def test_pins_never_stop_a_run(folder: Path) -> None:
    """With two slots there is none to spare; the newest committed one is kept, as without pins."""
    vault = Vault(folder / "v", BUDGET, run="r", slots=2)
    rank = Rank(vault, 0, 100)
    pins = Pins(vault.folder, [0], EPOCH)
    rank.commit(1)
    pins.settle(1)
    pins.wait_for(2)
    for step in range(2, 9):
        rank.commit(step)
        committed = rank.slots.committed()
        assert committed is not None
        assert committed.step == step


def test_a_step_that_is_due_stays_until_it_is_written(folder: Path) -> None:
    """The rank says so, whenever the vault looks; of two ranks the same one, and it lets go of no other."""
    nodes = Nodes(folder, [[0, 1]], SIZES)
    pins = Pins(nodes.vaults["n0"].folder, [0, 1], None)
    assert pins.due() is None
    for rank in nodes.lives:
        rank.slots.due = 3
    nodes.commit(1, 2)
    assert (pins.due(), pins.passed(3)) == (3, False), "it is to come"
    nodes.lives[0].commit(3)
    assert not pins.passed(3), "one rank is not so far"
    nodes.lives[1].commit(3)
    nodes.commit(4, 5, 6)
    assert (pins.due(), pins.passed(3), pins.whole()) == (3, True, {3, 5, 6})
    assert Image.open(pins.image_of(1, 3)).step == 3
    pins.wrote(2)
    assert pins.due() == 3
    pins.wrote(3)
    nodes.commit(7, 8)
    assert (pins.due(), pins.whole(), nodes.lives[0].slots.due) == (None, {6, 7, 8}, -1)
    nodes.lives[0].slots.forget_due()
    nodes.lives[0].slots.due = 2
    assert nodes.lives[0].slots.due == 2, "a run that has gone back makes it again"


def test_a_due_step_that_one_rank_will_never_have_is_not_waited_for(folder: Path) -> None:
    """Its copy failed, or its file is gone: that shows once all ranks are past it, and is said by name."""
    nodes = Nodes(folder, [[0, 1]], SIZES)
    pins = Pins(nodes.vaults["n0"].folder, [0, 1], None)
    for rank in nodes.lives:
        rank.slots.due = 2
    nodes.commit(1)
    nodes.lives[0].commit(2)
    nodes.lives[0].commit(3)
    nodes.lives[1].commit(3)
    assert (pins.due(), pins.passed(2)) == (2, True)
    with pytest.raises(DamagedImage, match="rank 1 has no copy of step 2"):
        pins.image_of(1, 2)
    nodes.lives[1].slots.slots[0].path.unlink()
    pins = Pins(nodes.vaults["n0"].folder, [0, 1], None)
    assert (pins.due(), nodes.lives[1].slots.due) == (2, -1), "the other rank still says so"


def test_what_goes_to_disk_is_kept_before_what_is_to_be_protected(folder: Path) -> None:
    """Three slots: the protected step, the due one, and one to fill; the round of protection comes to nothing
    and tries again.
    """
    nodes = Nodes(folder, [[0]], SIZES)
    pins, slots = nodes.pins("n0"), nodes.lives[0].slots
    nodes.commit(1)
    pins.settle(1)
    slots.due = 2
    pins.wait_for(3)
    nodes.commit(2, 3, 4, 5)
    assert [pins.still_there(step) for step in (1, 2, 3)] == [True, True, False]
    assert slots.next_to_fill().step == 5, "a lost rank goes back to step 2 at most then"
    pins.wrote(2)
    nodes.commit(6)
    assert [pins.still_there(step) for step in (1, 2, 5, 6)] == [True, False, True, True]


def test_steps_of_an_earlier_epoch_are_not_protected(folder: Path) -> None:
    """They may be of a line of steps that the run has gone back from."""
    vault = Vault(folder / "v", BUDGET, run="r", slots=3)
    rank = Rank(vault, 0, 100)
    rank.commit(7, epoch=EPOCH - 1)
    pins = Pins(vault.folder, [0, 1], EPOCH)
    assert pins.newest() is None
    rank.commit(8)
    assert pins.newest() is None, "rank 1 has nothing yet"
    assert Pins(vault.folder, [0], EPOCH).newest() == 8
    assert Pins(vault.folder, [], EPOCH).newest() == -1


def test_room_for_what_protects_others_is_left(tmp_path: Path) -> None:
    """Found when a run starts, in numbers, and not when the first round fails for want of memory."""
    size = HEADER_BYTES + 1000
    Vault(tmp_path / "fits", 7 * size, slots=3).reserve(0, 1000, beside=2.0)
    tight = Vault(tmp_path / "tight", 6 * size - 1, slots=3)
    with pytest.raises(VaultFull, match=f"{2 * size} bytes left for what protects other nodes"):
        tight.reserve(0, 1000, beside=2.0)
    tight.reserve(0, 1000, beside=1.0)
    tight.reserve(0, 1000, beside=9.0)
    with pytest.raises(VaultFull):
        tight.reserve(1, 1000, beside=1.0)


def test_a_description_survives_being_written_down(folder: Path) -> None:
    """It lies in the header of the parity, which has room for a few thousand files."""
    nodes = Nodes(folder, [[0, 1], [2], [3]], SIZES)
    nodes.commit(1)
    nodes.protect(1)
    for stored in nodes.stored():
        assert Parity.from_json(json.loads(json.dumps(stored.parity.to_json()))) == stored.parity


def test_a_vault_is_light() -> None:
    """It lives beside the ranks of every node; torch takes a quarter of a gigabyte, and seconds to start."""
    code = "import rayfold.cluster.vault, sys; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "False"
