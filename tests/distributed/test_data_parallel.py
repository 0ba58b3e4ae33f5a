"""FSDP2, HSDP and DDP give the loss and every gradient of one process, with batches of the loader.

`test_parity.py` asks `mot` for this under all layouts, with further variants and batches,
`test_mom_parity.py` asks `mom`.
"""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from tests.gang import run_ranks
from tests.jobs import debug_job

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "FSDP2": (2, dict(dp_shard=2)),
    "FSDP4": (4, dict(dp_shard=4)),
    "HSDP2x2": (4, dict(dp_replicate=2, dp_shard=2)),
    "DDP2": (2, dict(dp_replicate=2)),
}


SEQUENCES = 8


def build_job(family, flavor):
    return debug_job(
        family, f"--model.flavor={flavor}", "--training.seq_len=128",
        f"--training.local_batch_size={SEQUENCES}",
    )  # fmt: skip


def whole_batch(job):
    """The sequences of one step; every layout cuts the same ones."""
    spec = get_train_spec(job.model.name)
    tokenizer = spec.build_tokenizer_fn(job)
    loader = spec.build_dataloader_fn(
        dp_world_size=1, dp_rank=0, tokenizer=tokenizer, job_config=job
    )
    return next(iter(loader))


def without_images(input_dict, rows):
    """Make these sequences pure text; the labels stay, they are only numbers here."""
    masks = input_dict["modality_masks"]
    masks[rows, 0], masks[rows, 1:] = True, False
    tokens = input_dict["input"]
    tokens[rows] = tokens[rows].clamp(max=2047)
    input_dict["image_ids"][rows] = -1


def step(job, dims, rank, world, emptied):
    """One forward and backward pass in float64; return the loss and all gradients, whole."""
    spec = get_train_spec(job.model.name)
    args = spec.model_args[job.model.flavor]
    args.update_from_config(job)
    with torch.device("meta"):
        model = spec.model_cls(args)
    if dims is not None:
        model = spec.parallelize_fn(model, dims, job)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
    input_dict, labels = whole_batch(job)
    without_images(input_dict, emptied)
    count = (labels != -100).sum()
    rows = len(labels) // world
    mine = slice(rank * rows, (rank + 1) * rows)
    extra = {k: v[mine] for k, v in input_dict.items() if k not in ("input", "loss_weights")}
    gradients = {}
    # Two microbatches, so that accumulation is covered too.
    loss = torch.zeros((), dtype=torch.float64)
    for part in torch.arange(rows).chunk(2 if rows > 1 else 1):
        pred = model(input_dict["input"][mine][part], **{k: v[part] for k, v in extra.items()})
        micro = cross_entropy_sum(pred, labels[mine][part]) / count
        micro.backward()
        loss += micro.detach()
    weights = {}
    for name, p in model.named_parameters():
        weights[name] = p.full_tensor() if isinstance(p, DTensor) else p.detach()
        grad = p.grad
        gradients[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return loss, gradients, weights


def cross_entropy_sum(pred, labels):
    """In float64, which the objective's own (float32 by design) is not."""
    return torch.nn.functional.cross_entropy(
        pred.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100
    )


def compare(family, flavor, layout, emptied):
    """On each rank: the largest relative error against one process, and where it is."""
    world, degrees = LAYOUTS[layout]
    TORCH_DTYPE_MAP["float64"] = torch.float64  # the host has no such option; errors show in it
    torch.set_default_dtype(torch.float64)
    job = build_job(family, flavor)
    job.training.mixed_precision_param = job.training.mixed_precision_reduce = "float64"
    base = dict(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1)
    dims = ParallelDims(**(base | degrees), world_size=world)
    dims.build_mesh()
    torch.manual_seed(0)
    loss, gradients, weights = step(job, dims, torch.distributed.get_rank(), world, emptied)
    torch.distributed.all_reduce(loss)
    expected_loss, expected, expected_weights = step(job, None, 0, 1, emptied)
    errors = {"loss": abs(float(loss - expected_loss)) / abs(float(expected_loss))}
    for name, gradient in gradients.items():
        assert torch.equal(weights[name], expected_weights[name]), f"{name}: initial weights differ"
        scale = float(expected[name].abs().max())
        errors[name] = float((gradient - expected[name]).abs().max()) / (scale or 1.0)
    assert len(gradients) == len(expected)
    return max(errors.values()), max(errors, key=lambda name: errors[name])


@pytest.mark.parametrize("family", ["mot"])
@pytest.mark.parametrize(
    ("layout", "without_images"),
    [("FSDP2", "one_rank"), ("HSDP2x2", "one_rank"), ("DDP2", "one_rank"), ("FSDP2", "no_rank"),
     ("FSDP2", "all_ranks"), pytest.param("FSDP4", "one_rank", marks=pytest.mark.slow)],
)  # fmt: skip
def test_loss_and_every_gradient_equal_one_process(family, layout, without_images):
    world = LAYOUTS[layout][0]
    rows = {"no_rank": 0, "one_rank": SEQUENCES // world, "all_ranks": SEQUENCES}[without_images]
    worst = run_ranks(compare, world, family, "debugmodel", layout, list(range(rows)))
    assert max(error for error, _ in worst) < 1e-10, worst
