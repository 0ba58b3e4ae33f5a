"""What a parallel layout computes of an MMDiT against one process, in float64."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
from torchtitan.distributed import ParallelDims

from tests.distributed.mom_parity import Run, lay_out
from tests.distributed.parity import LAYOUTS, Layout, relative_error, use_float64, whole
from tests.jobs import debug_job
from torchtitan_mixtures.data.prompt_spec import EncoderSpan, PromptSpec
from torchtitan_mixtures.layout_checks import check_layout
from torchtitan_mixtures.models.mmdit.args import MMDiTModelArgs
from torchtitan_mixtures.objectives.conditions import PromptCondition
from torchtitan_mixtures.objectives.denoising import DenoisingLoss, build_process

TEXT = PromptSpec("text", "tokens", length=8, vocab_size=11, null_token=10)
SHORT_TEXT = PromptSpec("text", "tokens", length=7, vocab_size=11, null_token=10)
SPEECH = PromptSpec("speech", "tokens", length=4, vocab_size=5, null_token=4)
EMBEDDINGS = PromptSpec(
    "text",
    "embeddings",
    length=8,
    dim=12,
    pooled_dim=6,
    spans=(
        EncoderSpan("first", rows=(0, 4), channels=(0, 6), pooled=(0, 6)),
        EncoderSpan("second", rows=(4, 8), channels=(0, 12)),
    ),
)
NO_POOLED = PromptSpec("text", "embeddings", length=8, dim=12)
THREE = dict(prompt_names=("text", "speech"), prompt_dims=(16, 24))
EVERYTHING = dict(
    num_registers=(4, 8, 4),
    num_residual_streams=4,
    num_adaptive_weights=2,
    qk_norm="per_head",
    softclamp=5.0,
)

# What is changed in a model's arguments. The lengths of those that are not odd can be cut in four.
VARIANTS: dict[str, dict[str, Any]] = {
    "tokens": dict(prompts=(TEXT,)),
    "embeddings": dict(prompts=(EMBEDDINGS,), qk_norm="none", modulation="film_identity"),
    "no pooled embeddings": dict(prompts=(NO_POOLED,)),
    "3 modalities": dict(prompts=(TEXT, SPEECH), qk_norm="per_head", **THREE),
    "single stream": dict(prompts=(TEXT,), single_stream=True),
    "single stream, registers": dict(prompts=(EMBEDDINGS,), single_stream=True, num_registers=(4,)),
    "registers": dict(prompts=(TEXT,), num_registers=(8, 4)),
    "4 dynamic streams": dict(prompts=(TEXT,), num_residual_streams=4),
    "4 static streams": dict(prompts=(TEXT,), num_residual_streams=4, dynamic_streams=False),
    "adaptive weights": dict(prompts=(EMBEDDINGS,), num_adaptive_weights=2),
    "soft clamp": dict(prompts=(TEXT,), softclamp=5.0),
    "everything": dict(prompts=(TEXT, SPEECH), **THREE, **EVERYTHING),
    "odd": dict(prompts=(SHORT_TEXT,)),
    "odd, single stream": dict(prompts=(SHORT_TEXT,), single_stream=True, num_registers=(3,)),
    "odd, everything": dict(
        prompts=(SHORT_TEXT, SPEECH), **THREE, **EVERYTHING | dict(num_registers=(3, 0, 5))
    ),
    "odd halves": dict(
        prompts=(dataclasses.replace(TEXT, length=6), SPEECH),
        **THREE,
        **EVERYTHING | dict(num_registers=(2, 0, 6)),
    ),
    "one shape": dict(prompts=(EMBEDDINGS,), num_residual_streams=4),
}

SHAPES = {"one shape": ((8, 8), (8, 8)), "odd halves": ((6, 12), (8, 8))}
"""Of the images of each microbatch, where it is not one of the next two."""

EVEN, ODD = ((8, 8), (4, 12)), ((6, 10), (8, 8))
"""Of 16 and 12, and of 15 and 16 tokens."""

MICROBATCH = 4


@cache
def _base_job() -> Any:
    """Parsed once for each process: it takes longer than a step."""
    return debug_job("mmdit", "--objective.prompt_dropout=0.3")


def make_job(layout: Layout) -> Any:
    """The configuration of a job that runs a layout."""
    return lay_out(_base_job(), layout, MICROBATCH)


def make_args(variant: str) -> MMDiTModelArgs:
    """The arguments of a variant of three narrow layers."""
    sizes: dict[str, Any] = dict(dim=32, n_layers=3, n_heads=4, patch_size=2, image_size=8)
    sizes |= dict(in_channels=2, num_timestep_features=16, init_seed=3)
    sizes |= dict(encoder_layers=1, encoder_dim=16, encoder_heads=2)
    return MMDiTModelArgs(**(sizes | VARIANTS[variant]))


def make_batches(args: MMDiTModelArgs, variant: str) -> list[dict[str, torch.Tensor]]:
    """Random images of two shapes, as the loader yields them."""
    rng = torch.Generator().manual_seed(1)
    batches = []
    shapes = SHAPES.get(variant, ODD if variant.startswith("odd") else EVEN)
    for index, shape in enumerate(shapes):
        images = torch.rand(MICROBATCH, args.in_channels, *shape, generator=rng)
        batch = {
            "input": images.float() * 2 - 1,
            "sample_index": torch.arange(MICROBATCH) + index * MICROBATCH,
        }
        for spec in args.prompts:
            size = (MICROBATCH, spec.length)
            if spec.kind == "tokens":
                ids = torch.randint(spec.vocab_size, size, generator=rng)
                batch[f"prompt_{spec.name}"] = ids
                continue
            batch[f"prompt_{spec.name}"] = torch.randn(*size, spec.dim, generator=rng)
            if spec.pooled_dim:
                pooled = torch.randn(MICROBATCH, spec.pooled_dim, generator=rng)
                batch[f"prompt_{spec.name}_pooled"] = pooled
        batches.append(batch)
    return batches


class PromptedRun(Run):
    """An MMDiT, under a layout or untouched, and a step of the trainer with it."""

    family = "mmdit"
    microbatch = MICROBATCH

    def make_loss(self) -> DenoisingLoss:
        """The objective."""
        objective = self.job.objective
        process = build_process(objective, self.args.in_channels)
        condition = PromptCondition(self.args.prompts, objective.prompt_dropout)
        return DenoisingLoss(process, self.args, objective, condition, seed=7)

    def loss(self, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        """The sum of the losses of a microbatch of this rank."""
        batch, _, height, width = rows["input"].shape
        tokens = height * width // self.args.patch_size**2
        inputs, targets, extra, _ = self.loss_fn.prepare(
            self.model, None, rows, torch.zeros(batch, tokens, dtype=torch.int64),
            self.dims, self.job,
        )  # fmt: skip
        # Draws are float32 whatever the default is.
        targets = targets._replace(clean=targets.clean.double(), noise=targets.noise.double())
        return self.loss_fn(self.model(inputs.double(), **extra), targets)


def make_runs(
    layout_name: str, variant: str, dims: ParallelDims, options: dict[str, Any]
) -> list[PromptedRun]:
    """The parallel run, with further keys of the job, and one process's."""
    job, args = make_job(LAYOUTS[layout_name]), make_args(variant)
    for path, value in options.items():
        section, _, key = path.partition(".")
        setattr(getattr(job, section), key, value)
    check_layout(job, args)
    ones = dict(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1)
    single = PromptedRun(False, make_job(Layout({})), args, ParallelDims(**ones, world_size=1))
    return [PromptedRun(True, job, args, dims), single]


def learns_nothing(name: str, args: MMDiTModelArgs) -> bool:
    """Whether a parameter's gradient is zero: nothing is made of prompts behind the last block."""
    last = f"layers.{args.n_layers - 1}.attention.q_norm."
    return name.startswith(last) and not name.startswith(f"{last}image.")


def errors_of_a_step(
    run: PromptedRun, single: PromptedRun, batches: list[dict[str, torch.Tensor]]
) -> dict[str, float]:
    """Compare initial weights; then loss, gradients and their norm, with weights drawn again."""
    weights: dict[str, Any] = single.parameters()
    assert run.parameters().keys() == weights.keys()
    for name, parameter in run.parameters().items():
        assert torch.equal(whole(parameter), weights[name]), f"{name}: initial weights differ"
    run.draw_weights()
    single.draw_weights()
    errors = {"loss": relative_error(run.backward(batches), single.backward(batches))}
    for name, parameter in run.parameters().items():
        assert parameter.grad is not None, name
        expected, scale = weights[name].grad, weights[name].grad.abs().max()
        if name.endswith("wk.bias"):  # changes nothing: its gradient is zero but for rounding
            scale = weights[name.replace("bias", "weight")].grad.abs().max()
        elif learns_nothing(name, run.args):
            scale = torch.ones(())
        assert scale > 0, f"{name}: has no gradient"
        errors[name] = float((whole(parameter.grad) - expected).abs().max() / scale)
    errors["norm"] = relative_error(run.clip(1e9), single.clip(1e9))
    return errors


def compare(
    layout: str, variants: list[str], options: dict[str, Any]
) -> dict[str, tuple[float, str]]:
    """For each variant: the largest relative error and where it is."""
    use_float64()
    dims, worst = LAYOUTS[layout].dims(), {}
    for variant in variants:
        run, single = make_runs(layout, variant, dims, options)
        errors = errors_of_a_step(run, single, make_batches(run.args, variant))
        worst[variant] = max((error, name) for name, error in errors.items())
    return worst
