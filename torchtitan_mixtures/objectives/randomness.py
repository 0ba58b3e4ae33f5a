"""Random numbers that belong to a sample, whatever batch, rank or device it is on.

All that is drawn for a sample (its noise, time, dropout of its class, ...) depends on the run's
seed, the sample's number in the run and what it is for. It is the same after a resume, and for
every number of ranks, microbatch size and device, as everything is drawn on the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def sample_generator(seed: int, sample: int, purpose: str) -> torch.Generator:
    """Make the generator of one sample for one purpose.

    PyTorch's generator on the CPU takes 32 bits of a seed, so that of n samples about n^2 / 2^33
    pairs share their numbers: one of a hundred thousand, a million of a hundred million. Which ones
    is left to the hash.

    Args:
        seed: Seed of the run.
        sample: Number of the sample in the run.
        purpose: What is drawn; different purposes give independent numbers.
    """
    key = f"{seed}/{sample}/{purpose}".encode()
    own_seed = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little")
    return torch.Generator().manual_seed(own_seed)


def draw_normal(seed: int, samples: Tensor, shape: Sequence[int], purpose: str) -> Tensor:
    """Draw standard normal numbers for each sample.

    Args:
        seed: Seed of the run.
        samples: Number of each sample in the run, `(batch,)` int64, best on the CPU (elsewhere the
            host waits for it).
        shape: Shape of what one sample gets.
        purpose: What it is for.

    Returns:
        `(batch, *shape)` float32, on the CPU.
    """
    numbers = torch.empty(len(samples), *shape, dtype=torch.float32, device="cpu")
    for row, sample in zip(numbers, samples.tolist(), strict=True):
        row.normal_(generator=sample_generator(seed, sample, purpose))
    return numbers


def draw_uniform(seed: int, samples: Tensor, purpose: str) -> Tensor:
    """Draw a number in [0, 1) for each sample.

    Args:
        seed: Seed of the run.
        samples: Number of each sample in the run, `(batch,)` int64, best on the CPU.
        purpose: What it is for.

    Returns:
        `(batch,)` float32, on the CPU.
    """
    return torch.cat(
        [
            torch.rand(1, generator=sample_generator(seed, sample, purpose), device="cpu")
            for sample in samples.tolist()
        ]
    )
