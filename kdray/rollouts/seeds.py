"""Reproducible random numbers: every draw is a hash of its purpose, independent of when it happens."""

from __future__ import annotations

import hashlib

import numpy as np

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def sample_seed(run_seed: int, stream: str, sample_id: int) -> int:
    """Unsigned 64-bit seed of one sample's draws. `stream` separates uses that share sample ids (train, eval)."""
    text = f"{run_seed}/{stream}/{sample_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def unit(run_seed: int, stream: str, sample_id: int) -> float:
    """Uniform number in [0, 1) for a decision about a sample; `stream` names the decision."""
    return sample_seed(run_seed, stream, sample_id) / 2.0**64


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), one per (seed, position) pair, float64 [n]: the splitmix64 finaliser over seed + position.

    Args: seeds: [n] uint64; positions: [n] integers >= 0.
    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    with np.errstate(over="ignore"):
        z = seeds.astype(np.uint64) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31))) & _MASK
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
