"""Runs of `scripts/benchmark.py parallel`, and a count of what their ranks send each other."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

# First: it points TorchTitan at the CPU if need be.
import torchtitan_mixtures  # noqa: F401  # isort: skip

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_mixtures.local_ranks import run_ranks
from torchtitan_mixtures.planning.collectives import collective_of
from torchtitan_mixtures.train import quiet_the_host


class Traffic(TorchDispatchMode):
    """Counts collectives of this rank and the bytes that each must move, by kind.

    See `planning/collectives.py` for what is counted of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # comes back as operators on plain tensors
        collective = collective_of(func, args)
        if collective is not None:
            self.calls[collective.kind] += 1
            self.bytes[collective.kind] += collective.bytes
        return func(*args, **(kwargs or {}))


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
