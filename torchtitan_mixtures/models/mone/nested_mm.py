"""Matrix products of nested layers, each as a single operator that does no needless work.

Tokens are sorted, those of the largest expert first. A layer is a few plain products on slices of
rows and columns: no copies, no masks, no shapes that depend on data. There are two ways to cut it,
which do the same multiply-adds:

- By expert, for what tokens get: an expert's tokens are neighbours, and have its first columns.
- By block of columns, for what weights get: tokens that use a block are the first so many rows.

Either way a number is written once; a sum over blocks of what tokens get, or over experts of what
weights get, would be rounded at each step. Who has no tokens has no product, and neighbouring
blocks with the same rows are one, so that with all tokens at the largest expert a layer is the
single product of a dense one.

In what follows `rows[j]` is the number of tokens of expert j or a larger one, `widths[j]` the
channels of expert j, and block j the columns from `widths[j - 1]` to `widths[j]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchtitan_mixtures.models.mone import triton_kernels


def merge_blocks(rows: Sequence[int], widths: Sequence[int]) -> list[tuple[int, slice]]:
    """Join blocks of columns that the same tokens use, and leave out those that none does.

    Returns:
        Tokens and columns of each block that is left, from the left.
    """
    blocks: list[tuple[int, slice]] = []
    start = 0
    for count, stop in zip(rows, widths, strict=True):
        if blocks and blocks[-1][0] == count:
            start = blocks.pop()[1].start
        if count:
            blocks.append((count, slice(start, stop)))
        start = stop
    return blocks


def _flat_blocks(
    rows: Sequence[int], widths: Sequence[int], batch: int
) -> list[tuple[slice, slice]]:
    """Rows and columns of each block, where the first two dimensions are one."""
    blocks = merge_blocks(rows, widths)
    return [(slice(0, count * batch), columns) for count, columns in blocks]


def _flat_experts(
    rows: Sequence[int], widths: Sequence[int], batch: int, seq: int
) -> list[tuple[slice, int]]:
    """Rows and width of each expert that has tokens, where the first two dimensions are one.

    Tokens of no expert, if there are any, are the last, with width 0.
    """
    experts = zip((*rows, 0), (seq, *rows), (0, *widths), strict=True)
    return [
        (slice(start * batch, stop * batch), width)
        for start, stop, width in experts
        if start < stop
    ]


@torch.library.custom_op("torchtitan_mixtures::nested_expand", mutates_args=())
def nested_expand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Sequence[int],
    widths: Sequence[int],
    uses_triton: bool = False,
) -> Tensor:
    """A linear layer of whose input each token has the channels of its expert.

    Args:
        x: Sorted tokens, `(seq, batch, in)`; channels beyond a token's are not read.
        weight: `(out, in)`.
        bias: `(out,)`.
        rows: Tokens of each expert or a larger one.
        widths: Channels of each expert, the last one's are `in`.
        uses_triton: Whether kernels of `triton_kernels.py` compute it.

    Returns:
        `(seq, batch, out)`.
    """
    if uses_triton:
        return triton_kernels.nested_expand_triton(x, weight, bias, rows, widths)
    seq, batch, dim = x.shape
    flat = x.reshape(-1, dim)
    product = x.new_empty(seq * batch, weight.shape[0])
    for span, width in _flat_experts(rows, widths, batch, seq):
        torch.addmm(bias, flat[span, :width], weight[:, :width].t(), out=product[span])
    return product.view(seq, batch, weight.shape[0])


@nested_expand.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Any,
    widths: Any,
    uses_triton: bool = False,
) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


@torch.library.custom_op("torchtitan_mixtures::nested_expand_grads", mutates_args=())
def nested_expand_grads(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Sequence[int],
    widths: Sequence[int],
    uses_triton: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `nested_expand`.

    Args:
        grad: Of the output, `(seq, batch, out)`.
        x: As there.
        weight: As there.
        rows: As there.
        widths: As there.
        uses_triton: As there.

    Returns:
        Gradients of `x`, `weight` and `bias`; zero where they were not read.
    """
    if uses_triton:
        return triton_kernels.expand_grads(grad, x, weight, rows, widths)
    seq, batch, dim = x.shape
    flat, flat_grad = x.reshape(-1, dim), grad.reshape(-1, grad.shape[2])
    grad_x, grad_weight = flat.new_empty(flat.shape), weight.new_empty(weight.shape)
    for span, width in _flat_experts(rows, widths, batch, seq):
        torch.mm(flat_grad[span], weight[:, :width], out=grad_x[span, :width])
        grad_x[span, width:].zero_()
    start = 0
    for span, columns in _flat_blocks(rows, widths, batch):
        torch.mm(flat_grad[span].t(), flat[span, columns], out=grad_weight[:, columns])
        start = columns.stop
    grad_weight[:, start:].zero_()
    return grad_x.view(x.shape), grad_weight, flat_grad.sum(0)


@nested_expand_grads.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Any,
    widths: Any,
    uses_triton: bool = False,
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), grad.new_empty(grad.shape[2])


@torch.library.custom_op("torchtitan_mixtures::nested_contract", mutates_args=())
def nested_contract(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Sequence[int],
    widths: Sequence[int],
    uses_triton: bool = False,
) -> Tensor:
    """A linear layer of whose output each token gets the channels of its expert, and zeros.

    Args:
        x: Sorted tokens, `(seq, batch, in)`.
        weight: `(out, in)`.
        bias: `(out,)`.
        rows: Tokens of each expert or a larger one.
        widths: Channels of each expert, the last one's are `out`.
        uses_triton: Whether kernels of `triton_kernels.py` compute it.

    Returns:
        `(seq, batch, out)`.
    """
    if uses_triton:
        return triton_kernels.nested_contract_triton(x, weight, bias, rows, widths)
    seq, batch, dim = x.shape
    flat = x.reshape(-1, dim)
    product = x.new_empty(seq * batch, weight.shape[0])
    for span, width in _flat_experts(rows, widths, batch, seq):
        torch.addmm(bias[:width], flat[span], weight[:width].t(), out=product[span, :width])
        product[span, width:].zero_()
    return product.view(seq, batch, weight.shape[0])


@nested_contract.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Any,
    widths: Any,
    uses_triton: bool = False,
) -> Tensor:
    return x.new_empty(*x.shape[:2], weight.shape[0])


@torch.library.custom_op("torchtitan_mixtures::nested_contract_grads", mutates_args=())
def nested_contract_grads(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Sequence[int],
    widths: Sequence[int],
    uses_triton: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `nested_contract`.

    Args:
        grad: Of the output, `(seq, batch, out)`; channels beyond a token's are not read.
        x: As there.
        weight: As there.
        rows: As there.
        widths: As there.
        uses_triton: As there.

    Returns:
        Gradients of `x`, `weight` and `bias`.
    """
    if uses_triton:
        return triton_kernels.contract_grads(grad, x, weight, rows, widths)
    seq, batch, dim = x.shape
    flat, flat_grad = x.reshape(-1, dim), grad.reshape(-1, grad.shape[2])
    grad_x, grad_weight = flat.new_empty(flat.shape), weight.new_empty(weight.shape)
    grad_bias = weight.new_zeros(weight.shape[0])
    for span, width in _flat_experts(rows, widths, batch, seq):
        torch.mm(flat_grad[span, :width], weight[:width], out=grad_x[span])
    start = 0
    for span, columns in _flat_blocks(rows, widths, batch):
        of_block = flat_grad[span, columns]
        torch.mm(of_block.t(), flat[span], out=grad_weight[columns])
        grad_bias[columns] = of_block.sum(0)
        start = columns.stop
    grad_weight[start:].zero_()
    return grad_x.view(x.shape), grad_weight, grad_bias


@nested_contract_grads.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Any,
    widths: Any,
    uses_triton: bool = False,
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), grad.new_empty(grad.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.settings = inputs
    ctx.save_for_backward(x, weight)


def _expand_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*nested_expand_grads(grad, *ctx.saved_tensors, *ctx.settings), None, None, None)


def _contract_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*nested_contract_grads(grad, *ctx.saved_tensors, *ctx.settings), None, None, None)


nested_expand.register_autograd(_expand_backward, setup_context=_setup_context)
nested_contract.register_autograd(_contract_backward, setup_context=_setup_context)
for _device_type in ("cpu", "cuda"):
    nested_expand.register_autocast(_device_type, torch.bfloat16)
    nested_contract.register_autocast(_device_type, torch.bfloat16)


def _area(rows: Sequence[int], widths: Sequence[int]) -> int:
    """Tokens times channels that are used."""
    return sum(
        count * (columns.stop - columns.start) for count, columns in merge_blocks(rows, widths)
    )


@register_flop_formula(torch.ops.torchtitan_mixtures.nested_expand, get_raw=True)
def _expand_flops(
    x: Tensor, weight: Tensor, bias: Tensor, rows: Any, widths: Any, *unused: Any, **named: Any
) -> int:
    return 2 * x.shape[1] * _area(rows, widths) * weight.shape[0]


@register_flop_formula(torch.ops.torchtitan_mixtures.nested_contract, get_raw=True)
def _contract_flops(
    x: Tensor, weight: Tensor, bias: Tensor, rows: Any, widths: Any, *unused: Any, **named: Any
) -> int:
    return 2 * x.shape[1] * _area(rows, widths) * weight.shape[1]


@register_flop_formula(torch.ops.torchtitan_mixtures.nested_expand_grads, get_raw=True)
def _expand_grad_flops(
    grad: Tensor, x: Tensor, weight: Tensor, rows: Any, widths: Any, *unused: Any, **named: Any
) -> int:
    return 4 * x.shape[1] * _area(rows, widths) * weight.shape[0]


@register_flop_formula(torch.ops.torchtitan_mixtures.nested_contract_grads, get_raw=True)
def _contract_grad_flops(
    grad: Tensor, x: Tensor, weight: Tensor, rows: Any, widths: Any, *unused: Any, **named: Any
) -> int:
    return 4 * x.shape[1] * _area(rows, widths) * weight.shape[1]
