"""How a mixture of diffusers learns: together, each expert its domain, or the router alone.

Source: McAllister et al. 2025, arXiv 2501.05450, 3.2: experts learn their domains without each
other, and the router is a classifier of noised images.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from torchtitan_mixtures.objectives.domain_meter import DomainMeter, router_cross_entropy
from torchtitan_mixtures.objectives.outputs import DenoiserOutput


class RoutingTask:
    """What the router learns beside the loss of the prediction, and what is reported of it.

    Args:
        kind: `joint`: nothing more. `decentralised`: the domain of each sample. `router`: that, and
            there is no prediction.
        weight: Of the cross-entropy of `decentralised`.
        meter: Of losses by domain, and of the router.
    """

    def __init__(
        self, kind: Literal["joint", "decentralised", "router"], weight: float, meter: DomainMeter
    ) -> None:
        self.kind = kind
        self.meter = meter
        self._weight = weight

    def losses(self, output: DenoiserOutput, domains: Tensor | None) -> Tensor:
        """Cross-entropy of the router's guess of each sample's domain, `(batch,)`."""
        assert output.router_logits is not None and domains is not None
        return router_cross_entropy(output.router_logits, domains)

    def further_loss(self, output: DenoiserOutput, targets: Any, is_supervised: Tensor) -> Tensor:
        """What is added to the sum of the losses of all positions; a scalar.

        Args:
            output: The model's.
            targets: `DenoisingTargets`.
            is_supervised: `(batch, tokens)` bool.
        """
        if self.kind != "decentralised":
            return output.prediction.new_zeros(())
        of_samples = self.losses(output, targets.domains)
        return self._weight * (of_samples * is_supervised.sum(1)).sum()
