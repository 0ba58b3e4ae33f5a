"""Kernels for the matrix products of nested layers: one launch each, for all experts.

They compute what `nested_mm` does with one product per block of columns. Tokens are sorted, those
of the largest expert first, so that what is used of `(tokens, channels)` is a staircase. A tile of
a product makes no step that is wholly outside it (widths below a tile's pay for a whole one):

    - expand: its loop over channels ends at the width of its first token, which has the most; the
      channels that other tokens of the tile do not have count as zeros.
    - contract: if its first token does not have its first channel, zeros are written without a
      loop; else outputs are set to zero where a token does not have the channel.
    - gradient of the input: of either, the other one with the weight transposed and without bias.
    - gradient of the weight: its loop over tokens ends at the last that has its first channel.

Gradients of biases are plain sums, which PyTorch computes.

The numbers of tokens are ordinary arguments: a kernel is compiled once for all capacities. Widths
are constants, of at most 8 experts. Sums are in float32; products of float32 numbers are exact or
in TF32 as `torch.set_float32_matmul_precision` says. Sizes may be any; rows that are a multiple of
16 bytes are read faster.

State: run on a CPU only, by Triton's interpreter; compiled, but never run, for GPUs. There the
sizes of tiles are a guess, and nothing has been measured. One thing to look at first: gradients of
small weights have few tiles, each with a long loop over tokens, which is not split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

_MAX_EXPERTS = 8


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: each program computes `rows x columns`, by steps of `inner`.

    The gradient of a weight has `columns` of the nested side and `rows` of the other.

    Raises:
        ValueError: A size is not a power of 2 of at least 16, below which tensor cores have none.
    """

    rows: int = 128
    columns: int = 64
    inner: int = 32

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} = {size}: must be a power of 2, 16 or more.")


DEFAULT_TILES = Tiles()


def _programs(device: torch.device) -> ModuleType:
    """Import what runs on the device, which takes Triton."""
    try:
        from torchtitan_mixtures.models.mone import triton_programs
    except ImportError as error:
        raise ValueError(
            'nested.kernels = "triton": the package triton is missing; install it (it exists for '
            'Linux only), or set "plain".'
        ) from error
    if device.type == "cpu" and not triton_programs.IS_INTERPRETED:
        raise ValueError(
            'nested.kernels = "triton": tensors are on the CPU; use a GPU, or set "plain".'
        )
    return triton_programs


def _ceil_div(size: int, tile: int) -> int:
    return -(-size // tile)


def _flatten(x: Tensor) -> Tensor:
    """View `(seq, batch, channels)` as `(tokens, channels)`; a copy if channels have a stride."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _spans(rows: Sequence[int], batch: int) -> list[int]:
    """Tokens of each expert or a larger one in all samples, for as many as a kernel knows."""
    if len(rows) > _MAX_EXPERTS:
        raise ValueError(
            f'num_experts = {len(rows)}: nested.kernels = "triton" has at most {_MAX_EXPERTS}, '
            'set "plain".'
        )
    return [count * batch for count in rows] + [0] * (_MAX_EXPERTS - len(rows))


def _check(*tensors: Tensor) -> None:
    """Raise for tensors that the kernels cannot read."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(
            f'nested.kernels = "triton": tensors are {", ".join(sorted(map(str, dtypes)))}, but '
            'must all be float32, bfloat16 or float16; set "plain" for others.'
        )


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Sequence[int],
    widths: Sequence[int],
    tiles: Tiles,
    *,
    is_expand: bool,
) -> Tensor:
    """Launch a product of `(seq, batch, in)` and `(out, in)`, of which `in` or `out` is nested."""
    _check(x, weight, *([] if bias is None else [bias]))
    flat, spans = _flatten(x), _spans(rows, x.shape[1])
    num_tokens, num_columns = flat.shape[0], weight.shape[0]
    out = flat.new_empty(num_tokens, num_columns)
    grid = (_ceil_div(num_tokens, tiles.rows) * _ceil_div(num_columns, tiles.columns),)
    _programs(x.device).linear_kernel[grid](
        flat,
        weight,
        bias,
        out,
        num_tokens,
        *spans,
        flat.shape[1],
        num_columns,
        flat.stride(0),
        weight.stride(0),
        weight.stride(1),
        WIDTHS=tuple(widths),
        IS_EXPAND=is_expand,
        PRECISION=_precision(),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        INNER=tiles.inner,
    )
    return out.view(*x.shape[:2], num_columns)


def _weight_grad(
    nested: Tensor,
    other: Tensor,
    out: Tensor,
    rows: Sequence[int],
    widths: Sequence[int],
    tiles: Tiles,
) -> None:
    """Launch the product of two `(seq, batch, channels)` to a `(nested, other)` view."""
    _check(nested, other, out)
    flat_nested, flat_other = _flatten(nested), _flatten(other)
    num_nested, num_other = out.shape
    grid = (_ceil_div(num_nested, tiles.columns) * _ceil_div(num_other, tiles.rows),)
    _programs(out.device).weight_grad_kernel[grid](
        flat_nested,
        flat_other,
        out,
        *_spans(rows, nested.shape[1]),
        num_nested,
        num_other,
        flat_nested.stride(0),
        flat_other.stride(0),
        out.stride(0),
        out.stride(1),
        WIDTHS=tuple(widths),
        PRECISION=_precision(),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        INNER=tiles.inner,
    )


def nested_expand_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Sequence[int],
    widths: Sequence[int],
    tiles: Tiles = DEFAULT_TILES,
) -> Tensor:
    """A linear layer of whose input each token has the channels of its expert.

    Args:
        x: Sorted tokens, `(seq, batch, in)`; channels beyond a token's are not used.
        weight: `(out, in)`.
        bias: `(out,)`.
        rows: Tokens of each expert or a larger one.
        widths: Channels of each expert, the last one's are `in`.
        tiles: How the product is cut.

    Returns:
        `(seq, batch, out)`.
    """
    return _linear(x, weight, bias, rows, widths, tiles, is_expand=True)


def nested_contract_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Sequence[int],
    widths: Sequence[int],
    tiles: Tiles = DEFAULT_TILES,
) -> Tensor:
    """A linear layer of whose output each token gets the channels of its expert, and zeros.

    Args:
        x: Sorted tokens, `(seq, batch, in)`.
        weight: `(out, in)`.
        bias: `(out,)`.
        rows: Tokens of each expert or a larger one.
        widths: Channels of each expert, the last one's are `out`.
        tiles: How the product is cut.

    Returns:
        `(seq, batch, out)`.
    """
    return _linear(x, weight, bias, rows, widths, tiles, is_expand=False)


def expand_grads(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Sequence[int],
    widths: Sequence[int],
    tiles: Tiles = DEFAULT_TILES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, `weight` and `bias` of `nested_expand_triton`.

    Args:
        grad: Of the output, `(seq, batch, out)`.
        x: As there.
        weight: As there.
        rows: As there.
        widths: As there.
        tiles: As there.
    """
    grad_x = _linear(grad, weight.t(), None, rows, widths, tiles, is_expand=False)
    grad_weight = weight.new_empty(weight.shape)
    _weight_grad(x, grad, grad_weight.t(), rows, widths, tiles)
    return grad_x, grad_weight, grad.sum((0, 1))


def contract_grads(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: Sequence[int],
    widths: Sequence[int],
    tiles: Tiles = DEFAULT_TILES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x`, `weight` and `bias` of `nested_contract_triton`.

    Args:
        grad: Of the output, `(seq, batch, out)`; channels beyond a token's are not used.
        x: As there.
        weight: As there.
        rows: As there.
        widths: As there.
        tiles: As there.
    """
    grad_x = _linear(grad, weight.t(), None, rows, widths, tiles, is_expand=True)
    grad_weight = weight.new_empty(weight.shape)
    _weight_grad(grad, x, grad_weight, rows, widths, tiles)
    grad_bias = weight.new_empty(weight.shape[0])
    for count, start, stop in zip(rows, [0, *widths], widths, strict=False):
        grad_bias[start:stop] = grad[:count, :, start:stop].sum((0, 1))
    return grad_x, grad_weight, grad_bias
