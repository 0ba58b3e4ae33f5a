"""Counts what the operators of a step allocate, compute, move and send, without running them.

Under PyTorch's fake tensors operators have shapes and no values, so a step of any model runs on any
machine. What is counted is what those operators say: every storage that lives, by the tensors that
keep it; FLOPs by PyTorch's own formulas; bytes by the tensors that go in and out.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from torchtitan_mixtures.planning.collectives import Group, collective_of

aten = torch.ops.aten

FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # PyTorch has formulas for the kernels of GPUs only; these are the same products.
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
"""FLOPs of matrix products, convolutions and attention; two for each multiply-add. Attention is
counted without regard to causality, as TorchTitan does."""


class StepMeter(TorchDispatchMode):
    """Watches operators; the innermost mode, so that it sees plain tensors only.

    Attributes:
        live: Bytes of all storages that live.
        peak: Most of these since `restart`.
        flops: FLOPs since `restart`.
        product_bytes: Bytes in and out of operators that have FLOPs, since `restart`.
        other_bytes: Bytes in and out of all others that are not views, since `restart`.
        sent: Bytes that this rank sends or receives, by process group, since `restart`.
        calls: Number of collectives by process group and kind, since `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_paused = False
        self.live = 0
        self._sizes: dict[int, int] = {}  # by id of the storage
        self._watched: dict[int, weakref.ref] = {}
        self.restart()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let blocks be compiled beneath this mode; it then sees the operators of the graphs."""
        return True

    def restart(self) -> None:
        """Begin to count anew; what lives goes on living."""
        self.peak = self.live
        self.flops = 0
        self.product_bytes = 0
        self.other_bytes = 0
        self.sent: dict[Group, int] = defaultdict(int)
        self.calls: Counter[tuple[Group, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator and count it."""
        if DTensor in types:
            return NotImplemented  # comes back as operators on plain tensors
        kwargs = kwargs or {}
        # Tracers run what they trace; nothing of it is part of a step.
        if self._is_paused or TracingContext.try_get() is not None:
            return func(*args, **kwargs)
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # as in real runs; among fake tensors it would be a copy
        output = func(*args, **kwargs)
        outputs = _tensors(output)
        for tensor in outputs:
            self.watch(tensor)
        self._count(func, args, kwargs, output, outputs)
        return output

    def watch(self, tensor: Tensor) -> None:
        """Count the storage of a tensor for as long as it lives."""
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._watched.get(key)
        if known is None or known() is not storage:
            self._watched[key] = weakref.ref(storage, lambda _: self._forget(key))
            self._sizes[key] = 0
        self._resized(storage)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._sizes:
            self.live += size - self._sizes[key]
            self._sizes[key] = size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
        self._watched.pop(key, None)

    def _count(
        self, func: Any, args: tuple, kwargs: Mapping[str, Any], output: Any, outputs: list[Tensor]
    ) -> None:
        collective = collective_of(func, args)
        if collective is not None:
            self.sent[collective.group] += collective.bytes
            self.calls[collective.group, collective.kind] += 1
            return
        formula = FLOP_FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=output))
            self.product_bytes += _num_bytes(_tensors((args, kwargs))) + _num_bytes(outputs)
        elif not func.is_view and outputs and func._schema.name not in _NO_TRAFFIC:
            self.other_bytes += _num_bytes(_tensors((args, kwargs))) + _num_bytes(outputs)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        was_paused, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = was_paused

    @contextmanager
    def watching(self) -> Iterator[StepMeter]:
        """Enter the mode, and see storages that are resized in place too (FSDP frees by that).

        DTensor works out shapes by running operators on whole tensors; those do not count.
        """
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._resized(storage)
            return result

        propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def propagated(*arguments: Any) -> Any:
            with self._paused():
                return propagate(*arguments)

        torch.UntypedStorage.resize_ = resized  # pyrefly: ignore [bad-assignment]
        ShardingPropagator._propagate_tensor_meta_non_cached = propagated  # pyrefly: ignore [bad-assignment]
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = resize
            ShardingPropagator._propagate_tensor_meta_non_cached = propagate


_NO_TRAFFIC = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
)
"""Operators that allocate, and neither read nor write."""


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
