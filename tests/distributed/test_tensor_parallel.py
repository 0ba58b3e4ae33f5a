"""Tensor and sequence parallelism give the loss and every gradient of one process."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import loss_parallel
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import clip_grad_norm_
from torchtitan.protocols.train_spec import get_train_spec

from tests.gang import run_ranks
from tests.jobs import TRAIN_CONFIGS, debug_job, load_job
from torchtitan_mixtures.models.common.rope import rotation_at
from torchtitan_mixtures.objectives.next_token import NextTokenLoss, Targets
from torchtitan_mixtures.trainer import MixtureTrainer

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "TP2": (2, dict(tp=2)),
    "TP4": (4, dict(tp=4)),
    "FSDP2xTP2": (4, dict(dp_shard=2, tp=2)),
}

# Flavour, and what is changed in its arguments.
VARIANTS = {
    "2 modalities": ("debugmodel", {}),
    "3 modalities": ("debugmodel_3modality", {}),
    "dense": ("debugmodel_dense", {}),
    "post norm": ("debugmodel_post_norm", {}),
    "QK-norm, grouped queries": ("debugmodel", dict(qk_normalization=True, n_kv_heads=4)),
    "dense, QK-norm": ("debugmodel_dense", dict(qk_normalization=True)),
    "documents masked": ("debugmodel_flex_attn", {}),
    "grouped": ("debugmodel_3modality", dict(dispatch="grouped")),
    "attention tied": (
        "debugmodel", dict(untie_attention=False, qk_normalization=True, untie_final_norm=True)
    ),
    "norms and FFN tied": ("debugmodel", dict(untie_norm=False, untie_ffn=False)),
    "towers shared": ("debugmodel_3modality", dict(tower_of_modality=[0, 1, 0])),
}  # fmt: skip

# How many tokens of the last modality a batch has; None: of each about as many as chance will.
BATCHES = {"mixed": None, "none": 0, "one": 1, "all": -1}

ROWS, SEQ = 4, 60


def cases(variants, num_with_edges=1):
    """All batches of the first variants, and the mixed one of the others."""
    edges = [(variant, batch) for variant in variants[:num_with_edges] for batch in BATCHES]
    return edges + [(variant, "mixed") for variant in variants[num_with_edges:]]


def make_args(variant):
    flavor, changes = VARIANTS[variant]
    job = debug_job("mot", f"--model.flavor={flavor}", f"--training.seq_len={SEQ}")
    job.training.mixed_precision_param = job.training.mixed_precision_reduce = "float64"
    args = get_train_spec("mot").model_args[flavor]
    args.update_from_config(job)
    args.n_layers = 2
    for key, value in changes.items():
        setattr(args, key, value)
    args.check()
    return args, job


def make_batch(args, amount):
    """Random tokens, with a given number of tokens of the last modality.

    Modalities come from the masks here, so it does not matter which ids they have.
    """
    rng = torch.Generator().manual_seed(1)
    last = args.n_modalities - 1
    modalities = torch.randint(last + 1, (ROWS, SEQ), generator=rng)
    if amount == -1:
        modalities.fill_(last)
    elif amount is not None:
        modalities.clamp_(max=last - 1)
        modalities.view(-1)[17 : 17 + amount] = last
    masks = torch.nn.functional.one_hot(modalities, last + 1).bool().transpose(1, 2)
    tokens = torch.randint(args.total_vocab_size, (ROWS, SEQ), generator=rng)
    labels = torch.randint(args.total_vocab_size, (ROWS, SEQ), generator=rng)
    labels[torch.rand(ROWS, SEQ, generator=rng) < 0.2] = -100
    starts = torch.rand(ROWS, SEQ, generator=rng) < 0.1
    inputs = {"tokens": tokens, "modality_masks": masks, "document_ids": starts.cumsum(1)}
    return inputs, Targets(labels, torch.rand(ROWS, SEQ, generator=rng))


def build(args, job, dims, stage=None):
    spec = get_train_spec("mot")
    with torch.device("meta"):
        model = spec.model_cls(args)
    if stage == 0:
        del model.layers["1"]
        model.norm = model.output = None
    elif stage == 1:
        del model.layers["0"]
        model.tok_embeddings = None
    if dims is not None:
        model = spec.parallelize_fn(model, dims, job)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
    return model


def step(model, args, batch, *, part=slice(None), is_loss_parallel=False):
    """One forward and backward pass; return the loss, the meter, and all gradients, whole."""
    inputs, targets = batch
    loss_fn = NextTokenLoss(args.vocab_ranges, args.modality_names)
    model.zero_grad()
    with loss_parallel() if is_loss_parallel else nullcontext():
        pred = model(**{name: value[part] for name, value in inputs.items()})
        assert isinstance(pred, DTensor) == is_loss_parallel
        loss = loss_fn(pred, Targets(*(value[part] for value in targets)))
        assert not isinstance(loss, DTensor)
        loss.backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    return loss.detach(), loss_fn.meter.totals(torch.device("cpu")), gradients


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def make_dims(layout):
    world, degrees = LAYOUTS[layout]
    base = dict(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1)
    dims = ParallelDims(**(base | degrees), world_size=world)
    dims.build_mesh()
    return dims


def relative_error(found, expected):
    scale = float(expected.abs().max())
    return float((found - expected).abs().max()) / (scale or 1.0)


def compare(layout, wanted, is_loss_parallel):
    """For each case: the largest relative error against one process, and where it is."""
    TORCH_DTYPE_MAP["float64"] = torch.float64  # the host has no such option; errors show in it
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    dims, worst, models = make_dims(layout), {}, {}
    mesh = dims.get_optional_mesh("batch")
    ranks, rank = (1, 0) if mesh is None else (mesh.size(), mesh.get_local_rank())
    rows = ROWS // ranks
    for variant, batch in wanted:
        if variant not in models:
            args, job = make_args(variant)
            job.parallelism.tensor_parallel_degree = dims.tp
            job.parallelism.disable_loss_parallel = not is_loss_parallel
            models = {variant: (args, build(args, job, dims), build(args, job, None))}
        args, model, single = models[variant]
        inputs = make_batch(args, BATCHES[batch])
        expected = step(single, args, inputs)
        loss, meter, gradients = step(
            model, args, inputs,
            part=slice(rank * rows, (rank + 1) * rows), is_loss_parallel=is_loss_parallel,
        )  # fmt: skip
        if mesh is not None:
            dist.all_reduce(loss, group=mesh.get_group())
            dist.all_reduce(meter, group=mesh.get_group())
        errors = {
            "loss": relative_error(loss, expected[0]),
            "meter": relative_error(meter, expected[1]),
        }
        weights = dict(single.named_parameters())
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor), f"{name} is not on the mesh"
            assert torch.equal(whole(parameter), weights[name]), f"{name}: initial weights differ"
            errors[name] = relative_error(gradients[name], expected[2][name])
        assert len(gradients) == len(expected[2])
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        expected_norm = torch.nn.utils.get_total_norm(list(expected[2].values()))
        errors["norm"] = relative_error(whole(norm), expected_norm)
        worst[variant, batch] = max((error, name) for name, error in errors.items())
    return worst


def assert_small(results):
    for rank, worst in enumerate(results):
        for case, (error, name) in worst.items():
            assert error < 1e-10, (rank, case, name, error)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_every_gradient_equal_one_process(layout):
    wanted = cases(list(VARIANTS), 2) if layout == "TP2" else cases(list(VARIANTS)[:6])
    assert_small(run_ranks(compare, LAYOUTS[layout][0], layout, wanted, True))


def test_without_loss_parallel_nothing_else_changes():
    wanted = [("2 modalities", "mixed"), ("dense", "mixed")]
    assert_small(run_ranks(compare, 2, "TP2", wanted, False))


def step_twice(layout, *optimizers):
    """Clip and take two optimiser steps; return the largest relative errors of a weight."""
    return [_step_twice(layout, optimizer) for optimizer in optimizers]


def _step_twice(layout, optimizer):
    torch.set_default_dtype(torch.float64)
    TORCH_DTYPE_MAP["float64"] = torch.float64
    torch.manual_seed(0)
    dims = make_dims(layout)
    args, job = make_args("QK-norm, grouped queries")
    job.parallelism.tensor_parallel_degree = dims.tp
    models = build(args, job, dims), build(args, job, None)
    mesh = dims.get_optional_mesh("batch")
    ranks, rank = (1, 0) if mesh is None else (mesh.size(), mesh.get_local_rank())
    rows = ROWS // ranks
    parts = slice(rank * rows, (rank + 1) * rows), slice(None)
    for model, part in zip(models, parts, strict=True):
        # A large epsilon: with a small one Adam's first steps are the signs of the gradients, and
        # any error of their size would go unnoticed.
        steps = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1.0, **optimizer)
        for _ in range(2):
            step(
                model, args, make_batch(args, None), part=part, is_loss_parallel=model is models[0]
            )
            clip_grad_norm_(list(model.parameters()), 1.0, foreach=True)
            steps.step()
    for parameter in models[0].parameters():
        local = parameter.to_local()
        if parameter.placements == (Replicate(),):
            other = local.detach().clone()
            dist.broadcast(other, src=0)
            assert torch.equal(local, other), "ranks disagree about a replicated weight"
    expected = dict(models[1].named_parameters())
    initial = dict(build(args, job, None).named_parameters())
    errors = {}
    for name, p in models[0].named_parameters():
        start = initial[name].detach()
        errors[name] = relative_error(whole(p).detach() - start, expected[name].detach() - start)
    return max((error, name) for name, error in errors.items())


def compare_two_stages():
    """The largest relative error of a gradient where activations leave one stage for another."""
    torch.set_default_dtype(torch.float64)
    args, job = make_args("2 modalities")
    job.parallelism.tensor_parallel_degree = 2
    inputs, targets = make_batch(args, None)
    *_, expected = step(build(args, job, None), args, (inputs, targets))
    first, second = (build(args, job, make_dims("TP2"), stage) for stage in (0, 1))
    activations = first(**inputs)
    received = activations.detach().requires_grad_()
    *_, gradients = step(
        second, args, (inputs | {"tokens": received}, targets), is_loss_parallel=True
    )
    activations.backward(received.grad)
    gradients |= {name: whole(p.grad) for name, p in first.named_parameters()}
    assert len(gradients) == len(expected)
    return max(relative_error(gradients[name], expected[name]) for name in expected)


def test_pipeline_stages_exchange_whole_activations():
    assert max(run_ranks(compare_two_stages, 2)) < 1e-10


@pytest.mark.parametrize("layout", ["TP2", "FSDP2xTP2"])
def test_clipping_and_the_optimiser_know_all_of_a_gradient(layout):
    optimizers = dict(foreach=True), dict(fused=True)
    for errors in run_ranks(step_twice, LAYOUTS[layout][0], layout, *optimizers):
        assert all(error < 1e-9 for error, _ in errors), errors


WRAPPER = "_wrap_tensor_autograd"  # communicates nothing


class Collectives(TorchDispatchMode):
    """Counts collectives. PyTorch's `CommDebugMode` fails on a second use in one process."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # comes back as operators on plain tensors
        name = func.__name__.split(".")[0]
        if func.namespace == "_c10d_functional" and name not in ("wait_tensor", WRAPPER):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count(function):
    """Run a function; return its result, its all-gathers, reduce-scatters and all else."""
    with Collectives() as mode:
        result = function()
    counts = mode.counts
    gathers, scatters = counts["all_gather_into_tensor"], counts["reduce_scatter_tensor"]
    return result, (gathers, scatters, counts.total() - gathers - scatters)


def count_collectives(variant):
    """What `count` counts of each part, forward and backward."""
    args, job = make_args(variant)
    job.parallelism.tensor_parallel_degree = 2
    model = build(args, job, make_dims("TP2"))
    inputs, targets = make_batch(args, None)
    plan = model._plan(inputs["tokens"], inputs["modality_masks"])
    rotation = rotation_at(model.rope_table, SEQ, None)
    shape = (ROWS, SEQ // 2, args.dim) if plan is None else (sum(plan.sizes) // 2, args.dim)
    block, x = model.layers["0"], torch.randn(*shape, requires_grad=True)
    counts = {}
    for name, part, arguments in (
        ("attention", block.attention, (x, rotation, None, plan)),
        ("feed_forward", block.feed_forward, (x, plan)),
        ("block", block, (x, rotation, None, plan)),
    ):
        output, forward = count(lambda part=part, arguments=arguments: part(*arguments))
        _, backward = count(lambda output=output: output.sum().backward())
        counts[name] = (forward, backward)
    with loss_parallel():
        loss_fn = NextTokenLoss(args.vocab_ranges, args.modality_names)
        loss, forward = count(lambda: loss_fn(model(**inputs), targets))
        _, backward = count(loss.backward)
    counts["model"] = (forward, backward)
    return counts


@pytest.mark.parametrize("variant", ["3 modalities", "dense", "grouped"])
def test_a_sub_layer_takes_one_all_gather_and_one_reduce_scatter(variant):
    for counts in run_ranks(count_collectives, 2, variant):
        assert counts["attention"] == counts["feed_forward"] == ((1, 1, 0), (1, 1, 0))
        assert counts["block"] == ((2, 2, 0), (2, 2, 0))
        # Two blocks, the embedding's reduce-scatter, the all-gather before the head, and three
        # reductions over the vocabulary, of one number a position.
        assert counts["model"] == ((5, 5, 3), (5, 5, 0))


def record(config, *overrides):
    """Train; return every scalar of every step that does not depend on the machine's speed."""
    job = load_job(TRAIN_CONFIGS / "mot" / config, *overrides)
    trainer = MixtureTrainer(job)
    scalars = {}

    def log(values, step):
        for name, value in values.items():
            if not name.startswith(("throughput", "tflops", "time_metrics", "memory", "mfu")):
                scalars[step, name] = value

    trainer.metrics_processor.logger.log = log
    trainer.train()
    trainer.close()
    return scalars


SHORT = (
    "--training.seq_len=128", "--metrics.no_enable_tensorboard", "--metrics.log_freq=1",
    "--checkpoint.no_enable", "--lr_scheduler.warmup_steps=1",
)  # fmt: skip


def test_a_compiled_run_on_two_ranks_takes_the_steps_of_one_process(tmp_path):
    options = (
        *SHORT, "--training.steps=3", "--training.local_batch_size=2",
        "--training.global_batch_size=4", "--validation.enable", "--validation.freq=1",
        "--validation.steps=1", "--validation.local_batch_size=1", "--validation.seq_len=128",
    )  # fmt: skip
    (expected,) = run_ranks(
        record, 1, "debugmodel.toml", *options, f"--job.dump_folder={tmp_path}/1", init=False
    )
    first, second = run_ranks(
        record, 2, "debugmodel.toml", *options, f"--job.dump_folder={tmp_path}/2",
        "--parallelism.tensor_parallel_degree=2", "--compile.enable",
        "--compile.backend=aot_eager", init=False,
    )  # fmt: skip
    assert first == second
    assert first == pytest.approx(expected, rel=1e-3)
    assert {(3, "grad_norm/image"), (3, "modality/image/loss")} <= set(first)
    assert any(name.startswith("validation/") for _, name in first)


def test_the_layout_of_the_8b_configuration_works(tmp_path):
    options = (
        *SHORT, "--model.flavor=debugmodel", "--training.seq_len=272", "--training.steps=2",
        "--training.mixed_precision_param=float32", "--debug.seed=3",
    )  # fmt: skip
    (expected,) = run_ranks(
        record, 1, "8B_2modality.toml", *options, f"--job.dump_folder={tmp_path}/1",
        "--parallelism.tensor_parallel_degree=1", "--compile.no_enable", init=False,
    )  # fmt: skip
    records = run_ranks(
        record, 4, "8B_2modality.toml", *options, f"--job.dump_folder={tmp_path}/4",
        "--parallelism.tensor_parallel_degree=4", "--compile.backend=aot_eager", init=False,
    )  # fmt: skip
    assert records.count(records[0]) == 4
    assert records[0] == pytest.approx(expected, rel=1e-3)
