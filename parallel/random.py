"""Counter-based random numbers: element `i` of the stream `(seed, name)` is a function of those three alone.

A rank that holds rows 100 to 199 of a matrix draws exactly those numbers, so every layout starts from the
same model, and nobody draws numbers it does not keep. The generator is Philox-4x64 (Salmon et al., SC 2011),
whose raw stream numpy guarantees; each 64-bit word makes one normal number by the Box-Muller cosine.
"""

import hashlib
import math

import numpy as np

WORDS_PER_COUNT = 4  # Philox-4x64 yields four words a counter
CHUNK = 1 << 20  # numbers drawn at once: bounds the working memory to about 32 MiB


def normal(seed: int, name: str, start: int, count: int) -> np.ndarray:
    """Elements `start` to `start + count` of the stream, standard normal: [count] float32."""
    out = np.empty(count, dtype=np.float32)
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest(), "little")
    for done in range(0, count, CHUNK):
        part = out[done : done + CHUNK]
        counter, skip = divmod(start + done, WORDS_PER_COUNT)
        words = np.random.Philox(key=key, counter=counter).random_raw(skip + len(part))[skip:]
        radius = ((words >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
        angle = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0 * math.pi * 2.0**-32)
        part[:] = np.sqrt(-2.0 * np.log(radius)) * np.cos(angle)
    return out


def normal_box(
    seed: int, name: str, *, shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> np.ndarray:
    """Box `[offsets, offsets + sizes)` of a tensor of `shape` filled from the stream in row-major order."""
    if not sizes:
        return normal(seed, name, 0, 1).reshape(())
    if 0 in sizes:
        return np.empty(sizes, dtype=np.float32)
    # trailing dimensions that are whole form one contiguous run; what stands before them is walked row by row
    split = len(shape) - 1
    while split > 0 and sizes[split] == shape[split]:
        split -= 1
    run_length = math.prod(sizes[split:])
    stride = math.prod(shape[split + 1 :])
    out = np.empty((math.prod(sizes[:split]), run_length), dtype=np.float32)
    for row, index in enumerate(np.ndindex(*sizes[:split])):
        leading = 0
        for offset, i, extent in zip(offsets, index, shape, strict=False):
            leading = leading * extent + offset + i
        out[row] = normal(seed, name, (leading * shape[split] + offsets[split]) * stride, run_length)
    return out.reshape(sizes)
