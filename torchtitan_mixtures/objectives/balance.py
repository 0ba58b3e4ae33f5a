"""Losses that keep routers from sending all samples to the same experts, and what is reported.

Source: Fedus, Zoph, Shazeer 2021 (arXiv 2101.03961), equation 4, with the load of all k choices
instead of the first; z-loss: Zoph et al. 2022 (arXiv 2202.08906), equation 5. The load is that of
the samples of all ranks in a microbatch (Qiu et al. 2025, arXiv 2501.11873), so that the loss does
not depend on how many ranks share them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_mixtures.objectives.outputs import RouterStatistics


def mean_over_ranks(rows: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """Average over the ranks that hold other samples, without a gradient."""
    rows = rows.detach().clone()
    if mesh is None or mesh.size() == 1:
        return rows
    dist.all_reduce(rows, group=mesh.get_group())
    return rows / mesh.size()


def balance_loss(probabilities: Tensor, load: Tensor) -> Tensor:
    """`experts * sum_e probability_e * load_e`, mean over layers.

    Args:
        probabilities: Mean probability of each expert, `(layers, experts)`.
        load: Share of the choices that fell on it, `(layers, experts)`.

    Returns:
        A scalar: 1 if probabilities or load are even, the number of experts if all is one expert's.
    """
    return probabilities.shape[1] * (probabilities * load).sum(1).mean()


class RouterMeter:
    """Running means of what routers do, kept on the device until metrics are logged.

    Args:
        num_token_experts: So many experts, the first ones, mix tokens.
    """

    def __init__(self, num_token_experts: int = 0) -> None:
        self.means: Tensor | None = None  # (2, layers, experts), sum over microbatches
        self.balance: Tensor | None = None
        self.count = 0
        self._num_token_experts = num_token_experts

    def reset(self) -> None:
        """Forget everything added so far."""
        self.means = self.balance = None
        self.count = 0

    def add(self, means: Tensor, balance: Tensor) -> None:
        """Add load and probabilities of all ranks' samples, and the balance loss of a microbatch.

        Args:
            means: `(2, layers, experts)`.
            balance: A scalar.
        """
        balance = balance.detach()
        self.means = means if self.means is None else self.means + means
        self.balance = balance if self.balance is None else self.balance + balance
        self.count += 1

    def scalars(self) -> dict[str, float]:
        """What is logged: the balance loss, and of each layer how it chooses.

        The largest load is relative to an even one (1 = even), and the entropy of the load to that
        of an even one. `token_probability` is that of all token mixers together: where both kinds
        are always chosen, the load does not show that one of them has all the weight.
        """
        if self.means is None or self.balance is None:
            return {}
        load, probabilities = self.means.double() / self.count
        experts = load.shape[1]
        entropy = torch.special.entr(load).sum(1) / torch.log(torch.tensor(float(experts)))
        largest = load.max(1).values * experts
        token = probabilities[:, : self._num_token_experts].sum(1)
        numbers = torch.stack([largest, entropy, token]).tolist()
        names = ("largest_load", "load_entropy", "token_probability")
        scalars = {"router/balance_loss": float(self.balance) / self.count}
        for name, values in zip(names, numbers, strict=True):
            scalars |= {f"router/layer_{layer}/{name}": v for layer, v in enumerate(values)}
        return scalars


def router_losses(
    router: RouterStatistics, mesh: DeviceMesh | None, balance_weight: float, z_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weigh the losses of a model's routers.

    Args:
        router: Statistics of this rank's samples.
        mesh: The ranks that hold other samples.
        balance_weight: Weight of `balance_loss`.
        z_weight: Weight of the squared logarithm of the partition function.

    Returns:
        The weighted sum, a scalar; and of all ranks, for reports, load and probabilities, `(2,
        layers, experts)`, and the balance loss.
    """
    means = mean_over_ranks(torch.stack([router.load, router.probabilities]), mesh)
    load, probabilities = means
    balance = balance_loss(probabilities, load)
    loss = balance_weight * balance_loss(router.probabilities, load)
    if z_weight:
        loss = loss + z_weight * router.z.mean()
    return loss, means, balance
