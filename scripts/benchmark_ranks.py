"""Runs of `scripts/benchmark.py parallel`, and a count of what their ranks send each other."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

# First: it points TorchTitan at the CPU if need be.
import torchtitan_mixtures  # noqa: F401  # isort: skip

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_mixtures.local_ranks import run_ranks
from torchtitan_mixtures.train import quiet_the_host


class UnknownCollectiveError(Exception):
    """A collective whose bytes nobody has said how to count: a hole in this benchmark."""


class Traffic(TorchDispatchMode):
    """Counts collectives of this rank and the bytes that each must move, by kind.

    DTensor and context parallelism communicate by `_c10d_functional`, FSDP, DDP and pipelines by
    `c10d`. Bytes are those received of an all-gather, sent of all else; of an all-reduce, those of
    a ring. A receive is counted where it is sent. Every collective is taken to be one of all ranks.
    """

    _SILENT = ("wait_tensor", "_wrap_tensor_autograd", "recv_", "barrier")

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # comes back as operators on plain tensors
        name = func.__name__.split(".")[0]
        if func.namespace in ("c10d", "_c10d_functional") and name not in self._SILENT:
            self._book(name, args)
        return func(*args, **(kwargs or {}))

    def _book(self, name: str, args: tuple) -> None:
        # `c10d` takes the output first where there are two tensors, `_c10d_functional` the input.
        first, second = (_num_bytes(arg) for arg in args[:2])
        others = self.ranks - 1
        share = others / self.ranks
        known = {
            "all_gather_into_tensor": ("all-gather", first * others),
            "_allgather_base_": ("all-gather", second * others),
            "reduce_scatter_tensor": ("reduce-scatter", first * share),
            "_reduce_scatter_base_": ("reduce-scatter", second * share),
            "all_reduce": ("all-reduce", first * 2 * share),
            "allreduce_": ("all-reduce", first * 2 * share),
            "all_to_all_single": ("all-to-all", first * share),
            "alltoall_base_": ("all-to-all", second * share),
            "send": ("send", first),
        }
        if name not in known:
            raise UnknownCollectiveError(
                f"{name} is not in the table of Traffic._book; add how many bytes it moves"
            )
        kind, moved = known[name]
        self.calls[kind] += 1
        self.bytes[kind] += round(moved)


def _num_bytes(tensors: Any) -> int:
    """Size of a tensor or of a list of them; 0 for anything else."""
    if isinstance(tensors, list | tuple):
        return sum(map(_num_bytes, tensors))
    return tensors.nbytes if isinstance(tensors, Tensor) else 0


def first_line(error: Exception) -> str:
    """Class of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def run_layout(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Run `function(*arguments)` in gloo processes; see `run_ranks`.

    Raises:
        RuntimeError: A rank failed: the first line of its error, for the table.
    """
    results = run_ranks(_guarded, ranks, function, arguments, timeout=600)
    for failure, _ in results:
        if failure:
            raise RuntimeError(failure)
    return [result for _, result in results]


def _guarded(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
    quiet_the_host()
    # It is about weights that are drawn differently on each rank; they are overwritten.
    warnings.filterwarnings("ignore", message="DTensor random operators")
    try:
        return "", function(*arguments)
    # A rank must answer whatever broke, or the others' timeout is all that is known; `run_layout`
    # raises it again in the process that asked.
    except Exception as error:
        time.sleep(5)  # other ranks shall fail by themselves, not by a lost connection
        return first_line(error), None
