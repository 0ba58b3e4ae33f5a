"""The two forms of context parallelism: what they exchange, and how they deal sequences out."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed.collectives import count
from tests.distributed.parity import LAYOUTS, SEQ, make_batch, make_runs, use_float64
from tests.gang import run_ranks
from torchtitan_mixtures.context_parallel import (
    WHOLE,
    heads_for_sequence,
    sequence_for_heads,
    shard_batch,
    shard_batch_for_ring,
)
from torchtitan_mixtures.models.common.rope import rotation_at

pytestmark = pytest.mark.distributed


def swap(kv_heads):
    """Swap this rank's part of known tensors there and back; return what arrives."""
    mesh = init_device_mesh("cpu", (4,))
    rank = mesh.get_local_rank()
    rng = torch.Generator().manual_seed(0)
    whole = [torch.randn(2, heads, 12, 3, generator=rng) for heads in (8, kv_heads, kv_heads)]
    parts = [x.chunk(4, dim=2)[rank] for x in whole]
    q, k, v = heads_for_sequence(*parts, mesh)
    back = sequence_for_heads(q, mesh)
    # As arrays: tensors would travel in shared memory, which ends with the rank.
    arrays = [x.numpy() for x in whole], [x.numpy() for x in (q, k, v)]
    return *arrays, torch.equal(back, parts[0])


@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1])
def test_each_rank_gets_whole_sequences_for_the_heads_that_go_together(kv_heads):
    for rank, (whole, received, returned) in enumerate(run_ranks(swap, 4, kv_heads)):
        assert returned
        q, k, v = received
        assert (q == whole[0][:, 2 * rank : 2 * rank + 2]).all()
        for x, original in ((k, whole[1]), (v, whole[2])):
            # As grouped-query attention pairs them: query head i goes with i // (heads per key).
            for local in range(2):
                pair = (2 * rank + local) * kv_heads // 8
                ours = x[:, local * x.shape[1] // 2]
                assert (ours == original[:, pair]).all()


def count_collectives():
    use_float64()
    args, run, _ = make_runs("CP2", "3 modalities", LAYOUTS["CP2"].dims())
    model = run.parts[0]
    for module in model.modules():  # of FSDP, which this layout has too, only the block's own
        if hasattr(module, "unshard"):
            module.unshard()
            module.set_reshard_after_forward(False)
            module.set_requires_gradient_sync(False)
    batch, _ = make_batch(args, "mixed")
    part = shard_batch(batch, run.dims.get_mesh("cp"))
    plan = model._plan(part["input"], part["modality_masks"])
    rotation = rotation_at(model.rope_table, SEQ // 2, part["positions"])
    x = torch.randn(sum(plan.sizes), args.dim, requires_grad=True)
    output, forward = count(lambda: model.layers["0"](x, rotation, None, plan))
    _, backward = count(lambda: output.sum().backward())
    return dict(forward), dict(backward)


def test_a_block_takes_two_all_to_alls_whatever_the_number_of_towers():
    for forward, backward in run_ranks(count_collectives, 2):
        assert forward == backward == {"all_to_all_single": 2}


def deal_out(kind):
    """This rank's part of a batch whose tensors all hold the place in the sequence."""
    mesh = init_device_mesh("cpu", (2,))
    places = torch.arange(8).expand(3, 8)
    names = ("input", "labels", "positions", "loss_weights", *WHOLE)
    tensors = {name: places for name in names}
    tensors["modality_masks"] = torch.stack([places, 100 + places], dim=1)
    if kind == "all_to_all":
        parts = shard_batch(tensors, mesh)
    else:
        parts, mask = shard_batch_for_ring(tensors, None, mesh, kind)
        assert mask is None
    return {name: part.numpy() for name, part in parts.items()}


@pytest.mark.parametrize(
    ("kind", "places"),
    [("all_to_all", [[0, 1, 2, 3], [4, 5, 6, 7]]), (None, [[0, 1, 2, 3], [4, 5, 6, 7]]),
     ("headtail", [[0, 1, 6, 7], [2, 3, 4, 5]])],
)  # fmt: skip
def test_all_tensors_of_a_batch_are_dealt_out_alike(kind, places):
    for expected, parts in zip(places, run_ranks(deal_out, 2, kind), strict=True):
        for name, part in parts.items():
            if name in WHOLE:
                assert part.shape == (3, 8)
            elif name == "modality_masks":
                assert part[1].tolist() == [expected, [100 + place for place in expected]]
            else:
                assert part.tolist() == [expected] * 3, name
