"""The mask of a dropout, drawn again wherever it is needed instead of being stored.

Whether a number is kept is a function of (seed, its flat index in the mask): a counter scrambled by
multiplications and shifts of 32 bits, with constants of murmur3 and of
https://github.com/skeeto/hash-prospector. So every path draws the same mask bit for bit, and so do a backward
pass and a recomputation. Not for cryptography.
"""

import math
from dataclasses import dataclass

import torch

from .dispatch import KernelError

WORD = 0xFFFF_FFFF
FACTORS = (0x7FEB_352D, 0x846C_A68B, 0xC2B2_AE35)
GOLDEN = 0x9E37_79B9  # spreads the upper half of an index over 32 bits
DRAW = 2**15  # words that the CPU draws at a time, with three arrays of 128 KB


@dataclass(frozen=True)
class Dropout:
    """A mask of a tensor [A, L, I, D], the same along L: drawn for [A, 1, I, width], width D or 1."""

    first: int  # keys, 32 bits each
    second: int
    kept: int  # of 2**32 words
    shape: tuple[int, int, int, int]
    width: int

    @property
    def scale(self) -> float:
        """What a kept number is multiplied by, so that the mean stays what it was."""
        return 2**32 / self.kept if self.kept else 0.0

    @property
    def limit(self) -> int:
        """The last word that is kept, words being read as signed numbers."""
        return max(0, self.kept - 1) - 2**31


def make_dropout(
    shape: tuple[int, ...], *, p: float, training: bool, seed: int, shared_dim: int | None
) -> Dropout:
    """The mask for a tensor of `shape`; p is rounded to a multiple of 2**-32."""
    if not 0 <= p <= 1:
        raise KernelError(f"p = {p} is no probability of dropping; use one from 0 to 1")
    if shared_dim is not None and not -len(shape) <= shared_dim < len(shape):
        raise KernelError(
            f"shared_dim = {shared_dim} is no axis of {list(shape)}; use -{len(shape)} to {len(shape) - 1}"
        )
    dim, last = shape[-1], len(shape) - 1
    axis = last if shared_dim is None else shared_dim % len(shape)
    if axis == last:
        four = (math.prod(shape[:-1]), 1, 1, dim)
    else:
        four = (math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 : -1]), dim)
    # splitmix64: neighbouring seeds have keys that share nothing
    word = (seed + 0x9E37_79B9_7F4A_7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58_476D_1CE4_E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D0_49BB_1331_11EB % 2**64
    word ^= word >> 31
    kept = round((1 - p) * 2**32) if training else 2**32
    width = 1 if shared_dim is not None and axis == last else dim
    return Dropout(word & WORD, word >> 32, kept, four, width)


def mask_reference(dropout: Dropout, device: torch.device) -> torch.Tensor:
    """The whole mask in 64-bit arithmetic: bool [A, 1, I, width], true where a number is kept."""
    groups, _, inner, _ = dropout.shape
    index = torch.arange(groups * inner * dropout.width, device=device)
    word = (index & WORD) ^ dropout.first
    word = (word ^ word >> 16) * FACTORS[0] & WORD
    word = word ^ word >> 15 ^ dropout.second ^ ((index >> 32) * GOLDEN & WORD)
    word = word * FACTORS[1] & WORD
    word = (word ^ word >> 16) * FACTORS[2] & WORD
    return ((word ^ 2**31) < dropout.kept).view(groups, 1, inner, dropout.width)


def draw(out: torch.Tensor, start: int, dropout: Dropout) -> None:
    """Fill `out` [N] with the mask times the scale from flat index `start` on, in 32 bits that wrap."""
    counter = torch.arange(min(DRAW, out.numel()), dtype=torch.int32, device=out.device)
    words, rests = torch.empty_like(counter), torch.empty_like(counter)
    done = 0
    while done < out.numel():
        index = start + done
        count = min(DRAW, out.numel() - done, 2**32 - index % 2**32)  # one upper half at a time
        word, rest = words[:count], rests[:count]
        torch.add(counter[:count], signed(index & WORD), out=word).bitwise_xor_(signed(dropout.first))
        _fold(word, 16, rest).mul_(signed(FACTORS[0]))
        _fold(word, 15, rest).bitwise_xor_(signed(dropout.second ^ ((index >> 32) * GOLDEN & WORD)))
        _fold(word.mul_(signed(FACTORS[1])), 16, rest).mul_(signed(FACTORS[2]))
        torch.le(word, dropout.limit, out=out[done : done + count])
        done += count
    out.mul_(dropout.scale)


def _fold(word: torch.Tensor, bits: int, rest: torch.Tensor) -> torch.Tensor:
    """word ^= word >> bits in place, where zeros come in; torch's own shift brings in the sign."""
    torch.bitwise_right_shift(word, bits, out=rest)
    return word.bitwise_xor_(rest.bitwise_and_(WORD >> bits))


def signed(word: int) -> int:
    """32 bits read as a signed number."""
    return word - 2**32 if word >= 2**31 else word
