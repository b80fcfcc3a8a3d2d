"""The configuration section of snapshots. No torch here; the section checks its own values."""

from dataclasses import dataclass
from typing import Annotated, Literal

FILE_HEADER_BYTES = 2 << 20  # of an arena or a slot, before its data


@dataclass(frozen=True, kw_only=True)
class SnapshotConfig:
    """Section `[snapshot]`."""

    enabled: Annotated[
        Literal["auto"] | bool,
        "Keep copies of the state in the memory of each node, so that a lost process costs no finished step. "
        "auto: where the memory suffices; true: refuse to start where it does not.",
    ] = "auto"
    every: Annotated[
        int,
        "Steps between snapshots. 0: every step where the copy fits beside one, or else as far apart as "
        "measured copies and failures say.",
        "steps",
    ] = 0
    slots: Annotated[
        int,
        "Copies kept for each rank beside its living state; one is being written while others stand. "
        "0: 3, of which one waits until it is on disk or other nodes have what protects it.",
    ] = 0
    spares: Annotated[
        int,
        "Warm processes that wait to take a lost rank's place. -1: one where the resources allow it.",
        "processes",
    ] = -1
    memory_share: Annotated[
        float, "Largest part of a node's memory that the living state and the copies of its ranks may take."
    ] = 0.5

    def problems(self) -> list[tuple[str, str]]:
        """Every impossible value as (key, what is wrong and what to write instead)."""
        found = []
        if self.every < 0:
            found.append(("every", f"is {self.every}; must be 0 (as often as is good) or more"))
        if self.slots < 2 and self.slots != 0:
            found.append(
                (
                    "slots",
                    f"is {self.slots}; at least 2: a kill while one is written must leave another; or 0 (3)",
                )
            )
        if self.spares < -1:
            found.append(("spares", f"is {self.spares}; use -1 (one where possible), 0 for none, or more"))
        if not 0 < self.memory_share <= 1:
            found.append(("memory_share", f"is {self.memory_share}; above 0 and up to 1, such as 0.5"))
        return found

    @property
    def copies(self) -> int:
        """Of each rank beside its living state."""
        return self.slots or 3

    def why_no_room(
        self, *, state_bytes: int, ranks: int, arena: bool, memory_bytes: int, shm_bytes: int
    ) -> str | None:
        """What a node with `ranks` ranks of `state_bytes` each lacks, and what would fit; None: nothing.

        `memory_bytes` are the node's, `shm_bytes` what its shared memory has free. Without an `arena` the
        living state is on a device and only copies take memory.
        """
        copies = self.copies + int(arena)
        needed = ranks * copies * (state_bytes + FILE_HEADER_BYTES)
        allowed = int(self.memory_share * memory_bytes)
        if needed <= min(allowed, shm_bytes):
            return None
        each, all_of_it = (f"{n / 2**20:,.0f} MiB" for n in (state_bytes, needed))
        what = f"{ranks} ranks with {copies} copies of {each} need {all_of_it}"
        if needed > allowed:
            share = needed / memory_bytes
            remedy = f"raise snapshot.memory_share above {share:.2f}" if share <= 1 else "use more nodes"
            have = f"snapshot.memory_share = {self.memory_share} of {memory_bytes / 2**20:,.0f} MiB is less"
        else:
            remedy = "give /dev/shm more (with Docker: --shm-size)"
            have = f"shared memory has {shm_bytes / 2**20:,.0f} MiB free"
        return f"{what}, and {have}; {remedy}, shard the state over more nodes, or set snapshot.enabled=false"
