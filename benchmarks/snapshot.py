"""What a snapshot of a rank's state in memory costs, and how fast it is back.

    python benchmarks/snapshot.py [--mib 256] [--repeats 7] [--disk FOLDER]

Each measure alternates with its baselines in one process; medians, and the best of each for a machine that is
shared. Stalls are what the training thread waits: `start` and `barrier` of a capture around a step of
products of one thread, against a synchronous copy into shared memory (with and without checksums) and the
blocking time of torch's `async_save`. Restores fill tensors that are there already, as in a run, and verify
every byte where the format can: from a slot, from the same file on disk, from a checkpoint as the runtime
writes and loads it, and torch's own file, which has no checksums. Files on disk are read from a cold page
cache ("cold", as after a restart elsewhere) and a warm one. Prints one JSON object.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from isal import isal_zlib

from rayfold.faulttol.arena import Arena
from rayfold.faulttol.header import CHUNK_BYTES, HEADER_BYTES
from rayfold.faulttol.image import Image
from rayfold.faulttol.slots import Slots
from rayfold.faulttol.snapshot import Capture
from rayfold.faulttol.vault import RankFiles, Vault
from rayfold.runtime.checkpoint.planners import PartLoadPlanner, PartSavePlanner, by_name
from rayfold.runtime.checkpoint.storage import FolderReader, FolderWriter
from rayfold.runtime.images import fill_from
from rayfold.runtime.part import Part

TENSORS = 64


def main() -> None:
    """Measure all of it on a state of `--mib`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--disk", type=Path, default=None, help="a folder on a disk; default: the temporary one"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory(prefix="rayfold-bench-", dir="/dev/shm") as memory,
        tempfile.TemporaryDirectory(prefix="rayfold-bench-", dir=args.disk) as disk,
    ):
        dist.init_process_group("gloo", init_method=f"file://{disk}/store", rank=0, world_size=1)
        nbytes = args.mib << 20
        vault = Vault(memory, 4 * (nbytes + HEADER_BYTES), slots=2)
        files = vault.reserve(0, nbytes)
        arena, state = filled(files, nbytes)
        row = {
            "bench": "snapshot",
            "mib": args.mib,
            "repeats": args.repeats,
            **stalls(arena, state, files, Path(disk), args.repeats),
            **restores(arena, state, files, Path(disk), args.repeats),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
        }
        dist.destroy_process_group()
    print(json.dumps(row))


def filled(files: RankFiles, nbytes: int) -> tuple[Arena, dict[str, torch.Tensor]]:
    """An arena of random numbers in equal tensors."""
    arena = Arena.open(files.arena)
    numel = nbytes // TENSORS // 4
    state = {f"t{n}": arena.take(numel, torch.float32)[0] for n in range(TENSORS)}
    parts = [arena.part(name, tensor, (numel,), (0,)) for name, tensor in state.items()]
    arena.seal_index(parts, "bench", 0)
    arena.begin_update()
    for tensor in state.values():
        tensor.normal_()
    arena.end_update(0, {})
    return arena, state


def stalls(
    arena: Arena, state: dict[str, torch.Tensor], files: RankFiles, disk: Path, repeats: int
) -> dict[str, Any]:
    """Seconds for which a step waits, by way of saving; and the step beside a copy against the step alone."""
    capture = Capture(arena, Slots.open(files.slots))
    matrix = torch.randn(768, 768)
    spare = np.empty_like(arena.data)
    times: dict[str, list[float]] = {}
    # Long enough that a copy ends within it, as in training.
    products = max(1, round(0.4 / timed(lambda: matrix @ matrix)))

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    def step() -> None:
        for _ in range(products):
            matrix @ matrix

    for number in range(repeats + 1):
        note("step_alone_s", timed(step))
        arena.begin_update()
        arena.end_update(number, {})
        started = timed(lambda: capture.start(number, {"sample": number}))  # noqa: B023
        note("step_beside_copy_s", timed(step))
        waited = timed(capture.barrier)
        note("start_s", started)
        note("barrier_s", waited)
        note("capture_stall_s", started + waited)
        note("copy_and_crc_beside_step_s", capture.copy_s)
        capture.start(number, {})
        capture.barrier()
        note("copy_and_crc_s", capture.copy_s)
        capture.commit(number)
        note("copy_sync_s", timed(lambda: np.copyto(spare, arena.data)))
        note("copy_and_crc_sync_s", timed(lambda: copy_with_sums(spare, arena.data)))
        futures: list[Any] = []
        target = str(disk / f"dcp-{number}")
        note("async_save_stall_s", timed(lambda: futures.append(dcp.async_save(state, checkpoint_id=target))))  # noqa: B023
        finish(futures[0])
    capture.close()
    measured = {name: values[1:] for name, values in times.items()}  # the first round warms up
    medians = {name: statistics.median(values) for name, values in measured.items()}
    nbytes = arena.used
    return medians | {
        "stalls_best": {name: min(values) for name, values in measured.items()},
        "capture_stall_max_s": max(measured["capture_stall_s"]),
        "copy_and_crc_gb_per_s": nbytes / medians["copy_and_crc_s"] / 1e9,
        "step_slowdown": medians["step_beside_copy_s"] / medians["step_alone_s"] - 1,
        "async_save_stall_over_ours": medians["async_save_stall_s"] / medians["capture_stall_s"],
        "copy_sync_over_ours": medians["copy_sync_s"] / medians["capture_stall_s"],
    }


def restores(
    arena: Arena, state: dict[str, torch.Tensor], files: RankFiles, disk: Path, repeats: int
) -> dict[str, Any]:
    """Seconds until the state is back, by source."""
    slot = max(files.slots, key=lambda path: Image.open(path).step)
    ours, theirs = disk / "state.slot", disk / "state.pt"
    ours.write_bytes(slot.read_bytes())
    torch.save({name: tensor.clone() for name, tensor in state.items()}, theirs)
    parts = [Part.whole(name, tensor.clone()) for name, tensor in state.items()]
    checkpoint = disk / "checkpoint"
    writer = FolderWriter(checkpoint, {}, lambda folder: None)
    dcp.save(by_name(parts), storage_writer=writer, planner=PartSavePlanner())
    os.sync()

    def from_image(path: Path) -> None:
        fill_from(Image.open(path), parts)

    def from_checkpoint() -> None:
        dcp.load(by_name(parts), storage_reader=FolderReader(checkpoint), planner=PartLoadPlanner())

    def adopt() -> None:
        arena.rewind()
        assert arena.adopt("bench")
        for tensor in state.values():
            assert arena.take(tensor.numel(), tensor.dtype)[1]

    ways: dict[str, tuple[Callable[[], object], Path | None]] = {
        "restore_slot_s": (lambda: from_image(slot), None),
        "restore_slot_into_arena_s": (lambda: arena.load(Image.open(slot)), None),
        "adopt_arena_s": (adopt, None),
        "restore_disk_cold_s": (lambda: from_image(ours), ours),
        "restore_disk_warm_s": (lambda: from_image(ours), None),
        "restore_checkpoint_cold_s": (from_checkpoint, checkpoint / "rank-00000.bin"),
        "restore_checkpoint_warm_s": (from_checkpoint, None),
        "torch_load_cold_s": (lambda: torch.load(theirs, weights_only=True), theirs),
        "torch_load_warm_s": (lambda: torch.load(theirs, weights_only=True), None),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, (way, cold) in ways.items():
            if cold is not None:
                drop_from_cache(cold)
            give_back()
            times[name].append(timed(way))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians | {
        "restores_best": {name: min(values) for name, values in times.items()},
        "restore_slot_gb_per_s": arena.used / medians["restore_slot_s"] / 1e9,
        "disk_cold_over_slot": medians["restore_disk_cold_s"] / medians["restore_slot_s"],
        "disk_warm_over_slot": medians["restore_disk_warm_s"] / medians["restore_slot_s"],
        "checkpoint_cold_over_slot": medians["restore_checkpoint_cold_s"] / medians["restore_slot_s"],
        "checkpoint_warm_over_slot": medians["restore_checkpoint_warm_s"] / medians["restore_slot_s"],
        "torch_load_cold_over_slot": medians["torch_load_cold_s"] / medians["restore_slot_s"],
    }


def copy_with_sums(target: np.ndarray, source: np.ndarray) -> None:
    """What a capture does, on the thread that waits for it."""
    for begin in range(0, len(source), CHUNK_BYTES):
        piece = target[begin : begin + CHUNK_BYTES]
        np.copyto(piece, source[begin : begin + CHUNK_BYTES])
        isal_zlib.crc32(piece.data)


def finish(saving: Any) -> None:
    """Wait for the writing of an asynchronous save, which is not measured."""
    future: Future[Any] = getattr(saving, "upload_completion", saving)
    future.result(timeout=300)  # far more than a disk needs for this


def drop_from_cache(path: Path) -> None:
    """Have the next read come from the disk."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def give_back() -> None:
    """Have the next way not pay for the memory that the one before has freed."""
    ctypes.CDLL(None).malloc_trim(0)


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
