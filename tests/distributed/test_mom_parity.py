"""MoM and DiT under every layout: the loss, every gradient and the weights of one process.

Each step is of two microbatches, so that gradients are accumulated under every layout too.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from tests.distributed.collectives import count
from tests.distributed.mom_parity import (
    CHECKPOINTS,
    COMPILED,
    VARIANTS,
    compare,
    make_runs,
    use_float64,
)
from tests.distributed.parity import LAYOUTS
from tests.gang import run_ranks

pytestmark = pytest.mark.distributed

MAIN_VARIANTS = ["typed", "free", "DiT"]
PARITY = {
    "FSDP2": MAIN_VARIANTS,
    "FSDP4": ["two of a kind"],
    "HSDP2x2": MAIN_VARIANTS,
    "DDP2": MAIN_VARIANTS,
    "TP2": list(VARIANTS),
    "TP4": MAIN_VARIANTS,
    "CP2": list(VARIANTS),
    "CP4": MAIN_VARIANTS,
    "FSDP2xTP2": [*MAIN_VARIANTS, "two of a kind"],
    "FSDP2xCP2": MAIN_VARIANTS,
    "TP2xCP2": MAIN_VARIANTS,
}
MORE_PARITY = {
    "DDP2xCP2": MAIN_VARIANTS,
    "TP2xCP2": [variant for variant in VARIANTS if variant not in MAIN_VARIANTS],
    "FSDP2xTP2xCP2": MAIN_VARIANTS,
}


def assert_equal(layout, variants, **options):
    for worst in run_ranks(compare, LAYOUTS[layout].world, layout, variants, options, timeout=240):
        for variant, (error, name) in worst.items():
            assert error < 1e-10, (variant, name, error)


@pytest.mark.parametrize("layout", PARITY)
def test_loss_and_every_gradient_equal_one_process(layout):
    assert_equal(layout, PARITY[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", MORE_PARITY)
def test_loss_and_every_gradient_equal_one_process_in_further_layouts(layout):
    assert_equal(layout, MORE_PARITY[layout])


@pytest.mark.parametrize("layout", ["FSDP2", "TP2", "CP2"])
def test_activation_checkpointing_changes_nothing(layout):
    assert_equal(layout, ["free", "DiT"], **CHECKPOINTS["full"])
    assert_equal(layout, ["free", "DiT"], **CHECKPOINTS["selective"])


# Under tensor parallelism PyTorch 2.13 cannot compute attention of compiled blocks on a CPU again;
# `parallelize` saves it where all blocks are checkpointed, but not where every second one is.
MORE_COMPILED = [("typed", kind) for kind in ("none", "full", "every second")]
MORE_COMPILED += [("DiT", kind) for kind in ("none", "full")]
COMPILED_CASES = [
    *((layout, variant, "selective") for layout in ("FSDP2", "TP2", "CP2")
      for variant in ("free", "DiT")),
    *(pytest.param(layout, *case, marks=pytest.mark.slow)
      for layout in ("FSDP2", "TP2", "CP2", "TP2xCP2") for case in MORE_COMPILED),
]  # fmt: skip


def compare_compiled(layout, variant, options):
    worst = compare(layout, [variant], options)
    return worst[variant], counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("layout", "variant", "kind"), COMPILED_CASES)
def test_blocks_are_compiled_once_whole_and_compute_the_same(layout, variant, kind):
    world, options = LAYOUTS[layout].world, COMPILED | CHECKPOINTS[kind]
    results = run_ranks(compare_compiled, world, layout, variant, options, timeout=280)
    for (error, name), graphs in results:
        assert error < 1e-10, (name, error)
        assert graphs == (2 if kind == "every second" else 1)  # blocks of two kinds, or of one


def count_collectives(layout, variant):
    """What a whole model and a block send, forward and backward; nothing of FSDP's is counted."""
    use_float64()
    run, _ = make_runs(layout, variant, LAYOUTS[layout].dims(), {})
    args, counts = run.args, {}
    x = torch.randn(4, args.num_tokens // 2, args.dim, requires_grad=True)
    condition = torch.randn(4, args.dim, requires_grad=True)
    images = torch.randn(4, args.in_channels, args.image_size, args.image_size)
    for name, part, arguments in (
        ("model", run.model, (images, torch.rand(4), torch.zeros(4, dtype=torch.int64))),
        ("block", run.model.layers["0"], (x, condition)),
    ):
        output, forward = count(lambda part=part, arguments=arguments: part(*arguments))
        first = output[0] if isinstance(output, tuple) else output
        _, backward = count(lambda first=first: first.sum().backward())
        counts[name] = dict(forward), dict(backward)
    return counts


ALL_GATHER, REDUCE_SCATTER = "all_gather_into_tensor", "reduce_scatter_tensor"


@pytest.mark.parametrize("variant", ["typed", "DiT"])
def test_tensor_parallelism_gathers_and_scatters_once_for_each_sub_layer(variant):
    for counts in run_ranks(count_collectives, 2, "TP2", variant):
        # Modulation, mixer or attention, and feed-forward network; the first needs no sum.
        assert counts["block"] == (
            {ALL_GATHER: 3, REDUCE_SCATTER: 2},
            {ALL_GATHER: 2, REDUCE_SCATTER: 3},
        )
        # Two blocks, and modulation and result of the final layer.
        assert counts["model"] == (
            {ALL_GATHER: 8, REDUCE_SCATTER: 4},
            {ALL_GATHER: 4, REDUCE_SCATTER: 7},
        )


@pytest.mark.parametrize("variant", ["typed", "channel mixers alone", "DiT"])
def test_context_parallelism_swaps_twice_and_averages_what_the_router_sees(variant):
    for counts in run_ranks(count_collectives, 2, "CP2", variant):
        swaps = {} if variant == "channel mixers alone" else {"all_to_all_single": 2}
        for blocks, name in ((1, "block"), (2, "model")):
            of_all = {kind: blocks * number for kind, number in swaps.items()}
            gathers = {} if variant == "DiT" else {ALL_GATHER: blocks}
            scatters = {} if variant == "DiT" else {REDUCE_SCATTER: blocks}
            assert counts[name] == (of_all | gathers, of_all | scatters)


def elements_of_experts():
    """How many elements of the stacked weights each rank has, and of how many."""
    use_float64()
    run, _ = make_runs("FSDP4", "two of a kind", LAYOUTS["FSDP4"].dims(), {})
    stacks = [p for p in run.model.parameters() if p.ndim == 3]
    return sum(p.to_local().numel() for p in stacks), sum(p.numel() for p in stacks)


def test_fewer_experts_than_ranks_are_shared_evenly():
    for own, total in run_ranks(elements_of_experts, 4):
        assert own == total / 4
