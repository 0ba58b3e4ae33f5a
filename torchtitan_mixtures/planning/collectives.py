"""What a collective moves: the one table of it, for plans and for measurements alike."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

SILENT = ("wait_tensor", "_wrap_tensor_autograd", "recv_", "barrier")
"""Operators of the same namespaces that move nothing; a receive is counted where it is sent."""


_REDUCTIONS = ("sum", "avg", "max", "min", "product")


class UnknownCollectiveError(Exception):
    """A collective whose bytes nobody has said how to count: a hole in this table."""


class Group(NamedTuple):
    """Ranks that communicate, and how: see `Collective.group`."""

    name: str
    is_functional: bool


class Collective(NamedTuple):
    """One call.

    Attributes:
        kind: What it is called, such as "all-gather".
        group: Name of its process group, and whether DTensor or context parallelism ask for it:
            FSDP's ranks may be the same as those of another dimension.
        bytes: Those received of an all-gather, sent of all else; of an all-reduce, those of a ring.
    """

    kind: str
    group: Group
    bytes: int


def collective_of(func: Any, args: tuple) -> Collective | None:
    """Say what an operator sends; None: it is no collective.

    DTensor and context parallelism communicate by `_c10d_functional`, FSDP, DDP and pipelines by
    `c10d`.

    Args:
        func: The operator.
        args: Its positional arguments.

    Raises:
        UnknownCollectiveError: It sends, but is not in the table.
    """
    if func.namespace not in ("c10d", "_c10d_functional"):
        return None
    name = func.__name__.split(".")[0]
    if name in SILENT:
        return None
    group = _group_of(args)
    kind, moved = moved_bytes(name, args, group.size())
    is_functional = func.namespace == "_c10d_functional"
    return Collective(kind, Group(group.group_name, is_functional), moved)


def moved_bytes(name: str, args: tuple, ranks: int) -> tuple[str, int]:
    """Say what kind of collective an operator is, and what each of `ranks` moves by it."""
    # `c10d` takes the output first where there are two tensors, `_c10d_functional` the input.
    first, second = (_num_bytes(arg) for arg in args[:2])
    share = (ranks - 1) / ranks
    known = {
        "all_gather_into_tensor": ("all-gather", first * (ranks - 1)),
        "_allgather_base_": ("all-gather", second * (ranks - 1)),
        "reduce_scatter_tensor": ("reduce-scatter", first * share),
        "_reduce_scatter_base_": ("reduce-scatter", second * share),
        "all_reduce": ("all-reduce", first * 2 * share),
        "allreduce_": ("all-reduce", first * 2 * share),
        "all_to_all_single": ("all-to-all", first * share),
        "alltoall_base_": ("all-to-all", second * share),
        "broadcast_": ("broadcast", first),
        "send": ("send", first),
    }
    if name not in known:
        raise UnknownCollectiveError(f"{name} is not in the table of planning/collectives.py")
    kind, moved = known[name]
    return kind, round(moved)


def _group_of(args: tuple) -> dist.ProcessGroup:
    """Find the process group among an operator's arguments, by name or boxed."""
    for arg in args:
        if isinstance(arg, str) and arg not in _REDUCTIONS:
            return _resolve_process_group(cast(dist.distributed_c10d.GroupName, arg))
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg)
    raise UnknownCollectiveError("no process group among the arguments")


def _num_bytes(tensors: Any) -> int:
    """Size of a tensor or of a list of them; 0 for anything else."""
    if isinstance(tensors, list | tuple):
        return sum(map(_num_bytes, tensors))
    return tensors.nbytes if isinstance(tensors, Tensor) else 0
