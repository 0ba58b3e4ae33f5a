"""Mixtures of diffusers under every layout: the loss and every gradient of one process.

Each step is of two microbatches; in one of them a rank has no image for one of the experts.
"""

from __future__ import annotations

import pytest
from torch._dynamo.utils import counters

from tests.distributed.mixdiff_parity import VARIANTS, compare
from tests.distributed.mom_parity import CHECKPOINTS, COMPILED
from tests.distributed.parity import LAYOUTS
from tests.gang import run_ranks

pytestmark = pytest.mark.distributed

MAIN_VARIANTS = ["joint", "decentralised", "prompts"]
WHOLE = [variant for variant in VARIANTS if variant not in ("other patches", "the router alone")]
PARITY = {
    "FSDP2": list(VARIANTS),
    "DDP2": list(VARIANTS),
    "TP2": list(VARIANTS),
    "CP2": WHOLE,
    "HSDP2x2": ["decentralised"],
    "FSDP2xTP2": ["joint", "prompts"],
}
MORE_PARITY = {
    "FSDP4": MAIN_VARIANTS,
    "HSDP2x2": MAIN_VARIANTS,
    "FSDP2xTP2": MAIN_VARIANTS,
    "FSDP2xCP2": MAIN_VARIANTS,
    "TP2xCP2": MAIN_VARIANTS,
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


def test_activation_checkpointing_changes_nothing():
    assert_equal("FSDP2", ["joint", "decentralised"], **CHECKPOINTS["full"])
    assert_equal("TP2", ["joint"], **CHECKPOINTS["selective"])


def compare_compiled(layout, variant):
    worst = compare(layout, [variant], COMPILED)
    return worst[variant], counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("layout", ["FSDP2", pytest.param("TP2", marks=pytest.mark.slow)])
def test_blocks_of_experts_that_are_alike_share_their_graphs(layout):
    world = LAYOUTS[layout].world
    for (error, name), graphs in run_ranks(compare_compiled, world, layout, "joint", timeout=280):
        assert error < 1e-10, (name, error)
        # For the first number of images, and for any other.
        assert graphs <= 2
