from __future__ import annotations

import dataclasses

import pytest

from torchtitan_mixtures.planning.devices import DEVICES, GIB, Device, find_device
from torchtitan_mixtures.planning.step import Memory, Plan
from torchtitan_mixtures.planning.timing import link_seconds, spread, step_times

DEVICE = Device("round", 10 * GIB, 1e12, 1e11, 1e9, 100.0, 10.0, of_a_node=8)
PLAN = Plan(
    family="mot",
    flavor="debugmodel",
    world_size=1,
    rank=0,
    degrees={},
    memory=Memory(1, 1, 2, 0, 1, 5),
    num_parameters=1,
    model_flops=10**9,
    samples=1,
    tokens=1000,
    microbatches=1,
    flops=2 * 10**12,
    product_bytes=10**9,
    other_bytes=4 * 10**9,
    optimizer_bytes=5 * 10**8,
    sent={},
    calls={},
    bubble=0.0,
    precision="bfloat16",
    is_compiled=True,
    assumed_images=None,
)


def times(device=DEVICE, **changes):
    return step_times(dataclasses.replace(PLAN, **changes), device)


def test_a_step_takes_what_flops_or_bytes_take():
    found = times()
    assert (found.compute, found.memory, found.step, found.limit) == (2.0, 1.5, 2.0, "compute")
    assert found.utilization == pytest.approx(0.5)
    found = times(is_compiled=False)  # nothing is fused
    assert (found.memory, found.step, found.limit) == (5.5, 5.5, "memory")
    assert times(precision="float32").compute == 20.0


def test_a_pipeline_waits_beside_its_kernels():
    found = times(bubble=0.75)
    assert (found.bubble, found.step, found.limit) == (6.0, 8.0, "bubble")


def test_tensor_parallelism_adds_and_fsdp_goes_beside():
    found = times(world_size=4, degrees={"tp": 2, "dp_shard": 2}, sent={"tp": 100, "fsdp": 150})
    assert found.links == {"tp": 1.0, "fsdp": 1.5}
    assert (found.step, found.limit) == (3.0, "compute")
    found = times(world_size=4, degrees={"tp": 2, "dp_shard": 2}, sent={"tp": 100, "fsdp": 450})
    assert (found.step, found.limit) == (4.5, "link (fsdp)")
    assert times(sent={"other": 10**6}).links == {}  # a few numbers


@pytest.mark.parametrize(
    ("name", "degrees", "found"),
    [
        ("tp", {"tp": 8, "dp_shard": 8}, (8, 8)),
        ("fsdp", {"tp": 8, "dp_shard": 8}, (8, 1)),
        ("fsdp", {"tp": 2, "dp_shard": 16}, (16, 4)),
        ("fsdp", {"cp": 2, "dp_shard": 8}, (16, 8)),
        ("cp", {"tp": 4, "cp": 4}, (4, 2)),
        ("dp_replicate", {"dp_shard": 8, "dp_replicate": 4}, (4, 1)),
        ("dp_replicate", {"dp_shard": 2, "dp_replicate": 4}, (4, 4)),
        ("pp", {"tp": 2, "dp_shard": 2, "pp": 4}, (4, 2)),
    ],
)
def test_ranks_of_a_group_are_in_as_many_nodes_as_torchtitan_puts_them(name, degrees, found):
    assert spread(name, degrees, of_a_node=8) == found


def test_rings_share_the_network_adapters_of_a_node_and_exchanges_do_not():
    # 16 ranks, 8 in a node: of 150 bytes 80 come from the other node.
    degrees = {"dp_shard": 16}
    assert link_seconds("fsdp", 150, degrees, DEVICE) == pytest.approx(max(1.5, 80 / 8 / 10))
    assert link_seconds("cp", 150, {"cp": 16}, DEVICE) == pytest.approx(80 / 10)
    assert link_seconds("fsdp", 70, {"tp": 8, "dp_shard": 8}, DEVICE) == pytest.approx(7.0)


def test_figures_of_devices_are_in_one_range():
    for name, device in DEVICES.items():
        assert find_device(name) is device
        gib = int(name.split("-")[1].removesuffix("g"))
        assert device.memory == gib * GIB
        # Of any of them: a few hundred FLOPs for each byte of memory, which is faster than links.
        assert 100 < device.bfloat16_flops / device.bandwidth < 400
        assert device.float32_flops < device.bfloat16_flops
        assert device.network < device.link < device.bandwidth


def test_an_unknown_device_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"--device gtx: must be one of .*h100-80g"):
        find_device("gtx")
