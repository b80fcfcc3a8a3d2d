"""What a row block reads and writes: its rows and columns out of tensors [B, N, H, D], head by head, and what
is hidden of its scores.

Rows and columns are padded to whole registers: R rows of each of a key head's group are M rows, C columns are
W. oneDNN compiles a product for every shape it meets, 0.4 ms and some 300 KiB each, and the lengths of packed
documents are never the same twice: padded, a run meets a few hundred shapes and then no more.
"""

from dataclasses import dataclass
from math import inf

import torch

from .plan import Step

PAD_ROWS, PAD_COLUMNS = 16, 32
AHEAD = 512  # columns of room to move on in, so that those of a window are not copied for each of its steps


@dataclass(frozen=True)
class Heads:
    """Heads of a step: `keys` key heads from `first_key` on, each serving `group` query heads in turn."""

    first_query: int
    first_key: int
    keys: int
    group: int

    @property
    def queries(self) -> slice:
        """All query heads of the step."""
        return slice(self.first_query, self.first_query + self.keys * self.group)


def heads_of(head: int, mask_heads: int, query_heads: int, key_heads: int) -> Heads:
    """Those that one mask head covers: there are 1, or as many as key or query heads."""
    queries, keys = query_heads // mask_heads, max(key_heads // mask_heads, 1)
    return Heads(head * queries, head * key_heads // mask_heads, keys, queries // keys)


def padded(size: int, to: int) -> int:
    """`size` rounded up to a multiple of `to`."""
    return -(-size // to) * to


def read_rows(x: torch.Tensor, step: Step, heads: Heads, dtype: torch.dtype) -> torch.Tensor:
    """The rows of a step, key head by key head: [B, N, H, D] -> [keys, M, D], zeros at the end."""
    rows = x[step.batch, step.first : step.last, heads.queries].transpose(0, 1)
    used = heads.group * rows.shape[1]
    own = x.new_empty(heads.keys, padded(used, PAD_ROWS), x.shape[-1], dtype=dtype)
    own[:, :used].unflatten(1, (heads.group, -1)).copy_(rows.unflatten(0, (heads.keys, heads.group)))
    if own.shape[1] > used:
        own[:, used:].zero_()
    return own


def write_rows(x: torch.Tensor, step: Step, heads: Heads, parts: list[torch.Tensor]) -> None:
    """The other way round: a part [M, D] for every key head into x [B, N, H, D]."""
    size = step.last - step.first
    rows = [row for part in parts for row in part[: heads.group * size].split(size)]
    # one pass: heads one by one take four times as long
    torch.stack(rows, 1, out=x[step.batch, step.first : step.last, heads.queries])


class Columns:
    """Columns of x [B, N, H, D], heads first, copied when a step comes to them.

    The copy is little longer than what a step sees: with documents it is not as long as the sequence, stays
    in a cache, and needs no new memory from the system.
    """

    def __init__(self, x: torch.Tensor, steps: list[Step], heads: int, dtype: torch.dtype) -> None:
        longest = max((step.ranges[-1][1] - step.ranges[0][0] for step in steps), default=0)
        self.x = x.transpose(1, 2)
        room = min(longest + AHEAD, x.shape[1]) + PAD_COLUMNS
        self.copy = x.new_empty(heads, room, x.shape[-1], dtype=dtype)
        self.place = (-1, -1)  # batch and first head of what is copied
        self.first = self.last = 0

    def read(self, step: Step, heads: Heads) -> tuple[torch.Tensor, ...]:
        """Those of a step, key head by key head: [W, D] each, zeros behind the step's own."""
        place, first, last = (step.batch, heads.first_key), step.ranges[0][0], step.ranges[-1][1]
        goes_on = place == self.place and self.first <= first <= self.last
        if not goes_on or padded(last - first, PAD_COLUMNS) > self.copy.shape[1] - (first - self.first):
            self.place, self.first, self.last = place, first, first
        if last > self.last:
            new = self.x[step.batch, heads.first_key : heads.first_key + heads.keys, self.last : last]
            self.copy[:, self.last - self.first : last - self.first] = new
            self.last = last
        spans: list[list[int]] = []
        for first, last, _ in step.ranges:
            if spans and spans[-1][1] == first:
                spans[-1][1] = last
            else:
                spans.append([first, last])
        parts = [self.copy[:, first - self.first : last - self.first] for first, last in spans]
        size = sum(part.shape[1] for part in parts)
        more = padded(size, PAD_COLUMNS) - size
        end = last - self.first
        if len(parts) == 1 and (last == self.last or not more):
            self.copy[:, end : end + more].zero_()
            return self.copy[:, end - size : end + more].unbind(0)
        if more:  # what lies behind is others' keys, and they need not be finite
            parts.append(self.copy.new_zeros(len(self.copy), more, self.copy.shape[-1]))
        return torch.cat(parts, 1).unbind(0)


def add_columns(total: torch.Tensor, step: Step, head: int, part: torch.Tensor) -> None:
    """Add a part [W, D] to the columns of a step: total [B, H, N, D]."""
    at = 0
    for first, last, _ in step.ranges:
        total[step.batch, head, first:last] += part[at : at + last - first]
        at += last - first


@dataclass(frozen=True)
class Hidden:
    """What a step hides: limits [R, c] of columns of its scores, minus infinity where hidden and infinity
    elsewhere, the rows [R, 1] that see nothing, and all that lies behind its own rows and columns."""

    rows: int
    columns: int
    limits: list[tuple[int, torch.Tensor]]  # (first column among those of the step, limit)
    blind: torch.Tensor | None

    def scores(self, flat: torch.Tensor, group: int) -> torch.Tensor:
        """The step's rows [group, R, W] of scores [M, W]; the rows and columns that pad it are hidden."""
        used = group * self.rows
        if len(flat) > used:
            flat[used:].zero_()  # finite, whatever a hidden key may be; what they are multiplied with is zero
        own = flat[:used]
        if flat.shape[1] > self.columns:
            own[:, self.columns :].fill_(-inf)
        return own.view(group, self.rows, -1)

    def parts(self, scores: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Views of the columns of scores [..., R, C] that have limits, and these."""
        return [(scores.narrow(-1, at, limit.shape[1]), limit) for at, limit in self.limits]


def hidden_of(step: Step, bounds: torch.Tensor, shift: int | None, work: torch.dtype) -> Hidden:
    """`bounds` [4, Nk] are lts, lte, uts, ute; `shift` is Nk - Nq of a causal mask.

    Distances, not comparisons, say what is hidden: torch has vector code for the first alone.
    """
    rows = torch.arange(step.first, step.last, dtype=torch.int32)[:, None]
    after = rows + 1
    highest = torch.full_like(rows, -inf, dtype=work)  # of all limits
    limits, at = [], 0
    for first, last, partial in step.ranges:
        if partial:
            lts, lte, uts, ute = bounds[:, first:last]
            # rows to the nearest hidden one: at least 1 where visible
            seen = torch.minimum(
                torch.maximum(lts - rows, after - lte), torch.maximum(uts - rows, after - ute)
            )
            if shift is not None:
                diagonal = torch.arange(first - shift, last - shift, dtype=torch.int32)
                torch.minimum(seen, after - diagonal, out=seen)
            limit = (seen.to(work) - 0.5).mul_(inf)
            limits.append((at, limit))
            torch.maximum(highest, limit.amax(-1, keepdim=True), out=highest)
        else:
            highest.fill_(inf)
        at += last - first
    blind = highest < 0
    return Hidden(step.last - step.first, at, limits, blind if bool(blind.any()) else None)
