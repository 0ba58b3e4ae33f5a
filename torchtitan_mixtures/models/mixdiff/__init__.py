"""Mixture of Diffusers: routed diffusion experts, trained apart or together."""

from typing import Any

from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import TrainSpec

from torchtitan_mixtures.data.image_loader import ImageDataLoader, build_image_dataloader
from torchtitan_mixtures.data.model_flavor import model_flavor
from torchtitan_mixtures.data.prompt_loader import build_prompt_dataloader
from torchtitan_mixtures.metrics import build_metrics_processor
from torchtitan_mixtures.models.common.flavors import Flavors
from torchtitan_mixtures.models.mixdiff.args import MixDiffModelArgs
from torchtitan_mixtures.models.mixdiff.model import MixtureOfDiffusers
from torchtitan_mixtures.models.mixdiff.parallelize import parallelize_mixdiff
from torchtitan_mixtures.objectives.denoising import build_denoising_loss
from torchtitan_mixtures.optimizer import build_tower_optimizers
from torchtitan_mixtures.validate_denoising import build_denoising_validator

__all__ = ["MixtureOfDiffusers", "get_train_spec", "mixdiff_args"]

mixdiff_args = Flavors(
    "mixdiff",
    {
        "debugmodel": MixDiffModelArgs(
            experts=("mom/debugmodel_dit",) * 3,
            top_k=2,
            router_dim=64,
            router_layers=2,
            router_patch_size=8,
            in_channels=3,
            num_classes=24,
        ),
        # Experts that are told prompts.
        "debugmodel_mmdit": MixDiffModelArgs(
            experts=("mmdit/debugmodel",) * 3,
            top_k=2,
            router_dim=64,
            router_layers=2,
            router_patch_size=8,
            in_channels=3,
            learned_variance=False,
        ),
        # The router has one to five per cent of the multiply-adds of one expert.
        "S/4x4": MixDiffModelArgs(experts=("mom/DiT-S/4",) * 4, router_patch_size=8),
        "S/2x8": MixDiffModelArgs(experts=("mom/DiT-S/2",) * 8, router_dim=192),
        "B/2x8": MixDiffModelArgs(
            experts=("mom/DiT-B/2",) * 8, router_dim=384, router_layers=6, router_heads=6
        ),
        # The router is a DiT-B/4, nearly that of Decentralized Diffusion Models.
        "XL/2x8": MixDiffModelArgs(
            experts=("mom/DiT-XL/2",) * 8, router_dim=768, router_layers=12, router_heads=12
        ),
        "d15x4": MixDiffModelArgs(
            experts=("mmdit/d15",) * 4,
            router_dim=384,
            router_layers=6,
            router_heads=6,
            in_channels=16,
            learned_variance=False,
        ),
    },
)


def build_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: Any, job_config: JobConfig
) -> ImageDataLoader:
    """Build the loader of classes or of prompts, as the flavour's experts take them."""
    is_prompted = model_flavor(job_config).is_prompted
    build = build_prompt_dataloader if is_prompted else build_image_dataloader
    return build(dp_world_size, dp_rank, tokenizer, job_config)


def get_train_spec() -> TrainSpec:
    """Say how TorchTitan trains a mixture of diffusers."""
    return TrainSpec(
        model_cls=MixtureOfDiffusers,
        model_args=mixdiff_args,
        parallelize_fn=parallelize_mixdiff,
        pipelining_fn=None,
        build_optimizers_fn=build_tower_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=None,
        build_loss_fn=build_denoising_loss,
        build_validator_fn=build_denoising_validator,
        build_metrics_processor_fn=build_metrics_processor,
    )
