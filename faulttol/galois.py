"""Arithmetic of bytes in GF(2^8), polynomial 0x11d: what the second parity of a stripe is made with.

Addition is exclusive or. Doubling works on eight bytes a word; products with other constants, which only
recovery needs, look up a table of 256 bytes.
"""

from functools import cache
from typing import Any, TypeAlias

import numpy as np

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Words: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]

PIECE = 64 << 10  # bytes of a block at a time: two sums, a block and scratch, well inside a core's cache
_LOW_SEVEN, _LOWEST = np.uint64(0x7F7F7F7F7F7F7F7F), np.uint64(0x0101010101010101)
_ONE, _SEVEN, _REST = np.uint64(1), np.uint64(7), np.uint64(0x1D)


def double(piece: Bytes, scratch: Words) -> None:
    """Multiply every byte by 2, in place: eight bytes at a time, those of an odd end by table."""
    whole = len(piece) // 8 * 8
    words, carry = piece[:whole].view(np.uint64), scratch[: whole // 8]
    np.right_shift(words, _SEVEN, out=carry)
    carry &= _LOWEST
    carry *= _REST
    words &= _LOW_SEVEN
    np.left_shift(words, _ONE, out=words)
    words ^= carry
    if whole < len(piece):
        multiply(piece[whole:], 2)


def multiply(block: Bytes, factor: int) -> None:
    """Multiply every byte by `factor`, in place."""
    products = table(factor)
    for start in range(0, len(block), PIECE):
        piece = block[start : start + PIECE]
        # twice as fast as numpy's indexing; the copy stays in the cache
        piece[:] = np.frombuffer(piece.tobytes().translate(products), np.uint8)


def times(a: int, b: int) -> int:
    """Product in GF(2^8)."""
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a = (a << 1) ^ (0x11D if a & 0x80 else 0)
        b >>= 1
    return product


def power(exponent: int) -> int:
    """2^exponent in GF(2^8)."""
    value = 1
    for _ in range(exponent % 255):
        value = times(value, 2)
    return value


def inverse(a: int) -> int:
    """The byte whose product with `a`, which is not 0, is 1."""
    return next(b for b in range(1, 256) if times(a, b) == 1)


@cache
def table(factor: int) -> bytes:
    """The product of `factor` with each of the 256 bytes."""
    return bytes(times(factor, byte) for byte in range(256))


def untangle(p: Bytes, q: Bytes, g_a: int, g_b: int) -> None:
    """From p = a + b and q = g_a a + g_b b to a (in p) and b (in q): b = (q + g_a p) / (g_a + g_b)."""
    divisor = inverse(g_a ^ g_b)
    for start in range(0, len(p), PIECE):
        a, b = p[start : start + PIECE], q[start : start + PIECE]
        both = a.copy()
        multiply(both, g_a)
        b ^= both
        multiply(b, divisor)
        a ^= b
