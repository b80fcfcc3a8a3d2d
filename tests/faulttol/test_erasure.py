"""Erasure coding: whatever may be lost comes back to the bit, and whatever may not is refused by name.

Properties over random stripes; then what faults make of stored blocks. No process, no clock.
"""

import itertools
import mmap
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayfold.faulttol.erasure import MOST_DATA, ErasureError, Manifest, encode, manifest_of, rebuild

CACHE_PIECE = 64 << 10  # blocks are worked on in pieces of this size


def block(length: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(length)


@st.composite
def stripes(draw: st.DrawFn) -> tuple[list[bytes], int, list[int]]:
    """Blocks of unequal lengths, a number of parities, and numbers of lost blocks, as many or fewer."""
    lengths = draw(st.lists(st.integers(0, 100), min_size=1, max_size=12))
    parities = draw(st.integers(0, 2))
    total = len(lengths) + parities
    lost = draw(st.lists(st.integers(0, total - 1), max_size=parities, unique=True))
    seed = draw(st.integers(0, 1000))
    return [block(length, seed + i) for i, length in enumerate(lengths)], parities, lost


def stored(data: list[bytes], parities: int) -> tuple[dict[int, bytes], Manifest]:
    parity = [p.tobytes() for p in encode(data, parities)]  # type: ignore[arg-type]
    return dict(enumerate([*data, *parity])), manifest_of(data, parity)


@settings(max_examples=300, deadline=None)
@given(stripes())
def test_any_loss_up_to_the_parities_is_rebuilt_to_the_bit(case: tuple[list[bytes], int, list[int]]) -> None:
    """The promise of the scheme, for all lengths, and for losses of data and of parities alike."""
    data, parities, lost = case
    everything, manifest = stored(data, parities)
    made = rebuild({i: b for i, b in everything.items() if i not in lost}, manifest)
    assert sorted(made) == sorted(i for i in lost if i < len(data))
    assert all(made[i].tobytes() == data[i] for i in made)


@settings(max_examples=100, deadline=None)
@given(stripes(), st.data())
def test_more_losses_are_refused_with_numbers(
    case: tuple[list[bytes], int, list[int]], more: st.DataObject
) -> None:
    """Silence here would be a model of zeros."""
    data, parities, _ = case
    everything, manifest = stored(data, parities)
    count = more.draw(st.integers(1, len(data)))
    lost = more.draw(st.permutations(range(len(data))))[:count]
    also = [i for i in everything if i >= len(data)][: max(0, parities + 1 - count)]
    left = {i: b for i, b in everything.items() if i not in lost and i not in also}
    with pytest.raises(
        ErasureError, match=f"can lose {parities} and lost {count + len(also)}: data {min(lost)}"
    ):
        rebuild(left, manifest)


@pytest.mark.parametrize("lost", list(itertools.combinations(range(6), 2)))
def test_long_blocks_with_odd_ends_are_rebuilt(lost: tuple[int, int]) -> None:
    """Several pieces, none a multiple of the word or of the piece, as real shards are."""
    lengths = [2 * CACHE_PIECE + 13, CACHE_PIECE + 5, CACHE_PIECE, 3]
    data = [block(length, i) for i, length in enumerate(lengths)]
    everything, manifest = stored(data, 2)
    made = rebuild({i: b for i, b in everything.items() if i not in lost}, manifest)
    assert all(made[i].tobytes() == data[i] for i in lost if i < 4)


def test_q_is_the_sum_of_powers_of_two() -> None:
    """The definition, byte by byte, so that files of one version are read by the next."""
    data = [bytes([0x80]), bytes([0x03]), bytes([0xFF])]
    p, q = encode(data, 2)
    # 2 * 0x03 = 0x06; 4 * 0xff: 0xff -> 0xfe ^ 0x1d = 0xe3 -> 0xc6 ^ 0x1d = 0xdb
    assert (p[0], q[0]) == (0x80 ^ 0x03 ^ 0xFF, 0x80 ^ 0x06 ^ 0xDB)


def test_the_largest_stripe_is_as_good_as_a_small_one() -> None:
    """Powers of 2 repeat after 255: the first and the last block must still be told apart."""
    data = [block(9, i) for i in range(MOST_DATA)]
    everything, manifest = stored(data, 2)
    for lost in ((0, MOST_DATA - 1), (MOST_DATA - 1, MOST_DATA), (7, 100)):
        made = rebuild({i: b for i, b in everything.items() if i not in lost}, manifest)
        assert all(made[i].tobytes() == data[i] for i in lost if i < MOST_DATA)
    with pytest.raises(ErasureError, match="256 blocks"):
        encode([b"x"] * (MOST_DATA + 1), 2)


@pytest.mark.parametrize("damaged", range(6))
@pytest.mark.parametrize("lost", range(4))
def test_a_damaged_survivor_counts_as_lost(damaged: int, lost: int) -> None:
    """Memory flips bits too: with a parity to spare the stripe is rebuilt without the bad block."""
    data = [block(40, i) for i in range(4)]
    everything, manifest = stored(data, 2)
    everything[damaged] = bytes([everything[damaged][0] ^ 4]) + everything[damaged][1:]
    made = rebuild({i: b for i, b in everything.items() if i != lost}, manifest)
    assert made[lost].tobytes() == data[lost]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3), st.integers(0, 4), st.integers(0, 319))
def test_damage_beyond_the_parities_is_named(lost: int, damaged: int, bit: int) -> None:
    """Every single flipped bit is noticed; the message says which block to distrust."""
    if lost == damaged:
        return
    data = [block(40, i) for i in range(4)]
    everything, manifest = stored(data, 1)
    bad = bytearray(everything[damaged])
    bad[bit // 8] ^= 1 << bit % 8
    left = {i: b for i, b in everything.items() if i != lost} | {damaged: bytes(bad)}
    name = f"data {damaged}" if damaged < 4 else "parity P"
    with pytest.raises(ErasureError, match=rf"lost 2: data {lost} missing, {name} damaged"):
        rebuild(left, manifest)


def test_a_foreign_manifest_is_noticed() -> None:
    """Parity of step 7 with shards of step 8 must not make a model of neither."""
    data = [block(40, i) for i in range(3)]
    everything, manifest = stored(data, 1)
    wrong = Manifest(manifest.lengths, (manifest.checksums[0] ^ 1, *manifest.checksums[1:]))
    with pytest.raises(ErasureError, match=r"data 0 .*another stripe"):
        rebuild({i: b for i, b in everything.items() if i}, wrong)


def test_results_go_straight_into_given_memory() -> None:
    """Parity belongs in a mapped file and a rebuilt shard in an arena, without a second copy of either."""
    data = [block(50, 0), block(64, 1), block(20, 2)]
    target = mmap.mmap(-1, 128)
    made = encode(data, 2, out=[memoryview(target)[:64], memoryview(target)[64:]])
    manifest = manifest_of(data, made)
    assert zlib.crc32(target[:64]) == manifest.checksums[3]
    short, long = bytearray(20), bytearray(64)
    rebuilt = rebuild({0: data[0], 3: target[:64], 4: target[64:]}, manifest, out={1: long, 2: short})
    assert (bytes(long), bytes(short)) == (data[1], data[2])
    assert np.shares_memory(rebuilt[1], np.frombuffer(long, np.uint8))
    assert np.shares_memory(rebuilt[2], np.frombuffer(short, np.uint8))
    del made, rebuilt


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: encode([b"ab"], 1, out=[bytearray(3)]), "parity P has 3 bytes; give 2"),
        (lambda: encode([b"ab"], 1, out=[b"cd"]), "may only be read; give 2 that can be written"),
        (
            lambda: encode([b"ab"], 2, out=[bytearray(2)]),
            "memory for 1 parities is given and 2 are asked for",
        ),
        (lambda: encode([], 1), "1 to 255"),
        (lambda: encode([np.zeros((4, 4))[:, 1]], 1), "in one piece"),
        (
            lambda: rebuild({0: b"a"}, Manifest((2, 2), (0, 0, 0))),
            "data 0 has 1 bytes and its manifest says 2",
        ),
        (lambda: rebuild({5: b"a"}, Manifest((1, 1), (0, 0, 0))), "numbered 0 to 2"),
        (lambda: Manifest((1, 2), (0,)), "a manifest of 2 lengths and 1 checksums"),
        (lambda: Manifest.from_json({"lengths": [1]}), "is no manifest"),
        (lambda: Manifest.from_json({"lengths": [True], "checksums": [1]}), "is no manifest"),
    ],
)
def test_what_does_not_fit_is_refused(call: object, match: str) -> None:
    """Before a byte is written."""
    with pytest.raises(ErasureError, match=match):
        call()  # type: ignore[operator]


def test_a_manifest_survives_a_header() -> None:
    """It is kept as JSON beside each parity."""
    manifest = manifest_of([b"abc", b"d"], encode([b"abc", b"d"], 2))
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert (manifest.n_data, manifest.parities, manifest.length(3)) == (2, 2, 3)
