from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import all_gather_single, all_reduce
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from torchtitan_mixtures.planning.collectives import Group, UnknownCollectiveError, moved_bytes
from torchtitan_mixtures.planning.meter import StepMeter
from torchtitan_mixtures.planning.world import fake_world

KIB = 1024  # bytes of 256 float32


def zeros(*shape):
    return torch.zeros(*shape)


def test_what_lives_is_counted_until_its_last_tensor_dies():
    with FakeTensorMode(), StepMeter().watching() as meter:
        first = zeros(256)
        view = first.view(16, 16)[3:]
        assert meter.live == KIB
        second = view + 1
        assert meter.live == KIB + 13 * 16 * 4
        del first
        assert meter.live == KIB + 13 * 16 * 4  # the view keeps it
        del view, second
        assert meter.live == 0
        assert meter.peak == KIB + 13 * 16 * 4


def test_a_restart_forgets_the_peak_but_not_what_lives():
    with FakeTensorMode(), StepMeter().watching() as meter:
        kept = zeros(256)
        zeros(1024)
        assert meter.peak == 5 * KIB
        meter.restart()
        assert (meter.live, meter.peak) == (KIB, KIB)
        del kept


def test_storages_that_are_resized_count_as_they_are():
    with FakeTensorMode(), StepMeter().watching() as meter:
        tensor = zeros(256)
        tensor.untyped_storage().resize_(0)
        assert meter.live == 0
        tensor.untyped_storage().resize_(2 * KIB)
        assert (meter.live, meter.peak) == (2 * KIB, 2 * KIB)


def test_saved_tensors_and_gradients_are_those_of_a_network_by_hand():
    batch, dim, hidden = 32, 8, 64
    with torch.device("meta"):
        layers = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        network = nn.Sequential(layers[0], nn.SiLU(), layers[1])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, StepMeter().watching() as meter:
        network.to_empty(device="cpu")
        x = mode.from_tensor(torch.zeros(batch, dim))
        meter.restart()
        before = meter.live
        loss = network(x).sum()
        # Both layers' inputs and that of SiLU; x itself was there, the sum is one number.
        assert meter.live - before == 4 * (2 * batch * hidden + 1)
        loss.backward()
        del loss
        assert meter.live - before == 2 * 4 * dim * hidden
    # Forward 2 products; backward 4, less the gradient of x.
    assert meter.flops == 2 * batch * dim * hidden * (2 + 3)


def test_attention_on_a_cpu_has_the_products_of_attention():
    batch, heads, seq, dim = 2, 3, 16, 8
    with FakeTensorMode(), StepMeter().watching() as meter:
        q, k, v = (torch.zeros(batch, heads, seq, dim, requires_grad=True) for _ in range(3))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        product = 2 * batch * heads * seq * seq * dim
        assert meter.flops == 2 * product
        out.sum().backward()
    # Scores again, and the gradients of scores, values, queries and keys.
    assert meter.flops == 2 * product + 5 * product


def test_bytes_of_products_are_told_from_those_of_all_else():
    with FakeTensorMode():
        a, b = zeros(16, 16), zeros(16, 16)
        with StepMeter().watching() as meter:
            c = a @ b
            assert (meter.product_bytes, meter.other_bytes) == (3 * KIB, 0)
            c.relu().view(-1)
        assert (meter.product_bytes, meter.other_bytes) == (3 * KIB, 2 * KIB)


def test_shapes_of_whole_tensors_are_not_counted():
    with fake_world(4, 0):
        mesh = init_device_mesh("cpu", (4,))
        with FakeTensorMode(allow_non_fake_inputs=True):
            share = DTensor.from_local(zeros(16, 16), mesh, [Shard(0)], run_check=False)
            with StepMeter().watching() as meter:
                product = share @ distribute_tensor(torch.zeros(16, 16), mesh)
        assert product.shape == (64, 16)
        assert meter.flops == 2 * 16**3
        assert meter.peak < 4 * KIB  # the product and what is made of the second factor


def test_what_collectives_move_is_counted_by_group():
    with fake_world(8, 0):
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("outer", "inner"))
        outer, inner = (mesh[name].get_group().group_name for name in ("outer", "inner"))
        ddp = Group(outer, is_functional=False)
        with FakeTensorMode(), StepMeter().watching() as meter:
            x = zeros(256)
            all_gather_single(x, 0, mesh["inner"])
            all_reduce(x, "sum", mesh["outer"])
            dist.all_reduce(x, group=mesh["outer"].get_group())
            dist.barrier(group=mesh["outer"].get_group())
        outer, inner = Group(outer, is_functional=True), Group(inner, is_functional=True)
        assert dict(meter.sent) == {inner: 3 * KIB, outer: KIB, ddp: KIB}
        assert meter.calls == {
            (inner, "all-gather"): 1, (outer, "all-reduce"): 1, (ddp, "all-reduce"): 1
        }  # fmt: skip


def test_waiting_for_a_collective_makes_no_copy_of_what_it_brings():
    with fake_world(4, 0):
        mesh = init_device_mesh("cpu", (4,))
        with FakeTensorMode():
            x = zeros(256)
            with StepMeter().watching() as meter:
                gathered = all_gather_single(x, 0, mesh)
                gathered = torch.ops._c10d_functional.wait_tensor(gathered)
                assert meter.live == meter.peak == gathered.nbytes == 4 * KIB
                assert meter.other_bytes == 0


def test_a_collective_that_is_not_in_the_table_is_an_error():
    with pytest.raises(UnknownCollectiveError, match="gather_everything"):
        moved_bytes("gather_everything", ([], []), 2)
