"""An exponential moving average of a model's parameters, sharded as they are, in checkpoints.

After every optimizer step, in float32: `average = decay * average + (1 - decay) * parameter`. Its
start is not corrected: it begins as the parameters that training begins with, initial or loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import FSDPModule

STATE = "ema"
"""Name of the average in a checkpoint; tensors are `ema.` and the parameter's name."""


def plain_name(name: str) -> str:
    """The name of a parameter without what wrappers of its block add to it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


class EMA(Stateful):
    """The average of all parameters of a model, one for each, on its device and of its layout.

    Args:
        model_parts: The model, or this rank's stages of it, with their weights.
        decay: Share of the average that a step keeps.
    """

    def __init__(self, model_parts: Sequence[nn.Module], decay: float) -> None:
        self.decay = decay
        self._model_parts = list(model_parts)
        self._parameters = {
            plain_name(name): parameter
            for part in model_parts
            for name, parameter in part.named_parameters()
        }
        self._averages = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in self._parameters.items()
        }
        self._is_loaded = False

    def start(self) -> None:
        """Begin with the parameters as they are now, unless an average was loaded."""
        if not self._is_loaded:
            _copy(self._parameters, self._averages)

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters in, after an optimizer step."""
        averages = [_local(average) for average in self._averages.values()]
        current = [_local(parameter).float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(averages, current, 1 - self.decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the model have the average as its parameters, for validation and samples."""
        kept = {name: _local(p).detach().clone() for name, p in self._parameters.items()}
        self._reshard()
        _copy(self._averages, self._parameters)
        try:
            yield
        finally:
            self._reshard()
            _copy(kept, self._parameters)

    def _reshard(self) -> None:
        """Let no unit keep whole parameters of before or after an exchange."""
        for part in self._model_parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name."""
        return dict(self._averages)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take averages over; DCP has written them in place already."""
        _copy(state_dict, self._averages)
        self._is_loaded = True


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        local = _local(tensor)
        if local is not _local(source[name]):
            local.copy_(_local(source[name]))
