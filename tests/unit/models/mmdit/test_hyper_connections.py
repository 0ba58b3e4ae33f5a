import pytest
import torch

from tests.unit.models.mmdit.naive import (
    count,
    naive_read,
    randn,
    randn_streams,
    shake,
)
from torchtitan_mixtures.models.mmdit.block import BlockConfig, JointBlock
from torchtitan_mixtures.models.mmdit.hyper_connections import (
    HyperConnection,
    StreamReader,
    expand,
    reduce,
)

DIMS = {"text": 6, "image": 8}


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def blocks_of(num_streams, **fields):
    """A block with one stream, and one with the same weights and several."""
    blocks = []
    for streams in (1, num_streams):
        config = BlockConfig(2, 4, 5, num_residual_streams=streams, **fields)
        torch.manual_seed(0)
        blocks.append(JointBlock(DIMS, config, layer_index=3))
    plain, several = blocks
    shake(plain)
    several.double().load_state_dict(plain.state_dict(), strict=False)
    return plain, several


def test_a_connection_has_as_many_parameters_as_the_paper_says():
    assert count(HyperConnection(32, 4, 0)) == 32 * 5 + 2 * 32 + 4 * 5 + 4 + 2 == 250
    assert count(HyperConnection(32, 4, 0, dynamic=False)) == 4 * (4 + 2)
    assert count(StreamReader(32, 4, 0)) == 32 + 32 + 4 + 1
    assert count(StreamReader(32, 4, 0, dynamic=False)) == 4


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("num_streams", [2, 3])
def test_is_a_loop_over_tokens_and_streams(num_streams, dynamic):
    connection = shake(HyperConnection(6, num_streams, 1, dynamic=dynamic))
    state = randn(2, 4, num_streams, 6).requires_grad_()
    out = randn(2, 4, 6, seed=1).requires_grad_()
    read, carried, beta = connection(state)
    found = connection.combine(carried, beta, out * read)
    w = dict(connection.named_parameters())
    expected_read, expected_carried, expected_beta = naive_read(w, state, dynamic)
    close(read, expected_read)
    close(carried, expected_carried)
    close(beta.expand(2, 4, num_streams), expected_beta)
    parts = [
        expected_carried[:, :, j] + expected_beta[:, :, j, None] * (out * expected_read)
        for j in range(num_streams)
    ]
    expected = torch.stack(parts, dim=2)
    close(found, expected)
    tensors = [state, out, *w.values()]
    grads = [torch.autograd.grad(x.square().sum(), tensors) for x in (found, expected)]
    close(*grads, tolerance=1e-9)


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_reader_reads_as_a_connection_does(dynamic):
    connection = shake(HyperConnection(6, 3, 1, dynamic=dynamic))
    reader, state = StreamReader(6, 3, 1, dynamic=dynamic).double(), randn(2, 4, 3, 6)
    w = dict(connection.state_dict())
    own = {"static": w["static"][:, :1]}
    if dynamic:
        own |= {"weight": w["weight"][:1], "norm_weight": w["norm_weight"], "scale": w["scale"][:1]}
    reader.load_state_dict(own)
    close(reader(state), connection(state)[0])


@pytest.mark.parametrize("dynamic", [True, False])
def test_at_first_a_branch_reads_one_stream_and_all_get_what_it_puts_out(dynamic):
    state, out = randn(2, 3, 4, 6), randn(2, 3, 6, seed=1)
    for index in range(6):
        connection = HyperConnection(6, 4, index, dynamic=dynamic).double()
        read, carried, beta = connection(state)
        close(read, state[:, :, index % 4])
        close(carried, state)
        close(connection.combine(carried, beta, out), state + out[:, :, None])


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("modulation", ["zero", "film_identity"])
def test_equal_streams_are_the_plain_residual_network_at_first(modulation, dynamic):
    plain, several = blocks_of(4, modulation=modulation, dynamic_streams=dynamic)
    tokens, condition = randn_streams(DIMS, (3, 4)), randn(2, 5)
    expected = plain(tokens, condition)
    found = several({name: expand(x, 4) for name, x in tokens.items()}, condition)
    for name in DIMS:
        close(reduce(found[name]), expected[name])
        close(found[name], expand(expected[name], 4))


def test_a_dynamic_connection_looks_at_the_token_and_a_static_one_does_not():
    state = randn(1, 2, 3, 6)
    for dynamic in (True, False):
        connection = shake(HyperConnection(6, 3, 0, dynamic=dynamic))
        first, second = connection(state)[2].expand(1, 2, 3)[0]
        assert torch.equal(first, second) is not dynamic


def test_the_size_of_a_stream_does_not_matter_to_weights():
    connection, state = shake(HyperConnection(6, 3, 0)), randn(1, 2, 3, 6)
    sizes = torch.tensor([0.01, 5.0, 300.0], dtype=torch.float64)[:, None]
    close(connection(state)[2], connection(state * sizes)[2])


def test_streams_of_zeros_have_finite_gradients():
    connection = shake(HyperConnection(6, 3, 0))
    state = torch.zeros(1, 2, 3, 6, dtype=torch.float64, requires_grad=True)
    read, carried, beta = connection(state)
    (read.sum() + carried.sum() + beta.sum()).backward()
    assert state.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in connection.parameters())


def test_weights_are_computed_in_float32():
    # In bfloat16 what a token adds to a weight of about 1 would be lost.
    connection = HyperConnection(64, 4, 0)
    with torch.no_grad():
        connection.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    state = randn(1, 8, 4, 64).bfloat16()
    expected = connection.double()(state.double())
    found = connection.bfloat16()(state)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert found[2].unique().numel() > 16
    torch.testing.assert_close(found[2].double(), expected[2], rtol=0, atol=1e-3)


def test_expanding_and_joining_undo_each_other():
    x = randn(2, 3, 6)
    state = expand(x, 4)
    assert state.shape == (2, 3, 4, 6)
    close(reduce(state), x)
    close(reduce(torch.stack([x, 3 * x], dim=2)), 2 * x)
