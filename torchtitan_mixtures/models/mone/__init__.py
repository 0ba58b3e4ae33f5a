"""Mixture of Nested Experts, and ViT (Dosovitskiy et al. 2020, arXiv 2010.11929) beside it."""

from torchtitan_mixtures.models.common.flavors import Flavors
from torchtitan_mixtures.models.mone.args import MoNEModelArgs

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
    },
)
