import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from torchtitan_mixtures.models.common.grouped_mm import grouped_mm


def loop(x, weight, ends):
    stops = ends.tolist()
    starts = [0, *stops[:-1]]
    pairs = zip(starts, stops, weight, strict=True)
    return torch.cat([x[start:stop] @ matrix for start, stop, matrix in pairs])


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("stops", [[8, 24, 40], [0, 40, 40], [3, 4, 40]])
@pytest.mark.parametrize("width", [16, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_a_loop_with_all_gradients(dtype, width, stops, is_transposed):
    ends = torch.tensor(stops, dtype=torch.int32)
    x = torch.randn(40, width, dtype=dtype)
    weight = torch.randn(3, width, 2 * width, dtype=dtype)
    if is_transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    results = []
    for function in (grouped_mm, loop):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        output = function(*inputs, ends)
        output.sum().backward()  # a gradient of stride zero
        results.append([output.detach(), *(i.grad for i in inputs)])
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)


def test_operator_is_registered_soundly():
    inputs = (
        torch.randn(24, 8, requires_grad=True),
        torch.randn(2, 8, 16).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        torch.tensor([8, 24], dtype=torch.int32),
    )
    torch.library.opcheck(grouped_mm, inputs)


def test_flops_are_counted_forward_and_backward():
    x, weight = torch.randn(24, 8, requires_grad=True), torch.randn(2, 8, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        grouped_mm(x, weight, torch.tensor([8, 24], dtype=torch.int32)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 24 * 8 * 16


@pytest.mark.parametrize("stops", [[8, 24], [0, 16], [0, 0], [40, 40]])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 16), (torch.float64, 6)])
def test_rows_after_the_last_end_are_neither_read_nor_left_undefined(dtype, width, stops):
    ends, last = torch.tensor(stops, dtype=torch.int32), stops[-1]
    x, weight = torch.randn(40, width, dtype=dtype), torch.randn(2, width, 24, dtype=dtype)
    grad = torch.randn(40, 24, dtype=dtype)
    x[last:], grad[last:] = torch.nan, torch.nan
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    output = grouped_mm(*inputs, ends, True)
    output.backward(grad)
    expected = loop(x[:last], weight, ends)
    torch.testing.assert_close(output[:last], expected)
    assert not output[last:].any()
    grads = torch.autograd.grad(expected, inputs, grad[:last])
    torch.testing.assert_close(x.grad[:last], grads[0][:last])
    assert not x.grad[last:].any()
    torch.testing.assert_close(weight.grad, grads[1])


@pytest.mark.parametrize("is_partial", [False, True])
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 16), (torch.float64, 6)])
def test_bias_belongs_to_blocks_of_rows(dtype, width, is_partial):
    stops = [8, 24] if is_partial else [16, 40]
    ends, last = torch.tensor(stops, dtype=torch.int32), stops[-1]
    inputs = [
        torch.randn(40, width, dtype=dtype, requires_grad=True),
        torch.randn(2, width, 24, dtype=dtype, requires_grad=True),
        torch.randn(5, 24, dtype=dtype, requires_grad=True),
    ]
    x, weight, bias = inputs
    grad = torch.randn(40, 24, dtype=dtype)
    output = grouped_mm(x, weight, ends, is_partial, bias)
    expected = loop(x[:last], weight, ends) + bias.repeat_interleave(8, 0)[:last]
    torch.testing.assert_close(output[:last], expected)
    assert not output[last:].any()
    grads = torch.autograd.grad(output, inputs, grad)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, inputs, grad[:last]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_rows_in_groups_count_as_flops():
    x, weight = torch.randn(40, 8, requires_grad=True), torch.randn(2, 8, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ends = torch.tensor([8, 24], dtype=torch.int32)
        grouped_mm(x, weight, ends, True).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 24 * 8 * 16
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        grouped_mm(
            torch.empty(40, 8), torch.empty(2, 8, 16), torch.empty(2, dtype=torch.int32), True
        )
    assert counter.get_total_flops() == 2 * 40 * 8 * 16  # no values, no ends


def test_partial_operator_is_registered_soundly():
    inputs = (
        torch.randn(24, 8, requires_grad=True),
        torch.randn(2, 8, 16, requires_grad=True),
        torch.tensor([8, 16], dtype=torch.int32),
        True,
        torch.randn(3, 16, requires_grad=True),
    )
    torch.library.opcheck(grouped_mm, inputs)
