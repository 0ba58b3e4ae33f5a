"""Optimizers that treat parameters differently: with rates per tower, or decay of matrices alone.

Each model part has one optimizer, as in TorchTitan, whose parameters are in several groups: first
those with the values of `[optimizer]`, then one for each tower that `mixture.tower_lr` or
`mixture.tower_weight_decay` names. Every part has the same groups, empty ones among them, because
TorchTitan saves the schedule of the first optimizer only and loads it into all.

Values of a resumed run are those of the checkpoint, as TorchTitan has it for `optimizer.lr` and
`optimizer.weight_decay`; `checkpoint_config.check_resume` refuses per-tower values that differ.

Vision transformers are trained with weight decay of matrices alone (Steiner et al. 2021, arXiv
2106.10270): biases, norms and what a family's arguments name in `undecayed_parameters` keep theirs.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torchtitan.components.optimizer import (
    OptimizersContainer,
    OptimizersInBackwardContainer,
    build_optimizers,
)
from torchtitan.config.job_config import Optimizer as OptimizerConfig
from torchtitan.distributed import ParallelDims

from torchtitan_mixtures.job_config import Mixture
from torchtitan_mixtures.towers import tower_keys, tower_namer


class TowerOptimizers(OptimizersContainer):
    """TorchTitan's container, with a group for each tower that is treated in its own way.

    Args:
        model_parts: The model's parts, frozen parameters among theirs.
        optimizer_cls: Class of the optimizers.
        optimizer_kwargs: Their arguments, the learning rate and weight decay of all else.
        mixture: Says which towers have others.
    """

    def __init__(
        self,
        model_parts: list[nn.Module],
        optimizer_cls: type[Optimizer],
        optimizer_kwargs: dict[str, Any],
        mixture: Mixture,
    ) -> None:
        super().__init__(model_parts, optimizer_cls, optimizer_kwargs)
        self.towers = sorted({*mixture.tower_lr, *mixture.tower_weight_decay})
        self.frozen = frozenset(mixture.frozen_towers)
        for part, optimizer in zip(model_parts, self.optimizers, strict=True):
            _split_group(part, optimizer, self.towers, mixture)

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rates of the next step, of towers that have their own values."""
        groups = zip(self.towers, self.optimizers[0].param_groups[1:], strict=True)
        return {name: group["lr"] for name, group in groups if name not in self.frozen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; empty groups, which PyTorch 2.13 cannot load, stay as they are."""
        groups = [optimizer.param_groups for optimizer in self.optimizers]
        for optimizer in self.optimizers:
            optimizer.param_groups = [g for g in optimizer.param_groups if g["params"]]
        super().load_state_dict(state_dict)
        for optimizer, before in zip(self.optimizers, groups, strict=True):
            loaded = iter(optimizer.param_groups)
            optimizer.param_groups = [next(loaded) if g["params"] else g for g in before]


def _split_group(
    part: nn.Module, optimizer: Optimizer, towers: list[str], mixture: Mixture
) -> None:
    """Deal the parameters of an optimizer's only group out to groups."""
    tower_of = tower_namer(part.model_args)
    groups: dict[str | None, list[nn.Parameter]] = {name: [] for name in (None, *towers)}
    for name, parameter in part.named_parameters():
        if parameter.requires_grad:
            tower = tower_of(name)
            groups[tower if tower in towers else None].append(parameter)
    optimizer.param_groups.clear()
    for tower, parameters in groups.items():
        group: dict[str, Any] = {"params": parameters}
        if tower in mixture.tower_lr:
            group["lr"] = mixture.tower_lr[tower]
        if tower in mixture.tower_weight_decay:
            group["weight_decay"] = mixture.tower_weight_decay[tower]
        optimizer.add_param_group(group)


def build_tower_optimizers(
    model_parts: list[nn.Module],
    optimizer_config: OptimizerConfig,
    parallel_dims: ParallelDims,
) -> OptimizersContainer:
    """Build the optimizers of a TrainSpec; TorchTitan's own where no tower is named."""
    optimizers = build_optimizers(model_parts, optimizer_config, parallel_dims)
    mixture = tower_keys(model_parts[0])
    if mixture is None or not (mixture.tower_lr or mixture.tower_weight_decay):
        return optimizers
    optimizer_cls = type(optimizers.optimizers[0])
    return TowerOptimizers(model_parts, optimizer_cls, optimizers.defaults, mixture)


class MatrixDecayOptimizers(OptimizersContainer):
    """TorchTitan's container, with a second group, without weight decay.

    Args:
        model_parts: The model's parts.
        optimizer_cls: Class of the optimizers.
        optimizer_kwargs: Their arguments, the weight decay of matrices.
    """

    def __init__(
        self,
        model_parts: list[nn.Module],
        optimizer_cls: type[Optimizer],
        optimizer_kwargs: dict[str, Any],
    ) -> None:
        super().__init__(model_parts, optimizer_cls, optimizer_kwargs)
        for part, optimizer in zip(model_parts, self.optimizers, strict=True):
            undecayed = _undecayed(part)
            parameters = [p for p in part.parameters() if p.requires_grad]
            optimizer.param_groups.clear()
            optimizer.add_param_group({"params": [p for p in parameters if p not in undecayed]})
            undecayed_group = [p for p in parameters if p in undecayed]
            optimizer.add_param_group({"params": undecayed_group, "weight_decay": 0.0})


def _undecayed(part: nn.Module) -> set[nn.Parameter]:
    """Vectors, and parameters that the model's arguments name."""
    names = set(getattr(part.model_args, "undecayed_parameters", ()))
    return {p for name, p in part.named_parameters() if p.ndim < 2 or name in names}


def build_matrix_decay_optimizers(
    model_parts: list[nn.Module],
    optimizer_config: OptimizerConfig,
    parallel_dims: ParallelDims,
) -> OptimizersContainer:
    """Build the optimizers of a TrainSpec whose weight decay is of matrices alone."""
    optimizers = build_optimizers(model_parts, optimizer_config, parallel_dims)
    if isinstance(optimizers, OptimizersInBackwardContainer):  # each has one parameter
        undecayed = {parameter for part in model_parts for parameter in _undecayed(part)}
        for optimizer in optimizers.optimizers:
            for group in optimizer.param_groups:
                if group["params"][0] in undecayed:
                    group["weight_decay"] = 0.0
        return optimizers
    return MatrixDecayOptimizers(model_parts, type(optimizers.optimizers[0]), optimizers.defaults)
