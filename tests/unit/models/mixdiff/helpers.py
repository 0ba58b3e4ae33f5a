"""Small mixtures with random weights, and batches for them."""

from __future__ import annotations

import torch

from torchtitan_mixtures.models.mixdiff import MixtureOfDiffusers, mixdiff_args


def make_args(flavor="debugmodel", **fields):
    args = mixdiff_args[flavor]
    for name, value in fields.items():
        setattr(args, name, value)
    args.__post_init__()
    return args


def make_model(flavor="debugmodel", seed=0, dtype=torch.float64, **fields):
    """A mixture without zeros among its weights, in which everything has an effect."""
    args = make_args(flavor, **fields)
    args.init_seed = seed
    model = MixtureOfDiffusers(args)
    with torch.no_grad():
        model.init_weights()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return model.to(dtype).eval()


def make_batch(args, batch=6, seed=0, dtype=torch.float64):
    """Latents, times and the condition of experts that are told classes, or prompts."""
    rng = torch.Generator().manual_seed(seed)
    shape = (batch, args.in_channels, args.image_size, args.image_size)
    latents = torch.randn(shape, generator=rng, dtype=dtype)
    times = 1000 * torch.rand(batch, generator=rng)
    if not args.is_prompted:
        labels = torch.randint(0, args.num_classes + 1, (batch,), generator=rng)
        return latents, times, {"class_labels": labels}
    ids = torch.randint(1, 2048, (batch, args.prompts[0].length), generator=rng)
    kept = torch.rand(batch, 1, generator=rng) > 0.3
    return latents, times, {"prompts": {"text": ids}, "kept": kept}
