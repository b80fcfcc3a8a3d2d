"""What a tile is, and which architecture's table a device uses.

Each module of this folder begins with its table of tiles, one entry an architecture, and the reason for its
sizes. Keys are compute capabilities times ten: 80 (A100), 90 (H100, H200), 100 (B200).
"""

from dataclasses import dataclass

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {
    80: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # bytes a block may use, CUDA programming guide


@dataclass(frozen=True)
class Tile:
    """Shape of one program's work and how it is run."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def nearest_architecture(capability: tuple[int, int]) -> int:
    """The table to use on a device: the newest that is not newer than it and whose shared memory it has."""
    asked = capability[0] * 10 + capability[1]
    # cards of 8.6, 8.9 and 12.x have 99 KiB a block, which only the tiles of 80 keep to
    small = capability[0] == 12
    return max((a for a in ARCHITECTURES if a <= asked and not small), default=ARCHITECTURES[0])
