"""What a parallel layout computes of a model of images against one process, in float64.

As `parity.py` does it for models over tokens. Weights are drawn again after their initial values
were compared: those are zero in so many places that most gradients would be.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import clip_grad_norm_
from torchtitan.protocols.train_spec import get_train_spec

from tests.distributed.parity import KEYS, LAYOUTS, Layout, relative_error, use_float64, whole
from tests.jobs import debug_job
from torchtitan_mixtures.checks import CHECKED
from torchtitan_mixtures.layout_checks import check_layout
from torchtitan_mixtures.metrics import reduce_meter
from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.mom.args import MoMModelArgs
from torchtitan_mixtures.objectives.denoising import (
    DenoisingLoss,
    build_condition,
    build_process,
)

FREE = dict(min_token_experts=0, min_channel_experts=0)

# What is changed in a model's arguments.
VARIANTS: dict[str, dict[str, Any]] = {
    "typed": {},
    "free": FREE,
    "DiT": dict(mixer="attention"),
    "top 1": dict(top_k=1, **FREE),
    "typed, two more": dict(top_k=4),
    "router noise": dict(router_noise=0.5),
    "fixed variance": dict(learned_variance=False),
    "token mixers alone": dict(num_channel_experts=0, min_channel_experts=0),
    "channel mixers alone": dict(num_token_experts=0, min_token_experts=0),
    "two of a kind": dict(num_token_experts=2, num_channel_experts=2),
}

MICROBATCH, MICROBATCHES = 4, 2


def checkpointed(mode: str, option: str = "op") -> dict[str, str]:
    """Keys of a kind of activation checkpointing."""
    return {
        "activation_checkpoint.mode": mode,
        "activation_checkpoint.selective_ac_option": option,
    }


# Keys of a job that saves activations in part, or compiles its blocks.
CHECKPOINTS = {
    "none": {},
    "full": checkpointed("full"),
    "selective": checkpointed("selective"),
    "every second": checkpointed("selective", "2"),
}
COMPILED = {"compile.enable": True, "compile.backend": "aot_eager"}


@cache
def _base_job() -> Any:
    """Parsed once for each process: it takes longer than a step."""
    return debug_job(
        "mom", "--objective.class_dropout=0.3", "--objective.balance_weight=0.5",
        "--objective.z_weight=0.1",
    )  # fmt: skip


def make_job(layout: Layout) -> Any:
    """The configuration of a job that runs a layout."""
    return lay_out(_base_job(), layout, MICROBATCH)


def lay_out(base_job: Any, layout: Layout, microbatch: int) -> Any:
    """A copy of a job that runs a layout in float64, so many images in all at a time."""
    job = deepcopy(base_job)
    job.training.mixed_precision_param = job.training.mixed_precision_reduce = "float64"
    ranks = layout.degrees.get("dp_replicate", 1) * layout.degrees.get("dp_shard", 1)
    job.training.local_batch_size = microbatch // ranks
    job.parallelism.data_parallel_shard_degree = 1
    for name, degree in layout.degrees.items():
        setattr(job.parallelism, KEYS[name], degree)
    setattr(job, CHECKED, True)
    return job


def make_args(variant: str) -> MoMModelArgs:
    """The arguments of a variant of two narrow layers and 16 tokens."""
    sizes: dict[str, Any] = dict(dim=32, n_layers=2, n_heads=4, patch_size=2, image_size=8)
    sizes |= dict(in_channels=2, num_classes=5, num_timestep_features=16, init_seed=3)
    return MoMModelArgs(**(sizes | VARIANTS[variant]))


def make_batches(args: MoMModelArgs) -> list[dict[str, torch.Tensor]]:
    """Random images, as the loader yields them."""
    rng = torch.Generator().manual_seed(1)
    batches = []
    for index in range(MICROBATCHES):
        shape = (MICROBATCH, args.in_channels, args.image_size, args.image_size)
        batches.append({
            "input": torch.rand(shape, generator=rng, dtype=torch.float32) * 2 - 1,
            "class_labels": torch.randint(args.num_classes, (MICROBATCH,), generator=rng),
            "sample_index": torch.arange(MICROBATCH) + index * MICROBATCH,
        })  # fmt: skip
    return batches


class Run:
    """A model, under a layout or untouched, and a step of the trainer with it."""

    family = "mom"
    microbatch = MICROBATCH

    def __init__(self, is_parallel: bool, job: Any, args: Any, dims: ParallelDims) -> None:
        self.job, self.dims, self.args = job, dims, args
        spec = get_train_spec(self.family)
        with torch.device("meta"):
            model: Any = spec.model_cls(args)
        model.to(torch.float64)  # some parts are float32 whatever the default is
        if is_parallel:
            model = spec.parallelize_fn(model, dims, job)
        model.to_empty(device="cpu")
        with torch.no_grad():
            model.init_weights(buffer_device=torch.device("cpu"))
        self.model = model
        self.loss_fn: Any = self.make_loss()

    def make_loss(self) -> Any:
        """The objective."""
        process = build_process(self.job.objective, self.args.in_channels)
        process.learned_variance = self.args.learned_variance
        return DenoisingLoss(
            process,
            self.args,
            self.job.objective,
            build_condition(self.job, self.args),
            seed=7,
            sample_mesh=lambda: self.mesh("batch"),
        )

    def loss(self, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        """The sum of the losses of a microbatch of this rank."""
        labels = torch.zeros(len(rows["input"]), self.args.num_tokens, dtype=torch.int64)
        inputs, targets, extra, _ = self.loss_fn.prepare(
            self.model, None, rows, labels, self.dims, self.job
        )
        # Draws are float32 whatever the default is.
        targets = targets._replace(clean=targets.clean.double(), noise=targets.noise.double())
        return self.loss_fn(self.model(inputs.double(), **extra), targets)

    def start_step(self) -> None:
        """Let the objective forget what it noted before."""
        self.loss_fn.reset()

    @property
    def positions(self) -> int:
        """Supervised positions of an image."""
        return self.args.num_tokens

    def mesh(self, name: str) -> Any:
        """A mesh of the layout; None where it is of one rank."""
        if self.dims.world_size == 1:
            return None
        if name == "batch" and not self.dims.dp_enabled:
            return None
        return self.dims.get_optional_mesh(name)

    def draw_weights(self) -> None:
        """Replace the initial weights, the same in all layouts."""
        with torch.no_grad(), init.parameter_names(self.model, 5):
            for parameter in self.model.parameters():
                init.normal_(parameter, std=0.3)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All parameters, by name."""
        return {
            name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", ""): parameter
            for name, parameter in self.model.named_parameters()
        }

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of this data-parallel rank."""
        mesh = self.mesh("batch")
        return tensor if mesh is None else tensor.chunk(mesh.size())[mesh.get_local_rank()]

    def backward(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Run forward and backward with every microbatch; return the loss over all ranks."""
        self.start_step()
        self.model.zero_grad()
        total = torch.zeros(())
        count = len(batches) * self.microbatch * self.positions
        for batch in batches:
            loss = self.loss({name: self.share(tensor) for name, tensor in batch.items()}) / count
            loss.backward()
            total += loss.detach()
        mesh = self.mesh("loss")
        if mesh is not None:
            dist.all_reduce(total, group=mesh.get_group())
        return total

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clip all gradients; return their norm before."""
        return whole(clip_grad_norm_(list(self.model.parameters()), max_norm, foreach=True))


def make_runs(
    layout_name: str, variant: str, dims: ParallelDims, options: dict[str, Any]
) -> list[Run]:
    """The parallel run, with further keys of the job, and one process's."""
    job, args = make_job(LAYOUTS[layout_name]), make_args(variant)
    for path, value in options.items():
        section, _, key = path.partition(".")
        setattr(getattr(job, section), key, value)
    check_layout(job, args)
    ones = dict(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1)
    single = Run(False, make_job(Layout({})), args, ParallelDims(**ones, world_size=1))
    return [Run(True, job, args, dims), single]


def errors_of_a_step(
    run: Run, single: Run, batches: list[dict[str, torch.Tensor]]
) -> dict[str, float]:
    """Compare initial weights; then loss, what is reported of it, gradients and their norm."""
    weights = single.parameters()
    assert run.parameters().keys() == weights.keys()
    for name, parameter in run.parameters().items():
        assert torch.equal(whole(parameter), weights[name]), f"{name}: initial weights differ"
    run.draw_weights()
    single.draw_weights()
    errors = {"loss": relative_error(run.backward(batches), single.backward(batches))}
    errors |= _errors_of_metrics(run, single)
    for name, parameter in run.parameters().items():
        assert parameter.grad is not None, name
        expected = weights[name].grad
        assert expected.count_nonzero() > 0, f"{name}: has no gradient"
        errors[name] = relative_error(whole(parameter.grad), expected)
        if name.endswith("wk.bias"):  # changes nothing: its gradient is zero but for rounding
            scale = weights[name.replace("bias", "weight")].grad.abs().max()
            errors[name] = float((whole(parameter.grad) - expected).abs().max() / scale)
    errors["norm"] = relative_error(run.clip(1e9), single.clip(1e9))
    return errors


def _errors_of_metrics(run: Run, single: Run) -> dict[str, float]:
    found = reduce_meter(run.loss_fn.meter, run.dims)
    sums, counts = single.loss_fn.meter.totals(torch.device("cpu"))
    errors = {}
    for name, total, count in zip(single.loss_fn.meter.names, sums, counts, strict=True):
        if count:
            assert found[name][1] == count
            errors[f"loss of {name}"] = abs(found[name][0] / float(total / count) - 1)
    expected, scalars = single.loss_fn.scalars(), run.loss_fn.scalars()
    assert scalars.keys() == expected.keys()
    for name, value in scalars.items():
        errors[name] = abs(value - expected[name]) / (abs(expected[name]) or 1.0)
    return errors


def compare(
    layout: str, variants: list[str], options: dict[str, Any]
) -> dict[str, tuple[float, str]]:
    """For each variant: the largest relative error and where it is."""
    use_float64()
    dims, worst = LAYOUTS[layout].dims(), {}
    for variant in variants:
        run, single = make_runs(layout, variant, dims, options)
        errors = errors_of_a_step(run, single, make_batches(run.args))
        worst[variant] = max((error, name) for name, error in errors.items())
    return worst
