"""One matrix product per group of rows, as a single operator.

`torch.nn.functional.grouped_mm` (2.13) leaves five things to its caller, which are settled here
once: it compiles in bfloat16 only, counts as zero FLOPs, takes int32 ends only, rejects gradients
with a stride of zero, and knows neither float64 nor rows that are not a multiple of 16 bytes. Rows
after the last end would stay uninitialised: a caller who has some says so with `is_partial`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula


def is_aligned(width: int, dtype: torch.dtype) -> bool:
    """Say whether rows of so many elements are a multiple of 16 bytes; if not, a loop is used."""
    return width * dtype.itemsize % 16 == 0


def has_fast_grouped_mm(dtype: torch.dtype) -> bool:
    """Say whether the accelerator has a kernel for it; else PyTorch reads the ends and loops.

    As is known of PyTorch 2.10: for bfloat16 on NVIDIA devices of capability 9 or more. Not run
    here.
    """
    is_cuda = torch.cuda.is_available() and torch.version.hip is None
    return dtype == torch.bfloat16 and is_cuda and torch.cuda.get_device_capability() >= (9, 0)


def _is_supported(*widths: int, dtype: torch.dtype) -> bool:
    aligned = all(is_aligned(width, dtype) for width in widths)
    return aligned and dtype in (torch.float32, torch.bfloat16, torch.float16)


def _spans(ends: Tensor) -> list[slice]:
    stops = ends.tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


@torch.library.custom_op("torchtitan_mixtures::grouped_mm", mutates_args=())
def grouped_mm(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    is_partial: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply each group of rows by its own matrix.

    Args:
        x: `(rows, in)`; the rows of a group are neighbours.
        weight: One matrix per group, `(groups, in, out)`.
        ends: First row after each group, `(groups,)`, int32; the last one is `rows`.
        is_partial: Whether the last end may be less. Rows after it are not read, and are zero in
            the result and in the gradients.
        bias: What is added to blocks of rows, `(blocks, out)`: a block is so many neighbours that
            `blocks` of them are all rows; groups consist of whole ones.

    Returns:
        `(rows, out)`.
    """
    x = x.contiguous()
    if _is_supported(*weight.shape[1:], dtype=x.dtype):
        product = F.grouped_mm(x, weight, offs=ends)
    else:
        product = x.new_empty(x.shape[0], weight.shape[2])
        for group, span in enumerate(_spans(ends)):
            torch.mm(x[span], weight[group], out=product[span])
    if bias is not None:
        # Here and not outside, where it would cost another tensor of this size.
        product.unflatten(0, (len(bias), -1)).add_(bias[:, None])
    if is_partial:
        product.masked_fill_(_is_after(ends, x.shape[0])[:, None], 0)
    return product


def _is_after(ends: Tensor, rows: int, rows_per_block: int = 1) -> Tensor:
    """Whether a block is after the last end, `(rows / rows_per_block,)` bool."""
    return torch.arange(0, rows, rows_per_block, device=ends.device) >= ends[-1]


@grouped_mm.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    is_partial: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
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


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool, Tensor | None], output: Tensor
) -> None:
    x, weight, ends, ctx.is_partial, bias = inputs
    ctx.num_blocks = 0 if bias is None else len(bias)
    ctx.save_for_backward(x, weight, ends)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = None, None, None
    if ctx.needs_input_grad[0]:
        grad_x = grouped_mm(grad, weight.transpose(1, 2), ends, ctx.is_partial)
    if ctx.needs_input_grad[1]:
        grad_weight = grouped_mm_weight_grad(x, grad, ends)
    if ctx.num_blocks and ctx.needs_input_grad[4]:
        grad_bias = grad.unflatten(0, (ctx.num_blocks, -1)).sum(1)
        if ctx.is_partial:
            is_after = _is_after(ends, len(grad), len(grad) // ctx.num_blocks)
            grad_bias = grad_bias.masked_fill(is_after[:, None], 0)
    return grad_x, grad_weight, None, None, grad_bias


grouped_mm.register_autograd(_backward, setup_context=_setup_context)
for _device_type in ("cpu", "cuda"):
    grouped_mm.register_autocast(_device_type, torch.bfloat16)


def _rows_in_groups(rows: int, ends: Tensor) -> int:
    """Rows that are really multiplied; all of them where `ends` has no values."""
    if isinstance(ends, FakeTensor) or ends.device.type == "meta":
        return rows
    return int(ends[-1])


@register_flop_formula(torch.ops.torchtitan_mixtures.grouped_mm, get_raw=True)
def _grouped_mm_flops(x: Tensor, weight: Tensor, ends: Tensor, *unused: Any, **named: Any) -> int:
    return 2 * _rows_in_groups(x.shape[0], ends) * weight.shape[1] * weight.shape[2]


@register_flop_formula(torch.ops.torchtitan_mixtures.grouped_mm_weight_grad, get_raw=True)
def _weight_grad_flops(x: Tensor, grad: Tensor, ends: Tensor, *unused: Any, **named: Any) -> int:
    return 2 * _rows_in_groups(x.shape[0], ends) * x.shape[1] * grad.shape[1]
