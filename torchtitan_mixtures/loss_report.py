"""Names of the scalars of a loss by bucket, and how the console shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

NATS_TO_BITS = 1 / math.log(2)


def bucket_scalars(
    prefix: str, losses: dict[str, tuple[float, int]], in_bits: bool = True
) -> dict[str, float]:
    """Name the scalars of each bucket: its loss, bits per token if it has them, share of targets.

    Args:
        prefix: First part of the names.
        losses: Loss per target and number of targets of each bucket.
        in_bits: Whether the loss is in nats per token.
    """
    total = sum(count for _, count in losses.values())
    scalars = {}
    for name, (loss, count) in losses.items():
        scalars[f"{prefix}/{name}/loss"] = loss
        if in_bits:
            scalars[f"{prefix}/{name}/bits_per_token"] = loss * NATS_TO_BITS
            scalars[f"{prefix}/{name}/token_share"] = count / total
    return scalars


def describe_losses(
    losses: dict[str, tuple[float, int]], group: str = "modality", in_bits: bool = True
) -> str:
    """Write losses for the console: `text: 5.123 (7.39 bits, 31%)`, or `noise 0.125: 0.9876`."""
    if not in_bits:
        return "  ".join(f"{group} {name}: {loss:.4f}" for name, (loss, _) in losses.items())
    total = sum(count for _, count in losses.values())
    return "  ".join(
        f"{name}: {loss:.4f} ({loss * NATS_TO_BITS:.3f} bits, {100 * count / total:.0f}%)"
        for name, (loss, count) in losses.items()
    )


def describe_shares(shares: dict[str, float]) -> str:
    """Write shares for the console, each after two blanks: `  accuracy: 71.40%`."""
    return "".join(f"  {name}: {100 * share:.2f}%" for name, share in shares.items())


def source_scalars(
    names: Sequence[str], counts: Sequence[Mapping[str, float]], packed: Mapping[str, float]
) -> dict[str, float]:
    """Name what the sources of the data have given, and how full sequences are.

    Args:
        names: Of the sources.
        counts: Of each source, see `MultimodalDataLoader.counts`.
        packed: `tokens` and `positions` of the sequences.
    """
    scalars = {
        f"data/{name}/{key}": number
        for name, of_source in zip(names, counts, strict=True)
        for key, number in of_source.items()
    }
    total = sum(of_source["tokens"] for of_source in counts)
    for name, of_source in zip(names, counts, strict=True):
        scalars[f"data/{name}/share"] = of_source["tokens"] / max(1.0, total)
    scalars["data/fill_rate"] = packed["tokens"] / max(1.0, packed["positions"])
    return scalars
