"""What models of images return and their losses take."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RouterStatistics(NamedTuple):
    """How the routers of a model decided about one batch; of this rank's samples.

    Attributes:
        probabilities: Mean over samples of each expert's probability, `(layers, experts)` float32;
            carries the gradient of the balance loss.
        load: Share of all choices that fell on each expert, `(layers, experts)` float32, rows sum
            to 1; no gradient.
        z: Mean over samples of the squared logarithm of the partition function, `(layers,)`
            float32.
    """

    probabilities: Tensor
    load: Tensor
    z: Tensor


class DenoiserOutput(NamedTuple):
    """What a denoising model returns.

    Attributes:
        prediction: In patch space, `(batch, tokens, patch_size**2 * out_channels)`; of a router
            without experts empty.
        router: Statistics of its routers; None if it has none.
        gates: Of a mixture of diffusers the weight of each expert, `(batch, experts)`.
        router_logits: Of a mixture of diffusers, `(batch, experts)`; None if weights were given.
    """

    prediction: Tensor
    router: RouterStatistics | None = None
    gates: Tensor | None = None
    router_logits: Tensor | None = None


class NestedStatistics(NamedTuple):
    """How the routers of a nested model decided about one batch; of this rank's tokens, detached.

    Attributes:
        load: Share of the tokens that each expert got, `(routers, experts)` float32; rows sum to 1
            unless tokens skip blocks.
        probabilities: Mean over tokens of each expert's probability, `(routers, experts)` float32.
        entropy: Mean over tokens of the entropy of the probabilities, in nats, `(routers,)`
            float32.
    """

    load: Tensor
    probabilities: Tensor
    entropy: Tensor


class ClassifierOutput(NamedTuple):
    """What a classifier of images returns.

    Attributes:
        logits: `(batch, classes)`.
        router: Statistics of its routers; None if it has none.
    """

    logits: Tensor
    router: NestedStatistics | None = None
