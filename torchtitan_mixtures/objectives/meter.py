"""Running sums of a loss in buckets: by modality, or by noise level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LossMeter:
    """Running sums of loss and supervised positions per bucket, kept on the device.

    Adding to it never waits for the device; reading does, and so happens only when metrics are
    logged.

    Args:
        names: Name of each bucket.
        group: What buckets are, first part of the names of scalars.
        in_bits: Whether the loss is in nats of a token, which are reported in bits too.
    """

    def __init__(self, names: Sequence[str], group: str = "modality", in_bits: bool = True):
        self.names = tuple(names)
        self.group = group
        self.in_bits = in_bits
        self.sums: Tensor | None = None  # (2, buckets) float64: sums of the loss, counts

    def empty(self) -> LossMeter:
        """Make another one with the same buckets."""
        return LossMeter(self.names, self.group, self.in_bits)

    def reset(self) -> None:
        """Forget everything added so far."""
        self.sums = None

    def add(self, losses: Tensor, counts: Tensor) -> None:
        """Add the sums of losses and the counts of one microbatch, each `(buckets,)`."""
        update = torch.stack([losses.detach().double(), counts.double()])
        self.sums = update if self.sums is None else self.sums + update

    def totals(self, device: torch.device) -> Tensor:
        """Return this rank's sums, `(2, buckets)` float64, zeros if nothing was added."""
        if self.sums is None:
            return torch.zeros(2, len(self.names), dtype=torch.float64, device=device)
        return self.sums
