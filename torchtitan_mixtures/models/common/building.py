"""Initial weights of modules built without a trainer, and initial weights with a pattern."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from torchtitan_mixtures.models.common import init


class _Initialisable(Protocol):
    def init_weights(self) -> None: ...


def initialise(module: _Initialisable) -> None:
    """Call `init_weights` of a module that is built for itself.

    PyTorch's global generator decides, so that two modules that are built one after the other
    differ. On the meta device there is nothing to fill yet: whoever gives the module memory calls
    `init_weights` by the names of parameters.
    """
    assert isinstance(module, nn.Module)
    if any(parameter.device.type == "meta" for parameter in module.parameters()):
        return
    seed = int(torch.randint(2**62, (), device="cpu"))
    with init.parameter_names(module, seed):
        module.init_weights()


@torch.no_grad()
def assign(parameter: Tensor, values: Tensor) -> None:
    """Fill with values of the same shape; of a distributed parameter each rank keeps its shard."""
    values = values.to(parameter.device)
    if isinstance(parameter, DTensor):
        # Every rank has all values, so nothing need be sent.
        values = distribute_tensor(
            values, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(values)
