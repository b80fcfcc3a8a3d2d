"""The order of samples, as a function: seed, epoch and index in, block and offset out.

An epoch permutes the blocks; `shuffle_blocks` neighbours of that order form a window, and the samples of a
window are permuted among themselves. So a reader needs one window of blocks at a time, and yet any index is
found without walking there. The permutations are Feistel networks over the next power of two, walked until
they land inside `n` (Black and Rogaway, "Ciphers with arbitrary finite domains"): nothing is stored.
"""

import hashlib
from bisect import bisect_right
from functools import lru_cache
from typing import overload

import numpy as np
import numpy.typing as npt

_ROUNDS = 6
_MASK64 = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: spreads every input bit into the high half of the product


def order_key(*parts: int | str) -> int:
    """A 64-bit key that depends on every part and on their order."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@overload
def permute(index: int, n: int, key: int) -> int: ...
@overload
def permute(index: npt.NDArray[np.int64], n: int, key: int) -> npt.NDArray[np.int64]: ...
def permute(index: int | npt.NDArray[np.int64], n: int, key: int) -> int | npt.NDArray[np.int64]:
    """Where the permutation of [0, n) chosen by `key` sends `index`; an array element by element."""
    if n <= 1:
        return index
    bits = max(2, (n - 1).bit_length())
    keys = _round_keys(key)
    if isinstance(index, np.ndarray):
        return _permute_array(index, n, bits, keys)
    value = _feistel(int(index), bits, keys)
    while value >= n:
        value = _feistel(value, bits, keys)
    return value


@lru_cache(maxsize=64)
def _round_keys(key: int) -> tuple[int, ...]:
    keys = []
    for _ in range(_ROUNDS):
        key = (key + _ODD) & _MASK64
        mixed = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        keys.append(mixed ^ (mixed >> 31))
    return tuple(keys)


def _feistel(value: int, bits: int, keys: tuple[int, ...]) -> int:
    low = bits // 2
    low_mask, high_mask = (1 << low) - 1, (1 << (bits - low)) - 1
    left, right = value >> low, value & low_mask
    for number, key in enumerate(keys):
        # The halves differ in width when `bits` is odd, so they are never swapped; each is changed in turn.
        if number % 2 == 0:
            left ^= ((((right ^ key) * _ODD) & _MASK64) >> 32) & high_mask
        else:
            right ^= ((((left ^ key) * _ODD) & _MASK64) >> 32) & low_mask
    return (left << low) | right


def _permute_array(
    index: npt.NDArray[np.int64], n: int, bits: int, keys: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    value = _feistel_array(index.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(value >= n)
    while len(outside):
        value[outside] = _feistel_array(value[outside], bits, keys)
        outside = outside[value[outside] >= n]
    return value.astype(np.int64)


def _feistel_array(value: npt.NDArray[np.uint64], bits: int, keys: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    low = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    left, right = value >> low, value & low_mask
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left ^= (((right ^ np.uint64(key)) * np.uint64(_ODD)) >> np.uint64(32)) & high_mask
        else:
            right ^= (((left ^ np.uint64(key)) * np.uint64(_ODD)) >> np.uint64(32)) & low_mask
    return (left << low) | right


class EpochOrder:
    """One epoch's order over blocks of `counts` samples each; the table is O(number of blocks)."""

    def __init__(
        self, counts: npt.NDArray[np.int64], *, key: int, shuffle: bool = True, shuffle_blocks: int = 8
    ) -> None:
        blocks = np.arange(len(counts), dtype=np.int64)
        if shuffle:
            blocks = permute(blocks, len(blocks), order_key(key, "blocks"))
        self._key = key
        self._shuffle = shuffle
        self._width = shuffle_blocks
        self._blocks: list[int] = blocks.tolist()
        # Python lists, because bisect on them is faster than on arrays for one index at a time.
        self._starts: list[int] = [0, *np.cumsum(counts[blocks]).tolist()]
        self._windows = [*self._starts[:-1:shuffle_blocks], self._starts[-1]]
        self._last_key = (-1, 0)

    def locate(self, index: int) -> tuple[int, int]:
        """The block and the sample inside it that come at `index` of the epoch."""
        if self._shuffle:
            window = self._window(index)
            start, stop = self._windows[window], self._windows[window + 1]
            index = start + permute(index - start, stop - start, self._window_key(window))
        slot = bisect_right(self._starts, index) - 1
        return self._blocks[slot], index - self._starts[slot]

    def blocks_after(self, index: int) -> list[int]:
        """The blocks of the window that follows the one of `index`; empty at the end of the epoch."""
        window = self._window(index) + 1
        return self._blocks[window * self._width : (window + 1) * self._width]

    def _window(self, index: int) -> int:
        return bisect_right(self._windows, index) - 1

    def _window_key(self, window: int) -> int:
        known, key = self._last_key
        if known != window:
            key = order_key(self._key, "window", window)
            self._last_key = (window, key)  # one assignment, so that two threads cannot see half of it
        return key
