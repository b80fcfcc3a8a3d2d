"""What the CPU path computes, as one tensor of integers that can travel through torch's operators."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .blocks import PARTIAL, Bounds, classify, own_edges, steps


@dataclass(frozen=True)
class Step:
    """One row block of one mask head: its rows, and the ranges of columns that they see."""

    batch: int
    head: int
    first: int
    last: int
    ranges: tuple[tuple[int, int, bool], ...]  # (first column, last column, whether it needs the mask)


def encode(places: Iterable[tuple[int, int, Bounds]]) -> torch.Tensor:
    """The steps of every (batch, mask head): int64 [n]."""
    numbers: list[int] = []
    for batch, head, bounds in places:
        for first, last, ranges in steps(classify(bounds, *own_edges(bounds))):
            if not ranges:
                continue  # nothing to compute
            numbers += [batch, head, first, last, len(ranges)]
            for a, b, kind in ranges:
                numbers += [a, b, int(kind == PARTIAL)]
    return torch.tensor(numbers, dtype=torch.int64)


def decode(plan: torch.Tensor) -> list[Step]:
    """The steps again."""
    numbers, found, at = plan.tolist(), [], 0
    while at < len(numbers):
        batch, head, first, last, count = numbers[at : at + 5]
        flat = numbers[at + 5 : at + 5 + 3 * count]
        ranges = tuple((a, b, bool(m)) for a, b, m in zip(*(flat[i::3] for i in range(3)), strict=True))
        found.append(Step(batch, head, first, last, ranges))
        at += 5 + 3 * count
    return found
