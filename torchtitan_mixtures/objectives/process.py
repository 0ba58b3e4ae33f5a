"""What a process that turns data into noise offers to training, validation and sampling."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Process(Protocol):
    """A way from data to noise, and the loss of a model that goes it backwards.

    Times are the process's own: steps of `DDPM` (int64), numbers from 0 to 1 of `RectifiedFlow`
    (float32). All methods compute in float32 at least, whatever autocast says, on the device of
    their arguments, and never make the host wait.
    """

    def times(self, uniform: Tensor) -> Tensor:
        """Training times from uniform numbers in [0, 1), `(batch,)` each."""
        ...

    def level_times(self, levels: int) -> Tensor:
        """Fixed times for validation: the middle of each of `levels` equal parts, on the CPU."""
        ...

    def fraction(self, times: Tensor) -> Tensor:
        """How far towards noise times are, `(batch,)` float32 in [0, 1]."""
        ...

    def corrupt(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Mix data and noise.

        Args:
            clean: Data, `(batch, ...)`.
            noise: Standard normal, of the same shape.
            times: `(batch,)`.
        """
        ...

    def model_times(self, times: Tensor) -> Tensor:
        """What the model's embedding of time is fed, `(batch,)` float32 from 0 to about 1000."""
        ...

    def loss_terms(
        self, prediction: Tensor, clean: Tensor, noise: Tensor, times: Tensor
    ) -> dict[str, Tensor]:
        """Parts of the loss; their sum is `losses`.

        Args:
            prediction: What the model put out for `corrupt(clean, noise, times)`, in patch space,
                `(batch, tokens, patch_size**2 * out_channels)`.
            clean: Data, `(batch, tokens, patch_size**2 * channels)`.
            noise: Its noise, of the shape of `clean`.
            times: `(batch,)`.

        Returns:
            Means over the elements of each token, `(batch, tokens)`, by name.
        """
        ...

    def losses(self, prediction: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Loss of each token, `(batch, tokens)`; arguments as for `loss_terms`."""
        terms = self.loss_terms(prediction, clean, noise, times)
        return torch.stack(list(terms.values())).sum(0)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Lower precisions become float32; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Add axes of size 1 at the end, so that `(..., batch)` meets `(batch, ...)` of `like`."""
    return values.reshape(*values.shape, *[1] * (like.ndim - 1))
