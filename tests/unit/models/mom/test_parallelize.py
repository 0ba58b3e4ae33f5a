"""What a MoM declares to parallelism: which degrees it takes, and what checkpointing saves."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.config.job_config import ActivationCheckpoint

from tests.jobs import debug_job
from tests.unit.models.mom.helpers import build, random_inputs, tiny_args
from torchtitan_mixtures.activation_checkpoint import (
    MATRIX_PRODUCTS,
    SAVED_OPS,
    checkpoint_blocks,
)
from torchtitan_mixtures.checks import check_job
from torchtitan_mixtures.layout_checks import check_layout
from torchtitan_mixtures.models.mom import mom_args
from torchtitan_mixtures.models.mom.parallelize import CUTS

TP = "--parallelism.tensor_parallel_degree"
CP = "--parallelism.context_parallel_degree"
PP = "--parallelism.pipeline_parallel_degree"
DIT = "--model.flavor=debugmodel_dit"

IMPOSSIBLE = [
    (3, [f"{TP}=3"], r"tensor_parallel_degree = 3: .*'debugmodel' has 128 channels and 512 hidden "
                     r"units of the feed-forward network and 512 hidden units of a channel mixer "
                     r"and 64 positions \(multimodal\.image_size\)"),
    (8, [f"{TP}=8", DIT], r"has 4 heads, which it does not divide\. Possible here: 1, 2, 4\."),
    (32, [f"{TP}=32", "--multimodal.image_size=16"],
     r"has 16 positions \(multimodal\.image_size\), which it does not divide"),
    (32, [f"{TP}=16", f"{CP}=2", "--multimodal.image_size=16"],
     r"has 8 positions \(multimodal\.image_size, in 2 parts\), which"),
    (3, [f"{CP}=3"], r"context_parallel_degree = 3: .* has 128 channels and 64 positions \(multi"),
    (8, [f"{CP}=4", f"{TP}=2", DIT],
     r"has 2 heads on each of 2 ranks of tensor parallelism, which it does not divide"),
    (2, [f"{CP}=2", "--mixture.context_parallel=ring"], r'mixture\.context_parallel = .ring.: '),
    (2, [f"{PP}=2"], r"pipeline_parallel_degree = 2: mom does not support it; set it to 1"),
]  # fmt: skip


@pytest.mark.parametrize(("world", "overrides", "message"), IMPOSSIBLE)
def test_an_impossible_layout_is_refused(world, overrides, message, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=message):
        check_job(debug_job("mom", f"--job.dump_folder={tmp_path}", *overrides))


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (8, [f"{TP}=4", f"{CP}=2"]),
        (8, [f"{TP}=2", f"{CP}=2", DIT]),
        (4, [f"{CP}=4", "--training.seq_len=7", "--validation.seq_len=5"]),  # not read
    ],
)
def test_a_possible_layout_is_let_through(world, overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    check_job(debug_job("mom", f"--job.dump_folder={tmp_path}", *overrides))


def test_there_is_no_ring_even_where_nothing_else_refuses_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    job = debug_job("mom", f"{CP}=2", "--mixture.context_parallel=ring")
    with pytest.raises(ValueError, match=r'"ring": mom does not support it; set "all_to_all"'):
        check_layout(job, mom_args["debugmodel"])


class Products(TorchDispatchMode):
    """Records with which weights products are made."""

    def __init__(self, model):
        super().__init__()
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim > 1}
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in MATRIX_PRODUCTS:
            right = args[2 if func is torch.ops.aten.addmm.default else 1].mT
            for name, weight in self.weights.items():
                if weight.shape == right.shape and torch.equal(weight, right):
                    self.names[name] += 1
        return func(*args, **(kwargs or {}))


def checkpoint(model, **keys):
    config = ActivationCheckpoint(mode="selective", selective_ac_option="op", **keys)
    products = CUTS.products(model.model_args)
    checkpoint_blocks(model, config, SAVED_OPS, products, compiled=False, base_folder="")


def computed_again(model):
    """Projections of the first block that are computed again in the backward pass."""
    products = Products(model)
    loss = model(*random_inputs(model.model_args)).prediction.square().mean()
    with products:
        loss.backward()
    prefix = "layers.0._checkpoint_wrapped_module."
    assert set(products.names.values()) <= {1}
    return {name.removeprefix(prefix) for name in products.names if name.startswith(prefix)}


# Of modulation, mixers or attention, and feed-forward network every second projection.
AGAIN = {
    "typed": {"mixer.channel_mixers.w1", "mixer.token_mixers.w1", "feed_forward.w1.weight"},
    "token mixers alone": {"mixer.token_mixers.w1", "feed_forward.w1.weight"},
    "DiT": {"attention.wq.weight", "attention.wv.weight", "feed_forward.w1.weight"},
}
FIELDS = {
    "typed": {},
    "token mixers alone": dict(num_channel_experts=0, min_channel_experts=0),
    "DiT": dict(mixer="attention"),
}


@pytest.mark.parametrize("variant", AGAIN)
def test_selective_checkpointing_saves_every_second_projection(variant):
    model = build(tiny_args(**FIELDS[variant]))
    checkpoint(model)
    assert computed_again(model) == AGAIN[variant]


def test_stacked_weights_can_be_named_to_be_computed_again():
    model = build(tiny_args())
    checkpoint(model, per_op_sac_force_recompute_mm_shapes_by_fqns=["channel_mixers.w2"])
    # Left to count are modulation, w1 of channels, w1 and w2 of tokens, and two more.
    assert computed_again(model) == {
        "mixer.channel_mixers.w1", "mixer.channel_mixers.w2", "mixer.token_mixers.w2",
        "feed_forward.w2.weight",
    }  # fmt: skip
