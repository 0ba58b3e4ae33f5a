"""Mixture of Mixers, and DiT (Peebles and Xie 2022, arXiv 2212.09748) beside it."""

from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.protocols.train_spec import TrainSpec

from torchtitan_mixtures.data.image_loader import build_image_dataloader
from torchtitan_mixtures.metrics import build_metrics_processor
from torchtitan_mixtures.models.common.flavors import Flavors
from torchtitan_mixtures.models.mom.args import MoMModelArgs
from torchtitan_mixtures.models.mom.model import MoM
from torchtitan_mixtures.models.mom.parallelize import parallelize_mom
from torchtitan_mixtures.objectives.denoising import build_denoising_loss
from torchtitan_mixtures.optimizer import build_tower_optimizers
from torchtitan_mixtures.validate_denoising import build_denoising_validator

mom_args = Flavors(
    "mom",
    {
        "debugmodel": MoMModelArgs(
            dim=128, n_layers=4, patch_size=4, in_channels=3, image_size=32, num_classes=10
        ),
        "debugmodel_dit": MoMModelArgs(
            dim=128,
            n_layers=4,
            patch_size=4,
            in_channels=3,
            image_size=32,
            num_classes=10,
            mixer="attention",
            n_heads=4,
        ),
        # As many parameters as three debugmodel_dit.
        "debugmodel_dit_224": MoMModelArgs(
            dim=224,
            n_layers=4,
            patch_size=4,
            in_channels=3,
            image_size=32,
            num_classes=10,
            mixer="attention",
            n_heads=4,
        ),
        # As many multiply-adds as debugmodel_dit.
        "debugmodel_matched": MoMModelArgs(
            dim=128,
            n_layers=4,
            patch_size=4,
            in_channels=3,
            image_size=32,
            num_classes=10,
            channel_ratio=0.5,
        ),
        # As many multiply-adds as DiT-S/4.
        "MoM-S/4-matched": MoMModelArgs(
            dim=384, n_layers=12, patch_size=4, token_ratio=4, channel_ratio=1.5
        ),
        "MoM-S/2": MoMModelArgs(dim=384, n_layers=12, patch_size=2),
        "MoM-S/4": MoMModelArgs(dim=384, n_layers=12, patch_size=4),
        "MoM-S/8": MoMModelArgs(dim=384, n_layers=12, patch_size=8),
        "MoM-B/2": MoMModelArgs(dim=768, n_layers=12, patch_size=2),
        "MoM-B/4": MoMModelArgs(dim=768, n_layers=12, patch_size=4),
        "MoM-B/8": MoMModelArgs(dim=768, n_layers=12, patch_size=8),
        "MoM-L/2": MoMModelArgs(dim=1024, n_layers=24, patch_size=2),
        "MoM-L/4": MoMModelArgs(dim=1024, n_layers=24, patch_size=4),
        "MoM-L/8": MoMModelArgs(dim=1024, n_layers=24, patch_size=8),
        "MoM-XL/2": MoMModelArgs(dim=1152, n_layers=28, patch_size=2),
        "MoM-XL/4": MoMModelArgs(dim=1152, n_layers=28, patch_size=4),
        "MoM-XL/8": MoMModelArgs(dim=1152, n_layers=28, patch_size=8),
        "DiT-S/2": MoMModelArgs(dim=384, n_layers=12, patch_size=2, mixer="attention", n_heads=6),
        "DiT-S/4": MoMModelArgs(dim=384, n_layers=12, patch_size=4, mixer="attention", n_heads=6),
        "DiT-S/8": MoMModelArgs(dim=384, n_layers=12, patch_size=8, mixer="attention", n_heads=6),
        "DiT-B/2": MoMModelArgs(dim=768, n_layers=12, patch_size=2, mixer="attention", n_heads=12),
        "DiT-B/4": MoMModelArgs(dim=768, n_layers=12, patch_size=4, mixer="attention", n_heads=12),
        "DiT-B/8": MoMModelArgs(dim=768, n_layers=12, patch_size=8, mixer="attention", n_heads=12),
        "DiT-L/2": MoMModelArgs(dim=1024, n_layers=24, patch_size=2, mixer="attention", n_heads=16),
        "DiT-L/4": MoMModelArgs(dim=1024, n_layers=24, patch_size=4, mixer="attention", n_heads=16),
        "DiT-L/8": MoMModelArgs(dim=1024, n_layers=24, patch_size=8, mixer="attention", n_heads=16),
        "DiT-XL/2": MoMModelArgs(
            dim=1152, n_layers=28, patch_size=2, mixer="attention", n_heads=16
        ),
        "DiT-XL/4": MoMModelArgs(
            dim=1152, n_layers=28, patch_size=4, mixer="attention", n_heads=16
        ),
        "DiT-XL/8": MoMModelArgs(
            dim=1152, n_layers=28, patch_size=8, mixer="attention", n_heads=16
        ),
    },
)


def get_train_spec() -> TrainSpec:
    """Say how TorchTitan trains a MoM or DiT."""
    return TrainSpec(
        model_cls=MoM,
        model_args=mom_args,
        parallelize_fn=parallelize_mom,
        pipelining_fn=None,
        build_optimizers_fn=build_tower_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_image_dataloader,
        build_tokenizer_fn=None,
        build_loss_fn=build_denoising_loss,
        build_validator_fn=build_denoising_validator,
        build_metrics_processor_fn=build_metrics_processor,
    )
