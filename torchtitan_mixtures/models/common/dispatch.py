"""Which rows of a batch go to which tower, worked out once per forward pass.

A tower is one copy of a set of layers; every token belongs to exactly one. The tokens of a batch
are sorted by tower, so that each tower runs on one contiguous slice of rows. Residual streams stay
in this order from the first block to the last; only attention looks at the original order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from torchtitan_mixtures.models.common.grouped_mm import grouped_mm


class _Sort(torch.autograd.Function):
    """`x[source]`, whose backward gathers too: padding rows pass no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(target)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (target,) = ctx.saved_tensors
        return grads[0].index_select(0, target), None, None


class _Unsort(torch.autograd.Function):
    """`x[target]`, whose backward gathers too and gives padding rows a gradient of zero."""

    @staticmethod
    def forward(ctx, x: Tensor, target: Tensor, source: Tensor, padding: Tensor) -> Tensor:
        ctx.save_for_backward(source, padding)
        return x.index_select(0, target)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        source, padding = ctx.saved_tensors
        grad = grads[0].index_select(0, source).index_fill_(0, padding, 0)
        return grad, None, None, None


@dataclass(frozen=True, eq=False)
class SortedPlan:
    """Tokens sorted by tower, each tower's slice padded to a multiple of some rows.

    `rows` depends on the shape of the batch only, never on its content: the total is
    `batch * seq` rounded up plus one multiple for all towers but one, and the last tower takes what
    is left. So the shape of the stream is static and can be cut evenly for sequence parallelism,
    and no slice has 0 or 1 rows, which torch.compile would specialise on. Padding rows repeat some
    token, are dropped by `unsort` and receive no gradient.
    """

    batch: int
    seq: int
    sizes: tuple[int, ...]
    """Rows of each tower, padding included."""
    source: Tensor
    """Flattened token position of each row, `(rows,)`, int64."""
    target: Tensor
    """Row of each flattened token position, `(batch * seq,)`, int64."""
    padding: Tensor
    """The rows that are padding, `(rows - batch * seq,)`, int64."""
    ends: Tensor
    """First row after each tower's slice, `(towers,)`, int32."""
    is_grouped: bool = False
    """Whether linear layers run as one grouped GEMM instead of one GEMM per tower."""

    def sort_ids(self, ids: Tensor) -> Tensor:
        """`(batch, seq)` integers -> `(rows,)`."""
        return ids.flatten().index_select(0, self.source)

    def sort(self, x: Tensor) -> Tensor:
        """`(batch, seq, dim)` -> `(rows, dim)`."""
        return _Sort.apply(x.flatten(0, 1), self.source, self.target)

    def unsort(self, x: Tensor) -> Tensor:
        """`(rows, dim)` -> `(batch, seq, dim)`."""
        x = _Unsort.apply(x, self.target, self.source, self.padding)
        return x.unflatten(0, (self.batch, self.seq))

    def split(self, x: Tensor) -> list[Tensor]:
        """`(rows, ...)` -> one `(rows of the tower, ...)` view per tower."""
        return list(x.split(self.sizes))

    def merge(self, slices: Sequence[Tensor]) -> Tensor:
        """Undo `split`."""
        return torch.cat(list(slices))


@dataclass(frozen=True, eq=False)
class MaskPlan:
    """The textbook form of the same thing: rows in original order, one boolean mask per tower.

    For tests. Every gather waits for the device and shapes depend on content.
    """

    batch: int
    seq: int
    masks: list[Tensor]
    """One `(batch * seq,)` bool mask per tower."""
    is_grouped: bool = False

    def sort_ids(self, ids: Tensor) -> Tensor:
        """`(batch, seq)` integers -> `(rows,)`."""
        return ids.flatten()

    def sort(self, x: Tensor) -> Tensor:
        """`(batch, seq, dim)` -> `(rows, dim)`."""
        return x.flatten(0, 1)

    def unsort(self, x: Tensor) -> Tensor:
        """`(rows, dim)` -> `(batch, seq, dim)`."""
        return x.unflatten(0, (self.batch, self.seq))

    def split(self, x: Tensor) -> list[Tensor]:
        """`(rows, ...)` -> one `(rows of the tower, ...)` tensor per tower."""
        return [x[mask] for mask in self.masks]

    def merge(self, slices: Sequence[Tensor]) -> Tensor:
        """Undo `split`."""
        return merge_modalities(slices, self.masks)


Plan = SortedPlan | MaskPlan


def merge_modalities(expert_outputs: Sequence[Tensor], modality_masks: Sequence[Tensor]) -> Tensor:
    """Put the outputs of all modalities back into one sequence.

    Args:
        expert_outputs: Output of each modality, `(tokens of the modality, ...)`.
        modality_masks: Tokens of each modality, `(tokens,)` bool; exactly one is True per token.

    Returns:
        `(tokens, ...)`: row `i` is the next unused row of the modality that owns token `i`.
    """
    if len(expert_outputs) != len(modality_masks):
        raise ValueError(
            f"{len(expert_outputs)} outputs for {len(modality_masks)} masks; one mask each expected"
        )
    merged = expert_outputs[0].new_zeros(modality_masks[0].numel(), *expert_outputs[0].shape[1:])
    for output, mask in zip(expert_outputs, modality_masks, strict=True):
        merged = merged.index_put((mask,), output)
    return merged


def plan_by_sorting(
    towers: Tensor,
    num_towers: int,
    *,
    checks: Mapping[str, Tensor],
    row_multiple: int = 8,
    is_grouped: bool = False,
) -> SortedPlan:
    """Sort the tokens of a batch by tower.

    The size of each slice must be known on the host; this is the one place where it waits for the
    device, and what is to be checked about the batch is read in the same breath.

    Args:
        towers: Tower of each token, `(batch, seq)`, int64 in `[0, num_towers)`.
        num_towers: Number of towers, with tokens in this batch or without.
        checks: What must not be: message -> offending tokens, `(batch, seq)` bool.
        row_multiple: Each slice is a multiple of this many rows, and at least this many.
        is_grouped: Whether linear layers are to run as one grouped GEMM.

    Raises:
        ValueError: If any check marks a token.
    """
    batch, seq = towers.shape
    tokens = batch * seq
    rows = -(-tokens // row_multiple) * row_multiple + row_multiple * (num_towers - 1)
    counts = torch.stack([(towers == tower).sum() for tower in range(num_towers)])
    host_counts = _read_counts(counts, checks, tokens, seq)

    sizes = [max(1, -(-count // row_multiple)) * row_multiple for count in host_counts[:-1]]
    sizes.append(rows - sum(sizes))

    # The same on the device. Padding rows are extra tokens that are sorted along with the others.
    padded = (counts + row_multiple - 1).div(row_multiple, rounding_mode="floor").clamp(min=1)
    ends = (padded * row_multiple).cumsum(0)
    ends[-1] = rows
    padding_ends = ends - counts.cumsum(0)
    extra = torch.arange(rows - tokens, device=towers.device)
    extra_towers = torch.searchsorted(padding_ends, extra, right=True)
    order = torch.cat((towers.flatten(), extra_towers)).argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(rows, device=order.device))
    return SortedPlan(
        batch=batch,
        seq=seq,
        sizes=tuple(sizes),
        source=order.remainder(tokens),
        target=rank[:tokens],
        padding=rank[tokens:],
        ends=ends.to(torch.int32),
        is_grouped=is_grouped,
    )


def plan_by_masks(towers: Tensor, num_towers: int, *, checks: Mapping[str, Tensor]) -> MaskPlan:
    """The plan of the reference execution; arguments as for `plan_by_sorting`."""
    batch, seq = towers.shape
    counts = torch.stack([(towers == tower).sum() for tower in range(num_towers)])
    _read_counts(counts, checks, batch * seq, seq)
    return MaskPlan(batch, seq, [(towers == tower).flatten() for tower in range(num_towers)])


def check_tokens(checks: Mapping[str, Tensor], batch: int, seq: int) -> None:
    """Make the checks of a plan where none is needed; arguments as for `plan_by_sorting`."""
    if checks:
        device = next(iter(checks.values())).device
        _read_counts(torch.zeros(1, dtype=torch.int64, device=device), checks, batch * seq, seq)


def _read_counts(counts: Tensor, checks: Mapping[str, Tensor], tokens: int, seq: int) -> list[int]:
    """Read counts and checks to the host in one transfer; raise what the checks found."""
    num_towers = counts.numel()
    if isinstance(counts, FakeTensor) or counts.is_meta:
        # No values to read while a model is only being estimated: assume an even mix.
        return [tokens // num_towers] * num_towers
    found = [value for check in checks.values() for value in (check.sum(), check.int().argmax())]
    numbers = torch.cat((counts, torch.stack(found))).tolist() if found else counts.tolist()
    for index, message in enumerate(checks):
        number, first = numbers[num_towers + 2 * index : num_towers + 2 * index + 2]
        if number:
            raise ValueError(
                f"{number} of {tokens} tokens {message}; the first is position {first % seq} of "
                f"sequence {first // seq}"
            )
    return numbers[:num_towers]


class Towers(nn.ModuleDict):
    """One module per tower, in tower order. A single entry serves all towers alike.

    State dict: `{tower name}.<state of the module>`.
    """

    def split(self, x: Tensor, plan: Plan | None) -> list[Tensor]:
        """Cut rows into the slices that `forward` takes.

        Args:
            x: `(rows, dim)`, or `(batch, seq, dim)` when there is no plan.
            plan: The plan of this batch; None if no layer of the model is untied.
        """
        if plan is None or len(self) == 1:
            return [x]
        return plan.split(x)

    def forward(self, slices: Sequence[Tensor], plan: Plan | None) -> list[Tensor]:
        """Apply each tower's module to its slice.

        Args:
            slices: One `(rows of the tower, ...)` tensor per tower, or all rows as one.
            plan: The plan of this batch.

        Returns:
            As many slices as came in.
        """
        if plan is not None and len(slices) != len(self):
            split = plan.split(slices[0])
            return [plan.merge([module(x) for module, x in self._pairs(split)])]
        return [module(x) for module, x in self._pairs(slices)]

    def _pairs(self, slices: Sequence[Tensor]) -> list[tuple[Callable[..., Tensor], Tensor]]:
        return list(zip(self.values(), slices, strict=True))


class LinearTowers(Towers):
    """One `nn.Linear` without bias per tower, all of the same shape.

    State dict: `{tower name}.weight (out_features, in_features)`.

    Each tower is a plain call of a plain linear layer, so tensor parallelism, float8 and freezing
    apply by module path; under a grouped plan the weights are stacked for one grouped GEMM.
    """

    def __init__(self, names: Sequence[str], in_features: int, out_features: int) -> None:
        super().__init__({name: nn.Linear(in_features, out_features, bias=False) for name in names})

    @property
    def weights(self) -> list[Tensor]:
        """The weight of each tower."""
        return [cast(nn.Linear, linear).weight for linear in self.values()]

    def split(self, x: Tensor, plan: Plan | None) -> list[Tensor]:
        """As in `Towers`; a grouped GEMM takes all rows at once."""
        return [x] if plan is not None and plan.is_grouped else super().split(x, plan)

    def forward(self, slices: Sequence[Tensor], plan: Plan | None) -> list[Tensor]:
        """As in `Towers`."""
        if isinstance(plan, SortedPlan) and plan.is_grouped and len(self) > 1:
            # Under tensor parallelism the product is that of this rank's part of each weight.
            local = [w.to_local() if isinstance(w, DTensor) else w for w in self.weights]
            weights = torch.stack(local).transpose(1, 2)
            return [grouped_mm(slices[0], weights, plan.ends)]
        return super().forward(slices, plan)


class NormTowers(Towers):
    """One `nn.RMSNorm` per tower.

    State dict: `{tower name}.weight (dim,)`.
    """

    def __init__(self, names: Sequence[str], dim: int, eps: float) -> None:
        super().__init__({name: nn.RMSNorm(dim, eps=eps) for name in names})

    def reset_parameters(self) -> None:
        """Set all scales to one."""
        for norm in self.values():
            cast(nn.RMSNorm, norm).reset_parameters()


class RowNorm(nn.ModuleDict):
    """A norm of the residual stream: rows in, rows out, each normed by its tower.

    Not `NormTowers` because tensor parallelism norms a share of the rows, which has slices of its
    own.

    State dict: `{tower name}.weight (dim,)`.
    """

    def __init__(self, names: Sequence[str], dim: int, eps: float) -> None:
        super().__init__({name: nn.RMSNorm(dim, eps=eps) for name in names})

    def forward(self, x: Tensor, plan: Plan | None) -> Tensor:
        """Norm each row.

        Args:
            x: Residual stream, `(rows, dim)`; `(batch, seq, dim)` without a plan.
            plan: The plan of this batch.

        Returns:
            Same shape as `x`.
        """
        norms = list(self.values())
        if plan is None or len(norms) == 1:
            return norms[0](x)
        return plan.merge([norm(part) for norm, part in zip(norms, plan.split(x), strict=True)])

    def reset_parameters(self) -> None:
        """Set all scales to one."""
        for norm in self.values():
            cast(nn.RMSNorm, norm).reset_parameters()


def merge_slices(slices: Sequence[Tensor], plan: Plan | None) -> Tensor:
    """Slices of all towers -> `(rows, ...)`; the one place where towers come together."""
    return slices[0] if plan is None or len(slices) == 1 else plan.merge(slices)
