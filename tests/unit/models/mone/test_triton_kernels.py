"""Kernels for nested layers: run by Triton's interpreter, and compiled for GPUs without one."""

import importlib
import sys
from itertools import pairwise

import pytest
import torch

from torchtitan_mixtures.models.mone import mone_args, triton_kernels
from torchtitan_mixtures.models.mone.capacity import Budget
from torchtitan_mixtures.models.mone.layers import (
    NestedLinear,
    NestedLinearContract,
    NestedLinearExpand,
)
from torchtitan_mixtures.models.mone.model import MoNE
from torchtitan_mixtures.models.mone.triton_kernels import (
    Tiles,
    contract_grads,
    expand_grads,
    nested_contract_triton,
    nested_expand_triton,
)

pytest.importorskip("triton")
PROGRAMS = "torchtitan_mixtures.models.mone.triton_programs"
SMALL = Tiles(16, 16, 16)
KINDS = {
    "expand": (nested_expand_triton, expand_grads),
    "contract": (nested_contract_triton, contract_grads),
}


def forget_programs():
    sys.modules.pop(PROGRAMS, None)
    vars(sys.modules[PROGRAMS.rpartition(".")[0]]).pop("triton_programs", None)


@pytest.fixture
def programs():
    """The kernels as they are compiled."""
    forget_programs()
    yield importlib.import_module(PROGRAMS)
    forget_programs()


@pytest.fixture
def steps(monkeypatch):
    """Let the interpreter run the kernels; a list that grows by one with each step of a tile."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    forget_programs()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    steps = []
    plain_dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *others):
        import triton.language as tl

        steps.append((*a.data.shape, b.data.shape[1]))
        if a.dtype.scalar == tl.bfloat16:  # whose bits the interpreter multiplies as integers
            a, b = (
                TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32)
                for x in (a, b)
            )
        return plain_dot(self, a, b, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    yield steps
    forget_programs()


def make_inputs(kind, seq, batch, nested, other, dtype=torch.float32):
    """`x`, `weight`, `bias` and the gradient of the output."""
    generator = torch.Generator().manual_seed(seq * nested + other)
    width_in, width_out = (nested, other) if kind == "expand" else (other, nested)
    shapes = [
        (seq, batch, width_in),
        (width_out, width_in),
        (width_out,),
        (seq, batch, width_out),
    ]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def make_widths(nested, experts):
    return [nested >> (experts - 1 - expert) for expert in range(experts)]


def naive(kind, x, weight, bias, rows, widths):
    """Token by token."""
    tokens = []
    for index, samples in enumerate(x):
        width = max([w for w, count in zip(widths, rows, strict=True) if index < count], default=0)
        for token in samples:
            if kind == "expand":
                tokens.append(weight[:, :width] @ token[:width] + bias)
            else:
                output = weight[:width] @ token + bias[:width]
                tokens.append(torch.cat([output, output.new_zeros(len(weight) - width)]))
    return torch.stack(tokens).view(*x.shape[:2], -1)


def naive_results(kind, inputs, rows, widths):
    """Output and gradients in float64."""
    *leaves, grad = [tensor.double().requires_grad_() for tensor in inputs]
    y = naive(kind, *leaves, rows, widths)
    grads = torch.autograd.grad(y, leaves, grad, materialize_grads=True)
    return [y.detach(), *(g.detach() for g in grads)]


def kernel_results(kind, inputs, rows, widths, tiles):
    x, weight, bias, grad = inputs
    forward, backward = KINDS[kind]
    y = forward(x, weight, bias, rows, widths, tiles)
    return [y, *backward(grad, x, weight, rows, widths, tiles)]


def assert_close(ours, theirs, rtol=1e-5, atol=2e-5):
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("seq", "batch", "nested", "other", "rows"),
    [
        (5, 2, 20, 10, [5]),  # one expert: a dense layer
        (7, 3, 40, 10, [7, 4]),
        (9, 2, 48, 20, [9, 4, 4]),  # none of expert 1
        (9, 2, 48, 20, [9, 5, 0]),  # none of the largest
        (9, 2, 48, 20, [9, 9, 2]),  # none of the smallest
        (6, 2, 48, 20, [6, 6, 6]),  # all of the largest
        (6, 2, 48, 20, [6, 0, 0]),  # all of the smallest
        (9, 2, 48, 20, [7, 5, 1]),  # two tokens of none
        (8, 2, 64, 32, [8, 6, 4, 2]),
        (0, 2, 32, 16, [0, 0]),
    ],
)
def test_output_and_gradients_are_those_of_a_loop_over_tokens(
    steps, kind, seq, batch, nested, other, rows
):
    widths = make_widths(nested, len(rows))
    inputs = make_inputs(kind, seq, batch, nested, other)
    ours = kernel_results(kind, inputs, rows, widths, SMALL)
    if seq:
        assert len(steps) >= 3  # the kernels did run
        assert_close(ours, naive_results(kind, inputs, rows, widths))
    else:
        assert [tensor.shape for tensor in ours[:2]] == [inputs[3].shape, inputs[0].shape]
        assert not any(tensor.any() for tensor in ours[2:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiles", [Tiles(64, 32, 16), Tiles(16, 64, 32), Tiles()])
def test_sizes_of_a_real_model_and_tiles_of_any_shape_are_right(steps, kind, tiles):
    rows, widths = [49, 40, 21, 3], make_widths(192, 4)
    inputs = make_inputs(kind, 49, 1, 192, 10)
    ours = kernel_results(kind, inputs, rows, widths, tiles)
    assert_close(ours, naive_results(kind, inputs, rows, widths), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_random_sizes_equal_a_dense_layer_with_masks(steps, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    seq, batch, unit, other, experts = (
        int(torch.randint(low, high, (), generator=generator))
        for low, high in ((1, 20), (1, 4), (1, 12), (1, 50), (1, 5))
    )
    counts = torch.randint(0, seq + 1, (experts - 1,), generator=generator)
    rows = [seq, *counts.sort(descending=True).values.tolist()]
    widths = make_widths(unit * 2 ** (experts - 1), experts)
    inputs = make_inputs(kind, seq, batch, widths[-1], other)
    mask = torch.zeros(seq, 1, widths[-1], dtype=torch.float64)
    for count, width in zip(rows, widths, strict=True):
        mask[:count, :, :width] = 1
    *leaves, grad = [tensor.double().requires_grad_() for tensor in inputs]
    x, weight, bias = leaves
    if kind == "expand":
        y = torch.nn.functional.linear(x * mask, weight, bias)
    else:
        y = torch.nn.functional.linear(x, weight, bias) * mask
    theirs = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
    assert_close(kernel_results(kind, inputs, rows, widths, SMALL), theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_summed_in_float32(steps, kind, dtype):
    rows, widths = [24, 15, 9], make_widths(64, 3)
    inputs = make_inputs(kind, 24, 2, 64, 40, dtype)
    ours = kernel_results(kind, inputs, rows, widths, SMALL)
    assert all(tensor.dtype == dtype for tensor in ours)
    # One rounding, of the result. Sums in `dtype` are off by far more where they cancel.
    precision = torch.finfo(dtype).eps
    assert_close(ours, naive_results(kind, inputs, rows, widths), rtol=precision, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_that_a_token_does_not_have_are_not_used(steps, kind):
    rows, widths = [9, 5, 2], make_widths(48, 3)
    inputs = make_inputs(kind, 9, 2, 48, 20)
    expected = kernel_results(kind, inputs, rows, widths, SMALL)
    poisoned = inputs[0 if kind == "expand" else 3]
    for count, (start, stop) in zip(rows[1:], pairwise(widths), strict=True):
        poisoned[count:, :, start:stop] = torch.nan
    ours = kernel_results(kind, inputs, rows, widths, SMALL)
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_may_have_any_layout(steps, kind):
    rows, widths = [9, 5, 2], make_widths(48, 3)
    x, weight, bias, grad = make_inputs(kind, 9, 2, 48, 20)
    grad = grad[:1, :1].expand(grad.shape)  # strides of zero, as a mean leaves them
    expected = kernel_results(kind, [x, weight, bias, grad.contiguous()], rows, widths, SMALL)
    channels_far_apart = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    layouts = [
        [x.transpose(0, 1).contiguous().transpose(0, 1), weight.t().contiguous().t(), bias, grad],
        [x.repeat(1, 1, 2)[..., : x.shape[2]], weight.repeat(1, 2)[:, : x.shape[2]], bias, grad],
        [channels_far_apart, weight, bias, grad],
    ]
    for inputs in layouts:
        ours = kernel_results(kind, inputs, rows, widths, SMALL)
        assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))


def count_steps(steps, kind, seq, batch, nested, other, rows):
    """Steps of the forward pass, and of its gradients."""
    widths = make_widths(nested, len(rows))
    x, weight, bias, grad = make_inputs(kind, seq, batch, nested, other)
    forward, backward = KINDS[kind]
    steps.clear()
    forward(x, weight, bias, rows, widths, SMALL)
    count = len(steps)
    backward(grad, x, weight, rows, widths, SMALL)
    assert set(steps) == {(16, 16, 16)}
    return count, len(steps) - count


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_is_made_outside_the_staircase(steps, kind):
    rows, batch = [32, 24, 16, 8], 2  # of 64 tokens 16 more at each stair: tiles cover it exactly
    area = 16 * (128 + 64 + 32 + 16) * 32
    assert count_steps(steps, kind, 32, batch, 128, 32, rows) == (area / 16**3, 2 * area / 16**3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [[21, 14, 9, 5], [21, 21, 2, 0], [21, 0, 0, 0], [21] * 4])
def test_steps_exceed_the_staircase_by_its_border_only(steps, kind, rows):
    tokens, nested, other = 3 * 21, 128, 16
    widths, spans = make_widths(nested, 4), [3 * count for count in rows]
    area = sum((b - a) * span for (a, b), span in zip(pairwise([0, *widths]), spans, strict=True))
    border = 16 * (tokens + nested)  # the staircase falls: it crosses no more tiles than that
    counts = count_steps(steps, kind, 21, 3, nested, other, rows)
    for count, products in zip(counts, (1, 2), strict=True):
        used = count * 16**3 / (products * other)
        assert area <= used <= area + border
        assert used <= 64 * nested  # all tiles of a dense layer
        assert rows[2] == 21 or used < 0.6 * 64 * nested


@pytest.mark.parametrize(("dtype", "architecture"), [("fp32", 80), ("bf16", 90)])
def test_kernels_compile_for_gpus(programs, dtype, architecture, tmp_path, monkeypatch):
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"WIDTHS": (24, 48, 96, 192), "PRECISION": "tf32", "bias": None}
    constants |= {"ROWS": 64, "COLUMNS": 32, "INNER": 32}
    tensors = {"x", "weight", "out", "nested", "other"}
    for kernel, more in [
        (programs.linear_kernel, {"IS_EXPAND": True}),
        (programs.linear_kernel, {"IS_EXPAND": False}),
        (programs.weight_grad_kernel, {}),
    ]:
        values = {name: v for name, v in (constants | more).items() if name in kernel.arg_names}
        kinds = dict.fromkeys(kernel.arg_names, "i32")
        kinds |= dict.fromkeys(tensors.intersection(kernel.arg_names), f"*{dtype}")
        kinds |= dict.fromkeys(values, "constexpr")
        source = ASTSource(fn=kernel, signature=kinds, constexprs=values)
        compiled = compile_kernel(source, target=GPUTarget("cuda", architecture, 32))
        assert "mma" in compiled.asm["ptx"]  # tensor cores


def test_other_numbers_of_tokens_do_not_compile_kernels_again(programs):
    for kernel in (programs.linear_kernel, programs.weight_grad_kernel):
        free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        expected = {"num_tokens", *(f"span{expert}" for expert in range(8))}
        assert free == expected.intersection(kernel.arg_names)
        assert len(free) >= 8


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_is_exact_or_tf32_as_pytorch_is_told(precision, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert triton_kernels._precision() == {"highest": "ieee", "high": "tf32"}[precision]


def test_what_kernels_cannot_do_is_refused(programs, monkeypatch):
    def run(dtype=torch.float32, experts=2):
        x, weight, bias, _ = make_inputs("expand", 4, 1, 256, 8, dtype)
        nested_expand_triton(x, weight, bias, [4] * experts, make_widths(256, experts))

    with pytest.raises(ValueError, match=r"tensors are on the CPU.*plain"):
        run()
    with pytest.raises(ValueError, match=r"float64, but must"):
        run(torch.float64)
    with pytest.raises(ValueError, match=r"num_experts = 9.*plain"):
        run(experts=9)
    with pytest.raises(ValueError, match="inner = 8"):
        Tiles(inner=8)
    with pytest.raises(ValueError, match="rows = 48"):
        Tiles(rows=48)
    forget_programs()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"triton is missing; install it"):
        run()


# Compiled kernels run on GPUs only; elsewhere the interpreter computes the same cases above.
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_computes_the_same(programs, kind, dtype):
    rows, widths = [49, 40, 21, 3], make_widths(192, 4)
    inputs = make_inputs(kind, 49, 3, 192, 100, dtype)
    on_gpu = [tensor.cuda() for tensor in inputs]
    ours = [tensor.cpu() for tensor in kernel_results(kind, on_gpu, rows, widths, Tiles())]
    precision = torch.finfo(dtype).eps
    assert_close(ours, naive_results(kind, inputs, rows, widths), rtol=precision, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_use_the_kernels_are_the_plain_ones(kind, steps):
    layer_class = {"expand": NestedLinearExpand, "contract": NestedLinearContract}[kind]
    x = torch.randn(2, 9, 16)
    layer, budget = layer_class(16, 16, 2), Budget((4, 5))
    results = []
    for layer.uses_triton in (False, True):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf, budget)
        y.square().sum().backward()
        results.append([y, leaf.grad, layer.weight.grad, layer.bias.grad])
    assert steps
    for plain, own in zip(*results, strict=True):
        torch.testing.assert_close(own, plain)


def test_a_job_hands_its_choice_to_every_layer():
    args = mone_args["debugmodel"]
    args.kernels = "triton"
    layers = [m for m in MoNE(args).modules() if isinstance(m, NestedLinear)]
    assert len(layers) == 4 * args.n_layers
    assert all(layer.uses_triton for layer in layers)
