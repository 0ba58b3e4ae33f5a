"""Mixture of Nested Experts, and ViT (Dosovitskiy et al. 2020, arXiv 2010.11929) beside it."""

from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.protocols.train_spec import TrainSpec

from torchtitan_mixtures.data.image_loader import build_image_dataloader
from torchtitan_mixtures.metrics import build_metrics_processor
from torchtitan_mixtures.models.common.flavors import Flavors
from torchtitan_mixtures.models.mone.args import MoNEModelArgs
from torchtitan_mixtures.models.mone.model import MoNE
from torchtitan_mixtures.models.mone.parallelize import parallelize_mone
from torchtitan_mixtures.objectives.classification import build_classification_loss
from torchtitan_mixtures.optimizer import build_matrix_decay_optimizers
from torchtitan_mixtures.validate_classification import build_classification_validator

mone_args = Flavors(
    "mone",
    {
        "debugmodel": MoNEModelArgs(
            dim=128, n_layers=4, n_heads=4, patch_size=4, image_size=32, num_classes=10
        ),
        "debugmodel_dense": MoNEModelArgs(
            dim=128,
            n_layers=4,
            n_heads=4,
            patch_size=4,
            image_size=32,
            num_classes=10,
            num_experts=1,
        ),
        # Dense ones of about the cost of "debugmodel" at capacity 0.2 and 0.6.
        "debugmodel_dense_64": MoNEModelArgs(
            dim=64,
            n_layers=4,
            n_heads=2,
            patch_size=4,
            image_size=32,
            num_classes=10,
            num_experts=1,
        ),
        "debugmodel_dense_96": MoNEModelArgs(
            dim=96,
            n_layers=4,
            n_heads=3,
            patch_size=4,
            image_size=32,
            num_classes=10,
            num_experts=1,
        ),
        "Ti/16": MoNEModelArgs(dim=192, n_layers=12, n_heads=3),
        "S/16": MoNEModelArgs(dim=384, n_layers=12, n_heads=6),
        "B/16": MoNEModelArgs(dim=768, n_layers=12, n_heads=12),
        "L/16": MoNEModelArgs(dim=1024, n_layers=24, n_heads=16),
        "G/16": MoNEModelArgs(dim=2048, n_layers=48, n_heads=32),
        "ViT-Ti/16": MoNEModelArgs(dim=192, n_layers=12, n_heads=3, num_experts=1),
        "ViT-S/16": MoNEModelArgs(dim=384, n_layers=12, n_heads=6, num_experts=1),
        "ViT-B/16": MoNEModelArgs(dim=768, n_layers=12, n_heads=12, num_experts=1),
        "ViT-L/16": MoNEModelArgs(dim=1024, n_layers=24, n_heads=16, num_experts=1),
        "ViT-G/16": MoNEModelArgs(dim=2048, n_layers=48, n_heads=32, num_experts=1),
        # With a class token, as published ViTs have it (`scripts/convert.py import-vit`).
        "debugmodel_cls": MoNEModelArgs(
            dim=128,
            n_layers=4,
            n_heads=4,
            patch_size=4,
            image_size=32,
            num_classes=10,
            norm_eps=1e-12,
            pool="class_token",
        ),
        "Ti/16-cls": MoNEModelArgs(
            dim=192, n_layers=12, n_heads=3, norm_eps=1e-12, pool="class_token"
        ),
        "S/16-cls": MoNEModelArgs(
            dim=384, n_layers=12, n_heads=6, norm_eps=1e-12, pool="class_token"
        ),
        "B/16-cls": MoNEModelArgs(
            dim=768, n_layers=12, n_heads=12, norm_eps=1e-12, pool="class_token"
        ),
        "L/16-cls": MoNEModelArgs(
            dim=1024, n_layers=24, n_heads=16, norm_eps=1e-12, pool="class_token"
        ),
        "ViT-Ti/16-cls": MoNEModelArgs(
            dim=192, n_layers=12, n_heads=3, norm_eps=1e-12, pool="class_token", num_experts=1
        ),
        "ViT-S/16-cls": MoNEModelArgs(
            dim=384, n_layers=12, n_heads=6, norm_eps=1e-12, pool="class_token", num_experts=1
        ),
        "ViT-B/16-cls": MoNEModelArgs(
            dim=768, n_layers=12, n_heads=12, norm_eps=1e-12, pool="class_token", num_experts=1
        ),
        "ViT-L/16-cls": MoNEModelArgs(
            dim=1024, n_layers=24, n_heads=16, norm_eps=1e-12, pool="class_token", num_experts=1
        ),
    },
)


def get_train_spec() -> TrainSpec:
    """Say how TorchTitan trains a MoNE or ViT."""
    return TrainSpec(
        model_cls=MoNE,
        model_args=mone_args,
        parallelize_fn=parallelize_mone,
        pipelining_fn=None,
        build_optimizers_fn=build_matrix_decay_optimizers,
        build_lr_schedulers_fn=build_lr_schedulers,
        build_dataloader_fn=build_image_dataloader,
        build_tokenizer_fn=None,
        build_loss_fn=build_classification_loss,
        build_validator_fn=build_classification_validator,
        build_metrics_processor_fn=build_metrics_processor,
    )
