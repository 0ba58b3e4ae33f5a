"""Counting collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

NOT_COUNTED = ("wait_tensor", "_wrap_tensor_autograd")  # they communicate nothing


class _Collectives(TorchDispatchMode):
    """Counts collectives. PyTorch's `CommDebugMode` fails on a second use in one process."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # comes back as operators on plain tensors
        name = func.__name__.split(".")[0]
        if func.namespace == "_c10d_functional" and name not in NOT_COUNTED:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count(function: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """Run a function; return its result, and how often it called each collective."""
    with _Collectives() as mode:
        result = function()
    return result, mode.counts
