import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.models.mone.helpers import gradients, naive_contract, naive_expand, randn, width
from torchtitan_mixtures.models.mone.capacity import Budget, expert_widths
from torchtitan_mixtures.models.mone.nested_mm import (
    merge_blocks,
    nested_contract,
    nested_contract_grads,
    nested_expand,
    nested_expand_grads,
)

DIM, OTHER, BATCH = 16, 6, 3
# Tokens of each expert, the smallest first.
COUNTS = [
    (5,),
    (3, 2),
    (0, 4),
    (4, 0),
    (2, 1, 3),
    (0, 0, 3),
    (3, 0, 0),
    (2, 0, 2),
    (0, 3, 0),
    (2, 1, 3, 2),
    (1, 0, 0, 2),
    (0, 2, 3, 0),
    (4, 0, 0, 0),
    (0, 0, 0, 5),
]
KINDS = ["expand", "contract"]


def inputs(kind, counts, dtype=torch.float64):
    """Tokens, weight and bias that want gradients, rows and widths, the width of each token."""
    shapes = [(sum(counts), BATCH, DIM), (OTHER, DIM), (OTHER,)]
    if kind == "contract":
        shapes = [(sum(counts), BATCH, OTHER), (DIM, OTHER), (DIM,)]
    tensors = [randn(*shape, seed=i).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]
    experts = [e for e in reversed(range(len(counts))) for _ in range(counts[e])]
    of_tokens = [width(expert, DIM, len(counts)) for expert in experts]
    return tensors, Budget(counts).rows, expert_widths(DIM, len(counts)), of_tokens


def naive(kind, x, weight, bias, of_tokens):
    layer = naive_expand if kind == "expand" else naive_contract
    columns = [layer(x[:, sample], weight, bias, of_tokens) for sample in range(x.shape[1])]
    return torch.stack(columns, dim=1)


def operator(kind):
    return nested_expand if kind == "expand" else nested_contract


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(kind, counts):
    tensors, rows, widths, of_tokens = inputs(kind, counts)
    expected = naive(kind, *tensors, of_tokens)
    found = operator(kind)(*tensors, rows, widths)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(found, tensors), gradients(expected, tensors), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
def test_prefixes_of_tokens_give_what_experts_one_by_one_do(kind):
    counts = (2, 1, 3, 2)
    tensors, rows, widths, _ = inputs(kind, counts)
    x, weight, bias = tensors
    parts, start = [], 0
    for expert in reversed(range(4)):
        part, d = x[start : start + counts[expert]], widths[expert]
        if kind == "expand":
            parts.append(part[:, :, :d] @ weight[:, :d].t() + bias)
        else:
            narrow = part @ weight[:d].t() + bias[:d]
            parts.append(torch.nn.functional.pad(narrow, (0, DIM - d)))
        start += counts[expert]
    expected = torch.cat(parts)
    found = operator(kind)(*tensors, rows, widths)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(found, tensors), gradients(expected, tensors))


def test_what_a_token_does_not_have_is_not_read():
    counts = (2, 1, 3)
    tensors, rows, widths, of_tokens = inputs("expand", counts)
    x, weight, bias = tensors
    expected = nested_expand(x, weight, bias, rows, widths)
    grad = randn(*expected.shape)
    clean = nested_expand_grads(grad, x, weight, rows, widths)
    beyond = torch.arange(DIM) >= torch.tensor(of_tokens)[:, None, None]
    poisoned = x.masked_fill(beyond, torch.nan)
    assert torch.equal(nested_expand(poisoned, weight, bias, rows, widths), expected)
    for found, value in zip(
        nested_expand_grads(grad, poisoned, weight, rows, widths), clean, strict=True
    ):
        assert torch.equal(found, value)
    assert not clean[0].masked_select(beyond).any()


def test_gradients_of_what_a_token_did_not_write_are_not_read():
    counts = (2, 1, 3)
    tensors, rows, widths, of_tokens = inputs("contract", counts)
    x, weight, bias = tensors
    output = nested_contract(x, weight, bias, rows, widths)
    beyond = torch.arange(DIM) >= torch.tensor(of_tokens)[:, None, None]
    assert not output.masked_select(beyond).any()
    grad = randn(*output.shape)
    clean = nested_contract_grads(grad, x, weight, rows, widths)
    poisoned = grad.masked_fill(beyond, torch.nan)
    for found, value in zip(
        nested_contract_grads(poisoned, x, weight, rows, widths), clean, strict=True
    ):
        assert torch.equal(found, value)


@pytest.mark.parametrize("kind", KINDS)
def test_with_all_tokens_at_the_largest_expert_it_is_a_linear_layer(kind):
    tensors, rows, widths, _ = inputs(kind, (0, 0, 5))
    found, expected = operator(kind)(*tensors, rows, widths), torch.nn.functional.linear(*tensors)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradients(found, tensors), gradients(expected, tensors))


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_in_memory_may_be_others(kind):
    tensors, rows, widths, _ = inputs(kind, (2, 1, 3))
    x, weight, bias = tensors
    expected = operator(kind)(*tensors, rows, widths)
    expected_grads = gradients(expected, tensors)
    by_sample = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    part = torch.cat([x, x], dim=2).detach()[:, :, : x.shape[2]].requires_grad_()
    for strided in (by_sample, part):
        found = operator(kind)(strided, weight, bias, rows, widths)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(gradients(found, [strided, weight, bias]), expected_grads)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_may_be_one_number_in_memory(kind):
    tensors, rows, widths, of_tokens = inputs(kind, (2, 1, 3))
    found = torch.autograd.grad(operator(kind)(*tensors, rows, widths).sum(), tensors)
    expected = torch.autograd.grad(naive(kind, *tensors, of_tokens).sum(), tensors)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [(2, 1, 3), (0, 0, 3), (3, 0, 0)], ids=str)
def test_operators_keep_the_rules_of_torch_library(kind, counts):
    tensors, rows, widths, _ = inputs(kind, counts)
    torch.library.opcheck(operator(kind), (*tensors, list(rows), widths))
    x, weight, bias = (tensor.detach() for tensor in tensors)
    grads = nested_expand_grads if kind == "expand" else nested_contract_grads
    grad = randn(*operator(kind)(x, weight, bias, rows, widths).shape)
    torch.library.opcheck(grads, (grad, x, weight, list(rows), widths))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_flops_are_those_of_the_slices(kind, counts):
    tensors, rows, widths, of_tokens = inputs(kind, counts)
    slices = BATCH * sum(of_tokens) * OTHER
    with FlopCounterMode(display=False) as forward:
        output = operator(kind)(*tensors, rows, widths)
    assert forward.get_total_flops() == 2 * slices
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert backward.get_total_flops() == 4 * slices


def test_flops_are_counted_on_fake_tensors_too():
    tensors, rows, widths, of_tokens = inputs("expand", (2, 1, 3))
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        nested_expand(*(mode.from_tensor(tensor) for tensor in tensors), rows, widths)
    assert counter.get_total_flops() == 2 * BATCH * sum(of_tokens) * OTHER


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_in_bfloat16(kind):
    tensors, rows, widths, of_tokens = inputs(kind, (2, 1, 3), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = operator(kind)(*tensors, rows, widths)
    assert found.dtype == torch.bfloat16
    expected = naive(kind, *tensors, of_tokens)
    torch.testing.assert_close(found.float(), expected, rtol=0.03, atol=0.05)
    for found_grad, grad, tensor in zip(
        gradients(found.float(), tensors), gradients(expected, tensors), tensors, strict=True
    ):
        assert found_grad.dtype == tensor.dtype == torch.float32
        torch.testing.assert_close(found_grad, grad, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_close_as_one_plain_product(kind):
    tensors, rows, widths, of_tokens = inputs(kind, (2, 1, 3), torch.bfloat16)
    found = operator(kind)(*tensors, rows, widths)
    exact = naive(kind, *(tensor.double() for tensor in tensors), of_tokens)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0.05)


def test_blocks_with_the_same_tokens_are_one_and_those_of_none_are_left_out():
    assert merge_blocks((6, 4, 3), (4, 8, 16)) == [
        (6, slice(0, 4)),
        (4, slice(4, 8)),
        (3, slice(8, 16)),
    ]
    assert merge_blocks((3, 3, 3), (4, 8, 16)) == [(3, slice(0, 16))]
    assert merge_blocks((5, 3, 3), (4, 8, 16)) == [(5, slice(0, 4)), (3, slice(4, 16))]
    assert merge_blocks((5, 5, 0), (4, 8, 16)) == [(5, slice(0, 8))]
    assert merge_blocks((0, 0, 0), (4, 8, 16)) == []
