"""MoNE and ViT under every layout: the loss, every gradient and the weights of one process.

Each step is of two microbatches, so that gradients are accumulated under every layout too.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from tests.distributed.mom_parity import CHECKPOINTS, COMPILED
from tests.distributed.mone_parity import VARIANTS, compare, make_runs
from tests.distributed.parity import LAYOUTS, use_float64
from tests.gang import run_ranks
from torchtitan_mixtures.models.mone import parallelize

pytestmark = pytest.mark.distributed

MAIN_VARIANTS = ["nested", "dense"]
WITHOUT_CLASS_TOKEN = [variant for variant in VARIANTS if variant != "class token"]
PARITY = {
    "FSDP2": ["nested", "dense", "random", "class token"],
    "FSDP4": ["nested", "two routers, later"],
    "HSDP2x2": MAIN_VARIANTS,
    "DDP2": ["nested", "dense", "shared router"],
    "TP2": list(VARIANTS),
    "TP4": MAIN_VARIANTS,
    "CP2": WITHOUT_CLASS_TOKEN,
    "CP4": MAIN_VARIANTS,
    "FSDP2xTP2": MAIN_VARIANTS,
    "FSDP2xCP2": [*MAIN_VARIANTS, "two routers, later"],
    "TP2xCP2": [*MAIN_VARIANTS, "two routers, later"],
}
MORE_PARITY = {
    "DDP2xCP2": MAIN_VARIANTS,
    "TP2xCP2": WITHOUT_CLASS_TOKEN,
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


@pytest.mark.parametrize("layout", ["CP2", "CP4"])
def test_local_routing_is_that_of_each_ranks_part_by_itself(layout):
    assert_equal(layout, ["nested", "random", "skip"], **{"nested.context_routing": "local"})


@pytest.mark.parametrize("layout", ["FSDP2", "TP2", "CP2"])
def test_activation_checkpointing_changes_nothing(layout):
    for kind in ("full", "selective"):
        assert_equal(layout, ["nested", "dense"], **CHECKPOINTS[kind])


COMPILED_CASES = [
    *((layout, variant, "selective") for layout in ("FSDP2", "TP2", "CP2")
      for variant in ("nested", "dense")),
    *(pytest.param(layout, variant, kind, marks=pytest.mark.slow)
      for layout in ("FSDP2", "TP2", "CP2", "TP2xCP2") for variant in ("nested", "skip", "argmax")
      for kind in ("none", "full")),
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
        assert graphs == 1


def count_summed(capacity):
    """Numbers that tensor parallelism sums for a batch of 2: forward, backward; and capacity."""
    use_float64()
    run, _ = make_runs("TP2", "nested", LAYOUTS["TP2"].dims(), {})
    sent = []
    original = parallelize.collectives.all_reduce

    def all_reduce(x, *rest):
        sent.append(x.numel())
        return original(x, *rest)

    parallelize.collectives.all_reduce = all_reduce
    args, budget = run.args, run.args.budget(capacity)
    logits = run.model(torch.randn(2, args.in_channels, args.image_size, args.image_size), budget)
    forward = list(sent)
    logits.logits.sum().backward()
    whole = 2 * args.num_tokens * args.dim
    return forward, sent[len(forward) :], whole * budget.effective_capacity


@pytest.mark.parametrize("capacity", [0.25, 0.6, 1.0])
def test_tensor_parallelism_sends_what_tokens_have_and_no_more(capacity):
    for forward, backward, used in run_ranks(count_summed, 2, capacity):
        assert forward == [used] * 4  # two blocks of two branches
        assert backward == [used] * 4
