"""What a parallel layout computes of a mixture of diffusers against one process, in float64.

As `mom_parity.py` does it for other models of images; experts are small flavours made for this.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from tests.distributed.mmdit_parity import EMBEDDINGS, TEXT
from tests.distributed.mom_parity import Run, errors_of_a_step, lay_out
from tests.distributed.parity import LAYOUTS, Layout, use_float64
from tests.jobs import debug_job
from torchtitan_mixtures.layout_checks import check_layout
from torchtitan_mixtures.models.mixdiff.args import MixDiffModelArgs
from torchtitan_mixtures.models.mmdit.args import MMDiTModelArgs
from torchtitan_mixtures.models.mom.args import MoMModelArgs
from torchtitan_mixtures.objectives.denoising import DenoisingLoss, build_condition, build_process
from torchtitan_mixtures.objectives.domain_meter import DomainMeter
from torchtitan_mixtures.objectives.routing import RoutingTask

MICROBATCH = 8
DOMAINS = 3

SIZES: dict[str, Any] = dict(n_layers=2, n_heads=4, patch_size=2, num_timestep_features=16)
TINY: dict[str, Any] = {
    "mom/tiny": MoMModelArgs(dim=32, mixer="attention", **SIZES),
    "mom/tiny_wide": MoMModelArgs(dim=64, mixer="attention", **SIZES),
    "mom/tiny_coarse": MoMModelArgs(dim=32, mixer="attention", **{**SIZES, "patch_size": 4}),
    "mmdit/tiny": MMDiTModelArgs(
        dim=32,
        encoder_layers=1,
        encoder_dim=16,
        encoder_heads=2,
        prompts=(TEXT,),
        qk_norm="none",
        **SIZES,
    ),
}
DIT, MMDIT = ("mom/tiny",) * 3, ("mmdit/tiny",) * 3

# What is changed in a mixture's arguments, and keys of its job.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "joint": (dict(router_noise=0.5), {}),
    "decentralised": ({}, {"diffusers.training": "decentralised", "diffusers.router_weight": 0.7}),
    "top 1": (dict(top_k=1, renormalize=False, router="mlp"), {}),
    "prompts": (dict(experts=MMDIT, prompts=(TEXT,), learned_variance=False), {}),
    "embeddings": (
        dict(experts=MMDIT, prompts=(EMBEDDINGS,), learned_variance=False, router="mlp"),
        {"diffusers.training": "decentralised"},
    ),
    "other widths": (dict(experts=("mom/tiny", "mom/tiny_wide", "mom/tiny"), top_k=3), {}),
    "other patches": (dict(experts=("mom/tiny", "mom/tiny_coarse", "mom/tiny")), {}),
    "by the prompt": (dict(router="linear", router_inputs=("prompt",)), {}),
    "an expert is frozen": (
        {},
        {"diffusers.training": "decentralised", "mixture.frozen_towers": ["1"]},
    ),
    "the router is frozen": (dict(top_k=3), {"mixture.frozen_towers": ["router"]}),
    "the router alone": (dict(router_only=True), {"diffusers.training": "router"}),
}


def register() -> None:
    """Make the small flavours known."""
    for name, args in TINY.items():
        family, _, flavor = name.partition("/")
        table: Any = get_train_spec(family).model_args
        table._table[flavor] = args


@cache
def _base_job(is_prompted: bool) -> Any:
    """Parsed once for each process: it takes longer than a step."""
    dropout = "prompt_dropout" if is_prompted else "class_dropout"
    return debug_job("mixdiff", f"--objective.{dropout}=0.3")


def make_job(variant: str, layout: Layout, options: dict[str, Any]) -> Any:
    """The configuration of a job that runs a layout."""
    fields, keys = VARIANTS[variant]
    job = lay_out(_base_job("prompts" in fields), layout, MICROBATCH)
    job.diffusers.training = "joint"
    job.objective.balance_weight, job.objective.z_weight = 0.5, 0.1
    for path, value in {**keys, **options}.items():
        section, _, key = path.partition(".")
        setattr(getattr(job, section), key, value)
    return job


def make_args(variant: str) -> MixDiffModelArgs:
    """The arguments of a variant: three experts, and a router of two narrow layers."""
    sizes: dict[str, Any] = dict(experts=DIT, router_dim=16, router_layers=2, router_heads=2)
    sizes |= dict(router_patch_size=4, image_size=8, in_channels=2, num_classes=5)
    sizes |= dict(num_timestep_features=16, init_seed=3)
    return MixDiffModelArgs(**(sizes | VARIANTS[variant][0]))


def make_batches(args: MixDiffModelArgs) -> list[dict[str, torch.Tensor]]:
    """Random images and their domains, as the loader yields them."""
    rng = torch.Generator().manual_seed(1)
    batches = []
    for index in range(2):
        shape = (MICROBATCH, args.in_channels, args.image_size, args.image_size)
        batch = {
            "input": torch.rand(shape, generator=rng, dtype=torch.float32) * 2 - 1,
            "sample_index": torch.arange(MICROBATCH) + index * MICROBATCH,
            # One rank of two has none of one domain.
            "domain_labels": torch.tensor([0, 1, 1, 0, 2, 1, 2, 2]),
        }
        if not args.is_prompted:
            labels = torch.randint(args.num_classes, (MICROBATCH,), generator=rng)
            batch["class_labels"] = labels
        for spec in args.prompts if args.is_prompted else ():
            size = (MICROBATCH, spec.length)
            if spec.kind == "tokens":
                batch[f"prompt_{spec.name}"] = torch.randint(spec.vocab_size, size, generator=rng)
                continue
            batch[f"prompt_{spec.name}"] = torch.randn(*size, spec.dim, generator=rng)
            if spec.pooled_dim:
                pooled = torch.randn(MICROBATCH, spec.pooled_dim, generator=rng)
                batch[f"prompt_{spec.name}_pooled"] = pooled
        batches.append(batch)
    return batches


class MixtureRun(Run):
    """A mixture of diffusers, under a layout or untouched, and a step of the trainer with it."""

    family = "mixdiff"
    microbatch = MICROBATCH

    def make_loss(self) -> DenoisingLoss:
        """The objective."""
        args, config = self.args, self.job.diffusers
        process = build_process(self.job.objective, args.in_channels)
        process.learned_variance = args.learned_variance  # pyrefly: ignore [missing-attribute]
        names = [f"domain{number}" for number in range(DOMAINS)]
        meter = DomainMeter(args.names, names, loss_mesh=lambda: self.mesh("loss"))
        return DenoisingLoss(
            process,
            args,
            self.job.objective,
            build_condition(self.job, args),
            seed=7,
            sample_mesh=lambda: self.mesh("batch"),
            routing=RoutingTask(config.training, config.router_weight, meter),
        )

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Those that learn, by name; of frozen ones it must be that none has a gradient."""
        parameters = super().parameters()
        frozen = {
            name
            for name in parameters
            if self.args.tower_of_parameter(name) in self.job.mixture.frozen_towers
        }
        assert all(parameters[name].grad is None for name in frozen)
        return {name: p for name, p in parameters.items() if name not in frozen}


def make_runs(
    layout_name: str, variant: str, dims: ParallelDims, options: dict[str, Any]
) -> list[MixtureRun]:
    """The parallel run, with further keys of the job, and one process's."""
    register()
    args = make_args(variant)
    job, alone = make_job(variant, LAYOUTS[layout_name], options), make_job(variant, Layout({}), {})
    check_layout(job, args)
    ones = dict(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1)
    single = MixtureRun(False, alone, args, ParallelDims(**ones, world_size=1))
    for name, parameter in single.model.named_parameters():
        frozen = alone.mixture.frozen_towers
        parameter.requires_grad_(args.tower_of_parameter(name) not in frozen)
    return [MixtureRun(True, job, deepcopy(args), dims), single]


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
