"""Initial weights that do not depend on the number of ranks.

Random operators on a DTensor are broken on a CPU mesh (torch 2.13: every rank draws the same
shard). There, each parameter is drawn whole from a generator of its own, seeded by the run's seed
and the parameter's name, and each rank keeps its shard. Accelerators fill their shards in place
with PyTorch's own functions, which know about meshes.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class _Names:
    seed: int = 0
    of_parameter: dict[int, str] = field(default_factory=dict)


_names: ContextVar[_Names | None] = ContextVar("_names", default=None)


@contextmanager
def parameter_names(module: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Let the functions of this module know the parameters of `module` by name.

    Args:
        module: The model, whole or one pipeline stage of it (names are the same in both).
        seed: Seed of the run; None: the seed of PyTorch's global generator.
    """
    # Checkpoint and compile wrappers add parts to a name that must not change the weights.
    names = {
        id(parameter): name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
        for name, parameter in module.named_parameters()
    }
    token = _names.set(_Names(torch.initial_seed() if seed is None else seed, names))
    try:
        yield
    finally:
        _names.reset(token)


def normal_(parameter: Tensor, mean: float = 0.0, std: float = 1.0) -> None:
    """Fill with a normal distribution."""
    _fill(parameter, lambda full, rng: nn.init.normal_(full, mean, std, generator=rng))


def trunc_normal_(
    parameter: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0
) -> None:
    """Fill with a normal distribution cut at `a` and `b` (values, not multiples of `std`)."""
    _fill(parameter, lambda full, rng: nn.init.trunc_normal_(full, mean, std, a, b, generator=rng))


def xavier_uniform_(
    parameter: Tensor, fan_in: int | None = None, fan_out: int | None = None
) -> None:
    """Fill matrices with a uniform distribution of variance `2 / (fan_in + fan_out)`.

    Args:
        parameter: `(..., out, in)`: a matrix, or a stack of matrices that are drawn alike.
        fan_in: None: `in`.
        fan_out: None: `out`.
    """
    fan_in = parameter.shape[-1] if fan_in is None else fan_in
    fan_out = parameter.shape[-2] if fan_out is None else fan_out
    bound = math.sqrt(6 / (fan_in + fan_out))
    _fill(parameter, lambda full, rng: nn.init.uniform_(full, -bound, bound, generator=rng))


@torch.no_grad()
def _fill(parameter: Tensor, draw: Callable[[Tensor, torch.Generator | None], Tensor]) -> None:
    """Draw in float32 (in lower precision the cut-off is not exact), then copy."""
    if parameter.device.type != "cpu":
        drawn = parameter.float()
        draw(drawn, None)
        parameter.copy_(drawn)
        return
    full = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    draw(full, _generator(parameter))
    if isinstance(parameter, DTensor):
        # Without a source rank every rank cuts its shard from its own copy: no communication.
        full = distribute_tensor(
            full, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(full)


def _generator(parameter: Tensor) -> torch.Generator:
    names = _names.get()
    if names is None or id(parameter) not in names.of_parameter:
        raise RuntimeError("wrap the initialisation in `with init.parameter_names(model):`")
    key = f"{names.seed}/{names.of_parameter[id(parameter)]}".encode()
    digest = hashlib.sha256(key).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
