"""What is watched of towers: how far a step moved them, and whether they learn at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import ParallelDims


class UpdateMeter:
    """Measures the update-to-weight ratio `||w - w_old|| / ||w_old||` of a step, per tower.

    Only of steps that `start` precedes; others cost nothing. The old weights are not kept: the
    moments that Adam and AdamW leave say what the step did (`last_update`). What rounding to the
    weights' dtype took away from an update is not seen, which matters for weights in bfloat16 only.

    Args:
        optimizers: Adam or AdamW, without AMSGrad; a hook is added to each.
        model_parts: What they optimize.
        tower_of: Maps a parameter's name to its tower's.
        towers: All that it may return.
        parallel_dims: The job's parallel layout.
    """

    def __init__(
        self,
        optimizers: OptimizersContainer,
        model_parts: Sequence[nn.Module],
        tower_of: Callable[[str], str],
        towers: Sequence[str],
        parallel_dims: ParallelDims,
    ) -> None:
        self._towers = list(towers)
        self._dims = parallel_dims
        self._row = {
            parameter: self._towers.index(tower_of(name))
            for part in model_parts
            for name, parameter in part.named_parameters()
        }
        self._sums: Tensor | None = None  # (towers, 2): squares of change and of old weights
        for optimizer in optimizers:
            optimizer.register_step_post_hook(self._measure)

    def start(self) -> None:
        """Measure the next step."""
        self._sums = torch.zeros(
            len(self._towers), 2, dtype=torch.float64, device=next(iter(self._row)).device
        )

    def finish(self) -> dict[str, float]:
        """Return the ratio of each tower with trained weights; every rank must call this."""
        if self._sums is None:
            return {}
        sums, self._sums = self._sums, None
        if self._dims.world_size > 1:
            sums = sums.to(self._dims.world_mesh.device_type)
            dist.all_reduce(sums)
        rows = zip(self._towers, sums.sqrt().tolist(), strict=True)
        return {tower: change / old for tower, (change, old) in rows if old}

    def _measure(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._sums is None:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                norms = torch.stack([
                    torch.linalg.vector_norm(x).double()
                    for x in last_update(parameter, optimizer.state.get(parameter, {}), group)
                ])  # fmt: skip
                self._sums[self._row[parameter]] += norms**2 / self._copies(parameter)

    def _copies(self, parameter: nn.Parameter) -> float:
        """Number of ranks that hold the same part of a parameter."""
        shards = 1
        if isinstance(parameter, DTensor):
            for dim, placement in enumerate(parameter.placements):
                shards *= 1 if placement.is_replicate() else parameter.device_mesh.size(dim)
        return self._dims.world_size / self._dims.pp / shards


@torch.no_grad()
def last_update(
    parameter: nn.Parameter, state: Mapping[str, Any], group: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Compute what the last step of Adam or AdamW added to a parameter, and what it was before.

    With bias-corrected moments the step is `u = lr * m / (sqrt(v) + eps)` (Kingma & Ba 2015,
    arXiv 1412.6980, Algorithm 1). AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) also shrinks
    the weights: `w = (1 - lr * decay) * w_old - u`; Adam has its decay in the moments.

    Args:
        parameter: After the step; of a sharded one, this rank's part is looked at.
        state: The optimizer's state of it: `exp_avg`, `exp_avg_sq`, `step`.
        group: Its group: `lr`, `betas`, `eps`, `weight_decay`, `decoupled_weight_decay`.

    Returns:
        Change and old value, of this rank's part of the parameter, in its dtype but at least
        float32.
    """
    new = _local(parameter)
    dtype = torch.promote_types(new.dtype, torch.float32)
    new = new.to(dtype)
    if parameter.grad is None:  # left alone
        return torch.zeros_like(new), new
    lr, (beta1, beta2) = group["lr"], group["betas"]
    step = _local(state["step"]).double()
    mean, square = _local(state["exp_avg"]).to(dtype), _local(state["exp_avg_sq"]).to(dtype)
    # Mostly in place: new memory costs more than the arithmetic.
    root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    change = (mean * (-lr / (1 - beta1**step))).div_(root)
    decay = lr * group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
    old = torch.sub(new, change, out=root).div_(1 - decay)
    return change.sub_(old, alpha=decay), old


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class IdleTowers:
    """Notices towers that got no gradient for several steps in a row."""

    PATIENCE = 3

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}

    def update(self, norms: Mapping[str, float]) -> list[str]:
        """Take the gradient norms of a step, by tower.

        Returns:
            Towers whose norm is zero for the third time running; each only once in such a run.
        """
        self._steps = {t: self._steps.get(t, 0) + 1 for t, norm in norms.items() if norm == 0}
        return [tower for tower, steps in self._steps.items() if steps == self.PATIENCE]
