"""Random generators keyed by purpose, so that draws do not depend on resumes, workers or the number of GPUs."""

from __future__ import annotations

import hashlib

import numpy as np


def keyed_seed(*parts: int | str) -> int:
    """Returns a 63-bit seed from its parts, equal on every machine. `("a", 1)` and `("a1",)` differ."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def keyed_rng(*parts: int | str) -> np.random.Generator:
    """Returns a generator for one draw, e.g. `keyed_rng(seed, step, key, "mask")`."""
    return np.random.Generator(np.random.PCG64(keyed_seed(*parts)))


def keyed_hash(seed: int, numbers: np.ndarray) -> np.ndarray:
    """Returns one 64-bit hash per number (finalizer of SplitMix64, Steele et al. 2014), equal on every machine.

    Sorting by it is a permutation that needs no generator state.
    """
    z = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
