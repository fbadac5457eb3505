"""Reads and writes nothing: view, negative, null draw, label dropout and order as pure functions of (seed,
epoch, image id).

Random numbers belong to the data, not to a rank, worker or micro-batch: a counter-based generator (Philox4x32-10,
Salmon et al. 2011) is evaluated at (image id, epoch, purpose), so the same rows meet the same draws for any number of
workers and after any crash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

U32, U64 = np.uint32, np.uint64
_MULTIPLIERS = (U64(0xD2511F53), U64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = U64(0xFFFFFFFF)


class Purpose(IntEnum):
    """What a draw is for; each has a stream of its own. Numbers are part of the data format: never reuse one."""

    SPLIT = 0
    VIEW = 1
    NEGATIVE = 2
    NULL = 3
    LABEL_DROPOUT = 4
    ORDER = 5
    SAMPLE = 6
    CROP = 7
    FRACTION = 8
    #: Of the metrics: subsets of KID, blocks of the bootstrap, and how often each is drawn.
    SUBSET = 9
    BLOCK = 10
    RESAMPLE = 11


def philox(counter: Sequence[NDArray[U32] | int], key: int) -> tuple[NDArray[U32], ...]:
    """Philox4x32-10 of four broadcastable uint32 counter words under a 64-bit key: four uint32 arrays."""
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, U32).astype(U64) for word in counter))
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (right >> U64(32)) ^ c1 ^ U64(k0),
            right & _LOW,
            (left >> U64(32)) ^ c3 ^ U64(k1),
            left & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return tuple(word.astype(U32) for word in (c0, c1, c2, c3))


def id_hashes(image_ids: Sequence[str]) -> NDArray[U64]:
    """The first 64 bits of blake2b of each id, uint64 [N]."""
    joined = b"".join(hashlib.blake2b(image_id.encode(), digest_size=8).digest() for image_id in image_ids)
    return np.frombuffer(joined, dtype="<u8").astype(U64)


def uniform(hashes_N: NDArray[U64], *, seed: int, epoch: int, purpose: Purpose) -> NDArray[np.float64]:
    """One draw in [0, 1) per image, 53 bits, float64 [N]."""
    low, high = (hashes_N & _LOW).astype(U32), (hashes_N >> U64(32)).astype(U32)
    a, b, _, _ = philox((low, high, epoch, int(purpose)), seed)
    return ((a >> U32(5)).astype(np.float64) * (1 << 26) + (b >> U32(6))) / (1 << 53)


def held_out(hashes_N: NDArray[U64], fraction: float) -> NDArray[np.bool_]:
    """The rows that training never sees; the same for every seed, so that runs compare."""
    return uniform(hashes_N, seed=0, epoch=0, purpose=Purpose.SPLIT) < fraction


def within_fraction(hashes_N: NDArray[U64], fraction: float) -> NDArray[np.bool_]:
    """A share of the rows; the same for every seed, and a smaller share lies within a larger one."""
    return uniform(hashes_N, seed=0, epoch=0, purpose=Purpose.FRACTION) < fraction


def views(hashes_N: NDArray[U64], num_views: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The view of each image in this epoch."""
    draw = uniform(hashes_N, seed=seed, epoch=epoch, purpose=Purpose.VIEW)
    return (draw * num_views).astype(np.int64)


def crop_places(image_id: str, view: int) -> tuple[float, float]:
    """Where a free crop lies in its margin, from 0 (left, top) to 1 (right, bottom)."""
    hashes = id_hashes([image_id])
    left, top = (uniform(hashes, seed=side, epoch=view, purpose=Purpose.CROP)[0] for side in (0, 1))
    return float(left), float(top)


def negatives(hashes_N: NDArray[U64], labels_M: NDArray[np.integer], *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The wrong condition of each image: the label of row floor(u * M) of the whole data set (labels_M)."""
    draw = uniform(hashes_N, seed=seed, epoch=epoch, purpose=Purpose.NEGATIVE)
    return labels_M[(draw * len(labels_M)).astype(np.int64)].astype(np.int64)


def order(hashes_N: NDArray[U64], *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of one epoch: rows sorted by their draw, ties by row."""
    return np.argsort(uniform(hashes_N, seed=seed, epoch=epoch, purpose=Purpose.ORDER), kind="stable")


def sequence_uniforms(seeds_B: NDArray[np.integer], num_tokens: int) -> NDArray[np.float64]:
    """The draws of generation: one per (sequence seed, token), float64 [B, L] in [0, 1), 32 bits each."""
    seeds = np.asarray(seeds_B).astype(np.int64).view(U64)[:, None]
    low, high = (seeds & _LOW).astype(U32), (seeds >> U64(32)).astype(U32)
    groups = -(-num_tokens // 4)
    words = philox((low, high, np.arange(groups, dtype=U32)[None], int(Purpose.SAMPLE)), 0)
    return np.stack(words, axis=-1).reshape(len(seeds), 4 * groups)[:, :num_tokens] / float(1 << 32)
