"""MMDiT under every layout: the loss and every gradient of one process.

Each step is of two microbatches of differently shaped images, so that gradients are accumulated and
streams change their lengths under every layout too.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from tests.distributed.collectives import count
from tests.distributed.mmdit_parity import (
    VARIANTS,
    compare,
    make_args,
    make_batches,
    make_job,
    make_runs,
)
from tests.distributed.mom_parity import CHECKPOINTS, COMPILED
from tests.distributed.parity import LAYOUTS, Layout, use_float64
from tests.gang import run_ranks
from tests.rows import quick
from torchtitan_mixtures.layout_checks import check_layout
from torchtitan_mixtures.objectives.conditions import PROMPT

pytestmark = pytest.mark.distributed

EVEN = [variant for variant in VARIANTS if not variant.startswith("odd")]
"""Variants whose parts two or four ranks can share without filling them up."""

PARITY = {
    "FSDP2": ["tokens", "embeddings", "everything"],
    "FSDP4": ["everything"],
    "HSDP2x2": ["3 modalities"],
    "DDP2": ["tokens", "embeddings", "everything"],
    "TP2": list(VARIANTS),
    "TP4": ["odd, everything"],
    "CP2": EVEN,
    "CP4": ["tokens", "everything"],
    "FSDP2xTP2": ["embeddings", "odd, everything"],
    "FSDP2xCP2": ["embeddings", "everything"],
    "TP2xCP2": ["single stream, registers", "everything", "odd halves"],
}
MORE_PARITY = {
    "FSDP4": EVEN,
    "DDP2": EVEN,
    "DDP2xCP2": ["tokens", "everything"],
    "TP4": list(VARIANTS),
    "CP4": EVEN,
    "FSDP2xTP2xCP2": ["embeddings", "odd halves"],
}


def assert_equal(layout, variants, **options):
    for worst in run_ranks(compare, LAYOUTS[layout].world, layout, variants, options, timeout=280):
        for variant, (error, name) in worst.items():
            assert error < 1e-10, (variant, name, error)


@pytest.mark.parametrize("layout", quick([name for name in PARITY if "4" not in name], PARITY))
def test_loss_and_every_gradient_equal_one_process(layout):
    assert_equal(layout, PARITY[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", MORE_PARITY)
def test_loss_and_every_gradient_equal_one_process_in_further_layouts(layout):
    assert_equal(layout, MORE_PARITY[layout])


CHECKPOINTED = {
    "FSDP2": ["everything", "single stream"],
    "TP2": ["odd", "odd, everything", "4 static streams"],
    "CP2": ["tokens", "everything"],
}
CHECKPOINT_CASES = [
    *((layout, "selective") for layout in CHECKPOINTED),
    *(pytest.param(layout, "full", marks=pytest.mark.slow) for layout in CHECKPOINTED),
]


@pytest.mark.parametrize(("layout", "kind"), CHECKPOINT_CASES)
def test_activation_checkpointing_changes_nothing(layout, kind):
    assert_equal(layout, CHECKPOINTED[layout], **CHECKPOINTS[kind])


# Of blocks of two kinds (the last makes nothing of prompts), for the first shape and then for any;
# where the first block gets a view of what an embedder computes, for that and others.
GRAPHS = {"one shape": (2,), "odd": (4,), "tokens": (4, 5), "everything": (4, 5)}
MORE_COMPILED = {"FSDP2": "tokens", "TP2": "odd", "CP2": "everything", "TP2xCP2": "tokens"}
COMPILED_CASES = [
    ("FSDP2", "one shape", "selective"),
    pytest.param("TP2", "odd", "selective", marks=pytest.mark.slow),
    pytest.param("CP2", "one shape", "selective", marks=pytest.mark.slow),
    *(pytest.param(*case, kind, marks=pytest.mark.slow)
      for case in MORE_COMPILED.items() for kind in ("none", "full")),
]  # fmt: skip


def compare_compiled(layout, variant, options):
    worst = compare(layout, [variant], options)
    return worst[variant], counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("layout", "variant", "kind"), COMPILED_CASES)
def test_blocks_are_compiled_whole_and_compute_the_same(layout, variant, kind):
    world, options = LAYOUTS[layout].world, COMPILED | CHECKPOINTS[kind]
    results = run_ranks(compare_compiled, world, layout, variant, options, timeout=280)
    for (error, name), graphs in results:
        assert error < 1e-10, (name, error)
        assert graphs in GRAPHS[variant]


def prompts_of(batch):
    return {k.removeprefix(PROMPT): x for k, x in batch.items() if k.startswith(PROMPT)}


def gradients_by_what_is_kept(layout, variant):
    """For all prompts, none, or no choice: parameters without a gradient."""
    use_float64()
    run, _ = make_runs(layout, variant, LAYOUTS[layout].dims(), {})
    run.draw_weights()
    batch, missing = make_batches(run.args, variant)[0], []
    everything = torch.ones(len(batch["input"]), run.args.num_encoders, dtype=torch.bool)
    for kept in (None, everything, ~everything, None):
        run.model.zero_grad()
        output = run.model(batch["input"].double(), torch.rand(4), prompts_of(batch), kept)
        output.prediction.square().sum().backward()
        missing += [name for name, p in run.parameters().items() if p.grad is None]
    return missing


@pytest.mark.parametrize("variant", ["tokens", "embeddings"])
def test_every_parameter_gets_a_gradient_whatever_is_kept_of_prompts(variant):
    # DDP would wait for one that does not.
    assert run_ranks(gradients_by_what_is_kept, 2, "DDP2", variant) == [[], []]


def count_collectives(layout, variant):
    """What the first and the last block send, forward and backward."""
    use_float64()
    run, _ = make_runs(layout, variant, LAYOUTS[layout].dims(), {})
    given, counts = [], []
    blocks = [run.model.layers[layer] for layer in ("0", str(run.args.n_layers - 1))]
    hooks = [b.register_forward_pre_hook(lambda _, inputs: given.append(inputs)) for b in blocks]
    batch = make_batches(run.args, variant)[0]
    run.model(batch["input"].double(), torch.rand(4), prompts_of(batch))
    for block, hook, (streams, condition) in zip(blocks, hooks, given, strict=True):
        hook.remove()
        streams = {name: x.detach().requires_grad_() for name, x in streams.items()}
        condition = condition.detach().requires_grad_()
        output, forward = count(lambda: block(streams, condition))  # noqa: B023
        total = torch.stack([x.sum() for x in output.values()]).sum()
        _, backward = count(total.backward)
        counts.append((dict(forward), dict(backward)))
    return counts


ALL_GATHER, REDUCE_SCATTER = "all_gather_into_tensor", "reduce_scatter_tensor"


@pytest.mark.parametrize(("variant", "streams"), [("odd", 2), ("odd, everything", 3)])
def test_tensor_parallelism_gathers_and_scatters_once_for_each_sub_layer_and_stream(
    variant, streams
):
    for first, last in run_ranks(count_collectives, 2, "TP2", variant):
        # Modulation, attention, and feed-forward network of each; the first needs no sum.
        assert first == (
            {ALL_GATHER: 3 * streams, REDUCE_SCATTER: 2 * streams},
            {ALL_GATHER: 2 * streams, REDUCE_SCATTER: 3 * streams},
        )
        # Only the image's stream is put out.
        assert last == (
            {ALL_GATHER: 2 * streams + 1, REDUCE_SCATTER: 2},
            {ALL_GATHER: 2, REDUCE_SCATTER: 2 * streams + 1},
        )


@pytest.mark.parametrize("variant", ["tokens", "everything"])
def test_context_parallelism_swaps_twice_for_all_streams_together(variant):
    for counts in run_ranks(count_collectives, 2, "CP2", variant):
        assert counts == [({"all_to_all_single": 2}, {"all_to_all_single": 2})] * 2


def check(degrees, variant, **changes):
    job, args = make_job(Layout(degrees)), make_args(variant)
    for key, value in changes.items():
        setattr(job.multimodal, key, value)
    check_layout(job, args)


def test_lengths_that_ranks_cannot_share_are_refused_by_name(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"context_parallel_degree = 2: .* 7 of the prompt 'text'"):
        check({"cp": 2}, "odd")
    with pytest.raises(ValueError, match="3 of the registers of image"):
        check({"cp": 2}, "odd, single stream")
    check({"cp": 2}, "tokens", aspect_ratios=["1:1", "2:1"])
    with pytest.raises(ValueError, match="15 of images of 4:3"):
        check({"cp": 2}, "tokens", aspect_ratios=["1:1", "4:3"])
    check({"tp": 2}, "odd", aspect_ratios=["1:1", "4:3"])


def test_heads_and_channels_that_ranks_cannot_share_are_refused_by_name(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match=r"tensor_parallel_degree = 8: .* has 4 heads"):
        check({"tp": 8}, "3 modalities")
    with pytest.raises(ValueError, match="heads on each of 4 ranks of tensor parallelism"):
        check({"tp": 4, "cp": 2}, "tokens")
