"""What one program of the kernels of nested layers does: a tile of a product.

Seen as `(tokens, channels)`, what nested layers use is a staircase: token `t` has the channels
below `_width_of(t)`, and channel `c` the tokens below `_span_of(c)`; both fall. `spans[j]` is the
number of tokens, of all samples, of expert j or a larger one, `widths[j]` the channels of expert j.

Only `triton_kernels` imports this module, and not before a kernel is used: Triton is not to be had
on every machine. Only built-in operations are used (no `tl.zeros`, `tl.cdiv`, ...), so that the
interpreter can be chosen when this module is imported, and not only when Triton is.
"""

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

# A kernel must not be compiled again for other numbers of tokens. A tuple of them would be: there
# this option has no effect (Triton 3.7).
_NUMBERS_OF_TOKENS = ["num_tokens", *(f"span{expert}" for expert in range(8))]


@triton.jit
def _width_of(token, spans, widths):
    """Channels of a token, or of each of many."""
    width = token * 0
    for expert in tl.static_range(len(widths)):
        width = tl.maximum(width, tl.where(token < spans[expert], widths[expert], 0))
    return width


@triton.jit
def _span_of(channel, spans, widths):
    """Tokens that have a channel, or each of many."""
    span = channel * 0
    for expert in tl.static_range(len(widths)):
        span = tl.maximum(span, tl.where(channel < widths[expert], spans[expert], 0))
    return span


@triton.jit(do_not_specialize=_NUMBERS_OF_TOKENS)
def linear_kernel(
    x,
    weight,
    bias,
    out,
    num_tokens,
    span0,
    span1,
    span2,
    span3,
    span4,
    span5,
    span6,
    span7,
    num_inner,
    num_columns,
    x_stride,
    weight_out_stride,
    weight_in_stride,
    WIDTHS: tl.constexpr,
    IS_EXPAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Compute a tile of `x @ weight.T + bias`, of which `x` (expand) or the result is nested.

    `x` is `(num_tokens, num_inner)`, its columns neighbours; `out` is `(num_tokens, num_columns)`
    and contiguous; `bias` may be None.
    """
    spans = (span0, span1, span2, span3, span4, span5, span6, span7)
    tiles_per_row = (num_columns + COLUMNS - 1) // COLUMNS
    first_token = tl.program_id(0) // tiles_per_row * ROWS
    first_column = tl.program_id(0) % tiles_per_row * COLUMNS
    token = first_token + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    is_column = column < num_columns

    # How far to read each token, and the tile's first, that has the most channels.
    width = _width_of(token, spans, WIDTHS)
    reach, limit = width, _width_of(first_token, spans, WIDTHS)
    if not IS_EXPAND:
        reach = tl.where(first_column < width, num_inner, 0)
        limit = tl.where(first_column < limit, num_inner, 0)

    row = token.to(tl.int64)[:, None]  # times a stride may be too much for 32 bits
    product = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for start in range(0, limit, INNER):
        inner = start + tl.arange(0, INNER)
        x_tile = tl.load(
            x + row * x_stride + inner[None, :], mask=inner[None, :] < reach[:, None], other=0.0
        )
        weight_tile = tl.load(
            weight + inner[:, None] * weight_in_stride + column[None, :] * weight_out_stride,
            mask=(inner < limit)[:, None] & is_column[None, :],
            other=0.0,
        )
        product = tl.dot(x_tile, weight_tile, product, input_precision=PRECISION)

    if bias is not None:
        product += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if not IS_EXPAND:
        product = tl.where(column[None, :] < width[:, None], product, 0.0)
    tl.store(
        out + row * num_columns + column[None, :],
        product.to(out.dtype.element_ty),
        mask=(token < num_tokens)[:, None] & is_column[None, :],
    )


@triton.jit(do_not_specialize=_NUMBERS_OF_TOKENS[1:])
def weight_grad_kernel(
    nested,
    other,
    out,
    span0,
    span1,
    span2,
    span3,
    span4,
    span5,
    span6,
    span7,
    num_nested,
    num_other,
    nested_stride,
    other_stride,
    out_nested_stride,
    out_other_stride,
    WIDTHS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Compute a tile of `nested.T @ other`, each nested channel over the tokens that have it.

    `nested` is `(tokens, num_nested)` and `other` `(tokens, num_other)`, their columns neighbours;
    `out` is `(num_nested, num_other)` with any strides.
    """
    spans = (span0, span1, span2, span3, span4, span5, span6, span7)
    tiles_per_row = (num_other + ROWS - 1) // ROWS
    first_channel = tl.program_id(0) // tiles_per_row * COLUMNS
    channel = first_channel + tl.arange(0, COLUMNS)
    column = tl.program_id(0) % tiles_per_row * ROWS + tl.arange(0, ROWS)
    span = _span_of(channel, spans, WIDTHS)
    limit = _span_of(first_channel, spans, WIDTHS)

    product = tl.full((COLUMNS, ROWS), 0.0, tl.float32)
    for start in range(0, limit, INNER):
        token = start + tl.arange(0, INNER)
        row = token.to(tl.int64)
        nested_tile = tl.load(
            nested + channel[:, None] + row[None, :] * nested_stride,
            mask=token[None, :] < span[:, None],
            other=0.0,
        )
        other_tile = tl.load(
            other + row[:, None] * other_stride + column[None, :],
            mask=(token < limit)[:, None] & (column < num_other)[None, :],
            other=0.0,
        )
        product = tl.dot(nested_tile, other_tile, product, input_precision=PRECISION)
    tl.store(
        out + channel[:, None] * out_nested_stride + column[None, :] * out_other_stride,
        product.to(out.dtype.element_ty),
        mask=(channel < num_nested)[:, None] & (column < num_other)[None, :],
    )


IS_INTERPRETED = isinstance(linear_kernel, InterpretedFunction)
"""Whether the kernels run in Triton's interpreter, which takes tensors on a CPU."""
