"""One matrix product per group of rows, as a single operator.

`torch.nn.functional.grouped_mm` (2.13) leaves five things to its caller, which are settled here
once: it compiles in bfloat16 only, counts as zero FLOPs, takes int32 ends only, rejects gradients
with a stride of zero, and knows neither float64 nor rows that are not a multiple of 16 bytes. The
caller's part: the last end equals the number of rows (further rows would stay uninitialised).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def _is_supported(*widths: int, dtype: torch.dtype) -> bool:
    aligned = all(width * dtype.itemsize % 16 == 0 for width in widths)
    return aligned and dtype in (torch.float32, torch.bfloat16, torch.float16)


def _spans(ends: Tensor) -> list[slice]:
    stops = ends.tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


@torch.library.custom_op("torchtitan_mixtures::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group of rows by its own matrix.

    Args:
        x: `(rows, in)`; the rows of a group are neighbours.
        weight: One matrix per group, `(groups, in, out)`.
        ends: First row after each group, `(groups,)`, int32; the last one is `rows`.

    Returns:
        `(rows, out)`.
    """
    x = x.contiguous()
    if _is_supported(*weight.shape[1:], dtype=x.dtype):
        return F.grouped_mm(x, weight, offs=ends)
    return torch.cat([x[span] @ weight[group] for group, span in enumerate(_spans(ends))])


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("torchtitan_mixtures::grouped_mm_weight_grad", mutates_args=())
def grouped_mm_weight_grad(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """Sum of outer products over the rows of each group.

    Args:
        x: `(rows, in)`.
        grad: `(rows, out)`.
        ends: First row after each group, `(groups,)`, int32.

    Returns:
        `(groups, in, out)`.
    """
    x, grad = x.contiguous(), grad.contiguous()
    if _is_supported(x.shape[1], grad.shape[1], dtype=x.dtype):
        # Transposed twice, so that the result has the memory layout of the stacked weights.
        return F.grouped_mm(grad.t(), x, offs=ends).transpose(1, 2)
    return torch.stack([grad[span].t() @ x[span] for span in _spans(ends)]).transpose(1, 2)


@grouped_mm_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1]).transpose(1, 2)


def _setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    grad_x = grouped_mm(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    grad_weight = grouped_mm_weight_grad(x, grad, ends) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


grouped_mm.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.torchtitan_mixtures.grouped_mm)
def _grouped_mm_flops(x_shape, weight_shape, ends_shape, *, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.torchtitan_mixtures.grouped_mm_weight_grad)
def _weight_grad_flops(x_shape, grad_shape, ends_shape, *, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * x_shape[1] * grad_shape[1]
