"""Which node stores what for the others, and how a lost node's state is made again from that.

What a node holds of a step is cut into blocks (`pins.py`); blocks of different nodes form stripes, whose
parity lies on a further node (`placement.py`). Two nodes are the smallest case: the parity of one block is
its copy. Every parity is stored with the orders that it was made by, so whoever finds it can tell what it is
good for, whatever became of those who ordered it. Values in, values out: `coding.py` has the bytes.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .choice import SourceKind
from .header import ImageError
from .pins import Held
from .placement import PARITIES, Group, Scheme

PROTECTS = "protects"  # the key of a stored parity's description, in the progress of its blob


class NotProtected(ImageError):
    """State cannot be made again from what the nodes that are left have; the message says why."""


@dataclass(frozen=True)
class Block:
    """A part of what a node holds of a step."""

    node: str
    number: int  # among the blocks of its node
    start: int  # in the files of its node, laid one behind the other
    length: int
    crc: int


@dataclass(frozen=True, kw_only=True)
class Parity:
    """One parity of a stripe, as it is ordered and as it is described where it lies."""

    step: int
    epoch: int
    scheme: Scheme
    stripe: int
    number: int  # 0: P, 1: Q
    blocks: tuple[Block, ...]  # in the order of coding
    files: Mapping[str, tuple[tuple[str, int], ...]]  # of each of their nodes: name, bytes

    @property
    def length(self) -> int:
        """Bytes, as many as the longest block has."""
        return max(block.length for block in self.blocks)

    @property
    def parities(self) -> int:
        """How many there are of the stripe."""
        return PARITIES[self.scheme]

    def name(self, turn: int) -> str:
        """Of its blob; two turns do not overwrite each other."""
        return f"parity-{turn}-{self.stripe}-{'pq'[self.number]}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, short: they lie in a header."""
        return {
            "at": [self.step, self.epoch, self.scheme, self.stripe, self.number],
            "blocks": [[b.node, b.number, b.start, b.length, b.crc] for b in self.blocks],
            "files": {node: [list(file) for file in files] for node, files in self.files.items()},
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Parity":
        """Inverse of `to_json`."""
        step, epoch, scheme, stripe, number = values["at"]
        return Parity(
            step=step,
            epoch=epoch,
            scheme=scheme,
            stripe=stripe,
            number=number,
            blocks=tuple(Block(*block) for block in values["blocks"]),
            files={node: tuple((name, size) for name, size in f) for node, f in values["files"].items()},
        )


def orders(group: Group, held: Mapping[str, Held], *, step: int, epoch: int) -> dict[str, list[Parity]]:
    """What each member of `group` shall store of the others, by node; what is empty is not stored."""
    made: dict[str, list[Parity]] = {node: [] for node in group.ids}
    for stripe, each in enumerate(group.stripes()):
        blocks = tuple(Block(node, number, *held[node].blocks[number]) for node, number in each.data)
        for number, holder in enumerate(each.parity):
            parity = Parity(
                step=step,
                epoch=epoch,
                scheme=group.scheme,
                stripe=stripe,
                number=number,
                blocks=blocks,
                files={block.node: held[block.node].files for block in blocks},
            )
            if parity.length:
                made[holder].append(parity)
    return made


@dataclass(frozen=True)
class Stored:
    """A parity, where it lies."""

    holder: str
    blob: str
    parity: Parity


@dataclass(frozen=True)
class BlockRecipe:
    """How one lost block is made."""

    wanted: int  # its number in the stripe
    block: Block
    stripe: tuple[Block, ...]
    gone: frozenset[int]  # numbers in the stripe that cannot be read, the wanted one among them
    parities: tuple[Stored, ...]  # that can be


@dataclass(frozen=True)
class Recipe:
    """How all that a lost node held of a step is made."""

    node: str
    step: int
    kind: SourceKind
    files: tuple[tuple[str, int], ...]
    blocks: tuple[BlockRecipe, ...]


def recipes(lost: Collection[str], stored: Sequence[Stored]) -> list[Recipe]:
    """How the state of `lost` nodes is made from parities on others: of the newest step for which it can be.

    A lost node of which no parity tells held nothing. Raises NotProtected when no step is left.
    """
    here = [each for each in stored if each.holder not in lost]
    problems: list[str] = []
    rounds = {(each.parity.epoch, each.parity.step) for each in here}
    for epoch, step in sorted(rounds, reverse=True):
        of_round = [each for each in here if (each.parity.epoch, each.parity.step) == (epoch, step)]
        try:
            return [
                _recipe(node, lost, of_round)
                for node in sorted(lost)
                if any(node in each.parity.files for each in of_round)
            ]
        except NotProtected as error:
            problems.append(str(error))
    none = f"the nodes that are left hold nothing of {_nodes(lost)}: no round of protection had been finished"
    raise NotProtected(problems[0] if problems else none)


def _recipe(node: str, lost: Collection[str], stored: Sequence[Stored]) -> Recipe:
    parity = next(each.parity for each in stored if node in each.parity.files)
    files = parity.files[node]
    total, made = sum(size for _, size in files), []
    for stripe in _stripes(stored):
        blocks = stripe[0].parity.blocks
        for number, block in enumerate(blocks):
            if block.node != node or not block.length:
                continue
            gone = frozenset(i for i, other in enumerate(blocks) if other.node in lost)
            if len(gone) > len(stripe):
                raise NotProtected(_too_many(lost, parity))
            made.append(BlockRecipe(number, block, blocks, gone, stripe))
    if sum(recipe.block.length for recipe in made) != total:
        raise NotProtected(_too_many(lost, parity))  # some stripe has lost all of its parities
    kind: SourceKind = "peer" if parity.scheme == "replica" else "parity"
    return Recipe(node, parity.step, kind, files, tuple(made))


def _stripes(stored: Iterable[Stored]) -> Iterator[tuple[Stored, ...]]:
    """Parities of one stripe together, P first."""
    by_stripe: dict[tuple[str, ...], dict[int, Stored]] = {}
    for each in stored:
        # groups number their stripes alike, so it is the blocks that say which one this is
        key = tuple(f"{block.node} {block.number}" for block in each.parity.blocks)
        by_stripe.setdefault(key, {})[each.parity.number] = each
    for parities in by_stripe.values():
        yield tuple(parities[number] for number in sorted(parities))


def _too_many(lost: Collection[str], parity: Parity) -> str:
    return (
        f"{_nodes(lost)} {'is' if len(lost) == 1 else 'are'} lost, and of step {parity.step} the nodes that "
        f"are left hold too little ({parity.scheme} bears the loss of {parity.parities} of a group at once)"
    )


def _nodes(nodes: Collection[str]) -> str:
    names = ", ".join(sorted(nodes))
    return f"node {names}" if len(nodes) == 1 else f"nodes {names}"
