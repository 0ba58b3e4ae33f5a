"""What is reported of a mixture of diffusers: losses by domain, and how its router does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def router_cross_entropy(logits: Tensor, domains: Tensor) -> Tensor:
    """Cross-entropy of a router's guess of each sample's domain, `(batch,)`, in nats.

    Args:
        logits: `(batch, experts)`; expert k is that of domain k.
        domains: `(batch,)` int64.
    """
    return F.cross_entropy(logits, domains, reduction="none")


class DomainMeter:
    """Sums over samples, kept on the device until they are read.

    Args:
        experts: Name of each expert.
        domains: Name of each domain; none: samples have no domains.
        has_own_experts: Whether expert k is that of domain k, which the router is to tell.
        loss_mesh: The ranks that hold other positions.
    """

    def __init__(
        self,
        experts: Sequence[str],
        domains: Sequence[str] = (),
        has_own_experts: bool = True,
        loss_mesh: Callable[[], DeviceMesh | None] = lambda: None,
    ) -> None:
        self._experts = tuple(experts)
        self._domains = tuple(domains)
        self._has_own_experts = has_own_experts
        self._loss_mesh = loss_mesh
        self._sums: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget everything added so far."""
        self._sums = {}

    def add(
        self,
        losses: Tensor,
        is_supervised: Tensor,
        domains: Tensor | None,
        logits: Tensor | None,
        gates: Tensor,
    ) -> None:
        """Add a batch.

        Args:
            losses: Loss of each position, `(batch, tokens)`; zero where there is none.
            is_supervised: `(batch, tokens)` bool.
            domains: `(batch,)` int64; None: not known.
            logits: Of the router, `(batch, experts)`; None: it was not asked.
            gates: `(batch, experts)`.
        """
        is_real = is_supervised.any(1).double()  # others are padding
        self._add("gates", (gates.detach().double() * is_real[:, None]).sum(0))
        if logits is not None:
            logits = logits.detach().double()
            entropy = torch.special.entr(logits.softmax(1)).sum(1)
            self._add("entropy", torch.stack([(entropy * is_real).sum(), is_real.sum()]))
        if domains is None or not self._domains:
            return
        own = F.one_hot(domains, len(self._domains)).double() * is_real[:, None]
        self._add("samples", own.sum(0))
        self._add("losses", losses.detach().double().sum(1) @ own)
        self._add("positions", is_supervised.double().sum(1) @ own)
        if logits is not None and self._has_own_experts:
            self._add("right", (logits.argmax(1) == domains).double() @ own)
            self._add("cross_entropy", router_cross_entropy(logits, domains) @ own)

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def scalars(self) -> dict[str, float]:
        """Means since `reset`; every rank must call this, as sums are reduced here.

        Of experts the share of the weight they had, and the entropy of the router's probabilities
        relative to even ones. Of domains the loss and how often the router's likeliest expert is
        theirs; the router's accuracy and cross-entropy (in nats) over all samples.
        """
        if not self._sums:
            return {}
        sums = self._reduce()
        gates = sums["gates"]
        scalars = {
            f"router/weight/{name}": value
            for name, value in zip(self._experts, (gates / gates.sum()).tolist(), strict=True)
        }
        if "entropy" in sums and len(self._experts) > 1:
            total, count = sums["entropy"].tolist()
            most = torch.log(torch.tensor(float(len(self._experts)), dtype=torch.float64))
            scalars["router/entropy"] = total / max(count, 1) / float(most)
        if "samples" not in sums:
            return scalars
        if "right" in sums:
            count = sums["samples"].sum().clamp(min=1)
            scalars["router/accuracy"] = float(sums["right"].sum() / count)
            scalars["router/cross_entropy"] = float(sums["cross_entropy"].sum() / count)
        for number, name in enumerate(self._domains):
            if sums["samples"][number]:
                loss = sums["losses"][number] / sums["positions"][number]
                scalars[f"domain/{name}/loss"] = float(loss)
                if "right" in sums:
                    right = sums["right"][number] / sums["samples"][number]
                    scalars[f"domain/{name}/router_accuracy"] = float(right)
        return scalars

    def _reduce(self) -> dict[str, Tensor]:
        """The sums over all ranks, on the CPU."""
        names = sorted(self._sums)  # the same on all ranks
        total = torch.cat([self._sums[name] for name in names])
        mesh = self._loss_mesh()
        if mesh is not None and mesh.size() > 1:
            dist.all_reduce(total, group=mesh.get_group())
        parts = total.cpu().split([len(self._sums[name]) for name in names])
        return dict(zip(names, parts, strict=True))
