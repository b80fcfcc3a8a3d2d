"""The data of a run on its ranks: the index, counted once by all ranks together, and what can go wrong with
it.

The index is kept in the run's folder. A run that goes on compares the source with it and refuses a changed
one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..parallel.collectives import gather_json, share_json
from ..parallel.mesh import FoldedMesh
from .data.blocks import list_blocks
from .data.config import DataConfig
from .data.dataset import Dataset
from .data.errors import DataError
from .data.index import Index
from .data.scan import BlockCount, scan_blocks
from .data.tokenizer import Tokenizer, resolve_tokenizer
from .data.unchanged import check_unchanged
from .journal import write_atomically
from .resume import newest_step

INDEX_FILE = "data-index.json"
Progress = Callable[[int, int, str], None]


class Corpus:
    """Tokenizer, index and samples of one run."""

    def __init__(self, tokenizer: Tokenizer, index: Index, dataset: Dataset, *, is_new: bool) -> None:
        self.tokenizer = tokenizer
        self.index = index
        self.dataset = dataset
        self.is_new = is_new  # counted now, not by an earlier start of the run


def open_corpus(
    config: DataConfig,
    mesh: FoldedMesh,
    run_dir: Path,
    *,
    seed: int,
    progress: Progress | None = None,
    goes_on: bool = False,
) -> Corpus:
    """Open the source on every rank. Raises DataError on all ranks when any of them finds something wrong.

    `goes_on`: the run has samples behind it, though it may have no checkpoint.
    """
    tokenizer = resolve_tokenizer(config)
    path = run_dir / INDEX_FILE
    known = _together(mesh, lambda: _read_known(path, config, goes_on) if mesh.world.rank == 0 else None)[0]
    if known is not None:
        index = Index.from_json(known)
    else:
        index = _count_together(config, tokenizer, mesh, progress)
        if mesh.world.rank == 0:
            write_atomically(path, index.to_json())
    return Corpus(tokenizer, index, Dataset(config, index, tokenizer, seed), is_new=known is None)


def share_corpus(config: DataConfig, mesh: FoldedMesh, own: Corpus | None, *, seed: int) -> Corpus | None:
    """The corpus that some ranks have open from before, on all of them; None where none has.

    Only a rank that has none opens it, by the index that it is told: nothing is counted again.
    """
    having = gather_json(own is not None, mesh.world, mesh.device)
    if not any(having):
        return None
    if all(having):
        return own
    first = having.index(True)
    text = share_json(own.index.to_json() if own is not None else None, mesh.world, mesh.device, first)

    def join() -> None:
        nonlocal own
        if own is None:
            tokenizer, index = resolve_tokenizer(config), Index.from_json(text)
            own = Corpus(tokenizer, index, Dataset(config, index, tokenizer, seed), is_new=False)

    _together(mesh, join)
    return own


def _read_known(path: Path, config: DataConfig, goes_on: bool) -> str | None:
    """The index of a run that has samples behind it; raises DataError when the source is another by now.

    Without a step nothing counts on the order yet: a first attempt at the wrong source can be mended.
    """
    if not path.exists() or not (goes_on or newest_step(path.parent)):
        return None
    text = path.read_text()
    check_unchanged(Index.from_json(text), config)
    return text


def _count_together(
    config: DataConfig, tokenizer: Tokenizer, mesh: FoldedMesh, progress: Progress | None
) -> Index:
    def scan_share() -> list[dict[str, Any]]:
        share = list_blocks(config)[mesh.world.rank :: mesh.world.size]
        return [count.to_json() for count in scan_blocks(share, config, tokenizer, progress)]

    shares = _together(mesh, scan_share)
    return Index.assemble(
        config, tokenizer, [BlockCount.from_json(value) for share in shares for value in share]
    )


def _together(mesh: FoldedMesh, work: Callable[[], Any]) -> list[Any]:
    """Every rank's result in rank order; a rank's DataError is raised on all, so that none waits for the
    others.
    """
    result: dict[str, Any] = {}
    try:
        result["value"] = work()
    except DataError as error:
        result["error"] = str(error)
    results = gather_json(result, mesh.world, mesh.device)
    if errors := [r["error"] for r in results if "error" in r]:
        raise DataError(errors[0])
    return [r["value"] for r in results]
