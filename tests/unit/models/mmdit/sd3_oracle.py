"""Transformers of Stable Diffusion 3 of diffusers, and the same model here."""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel

from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.models.mmdit import sd3
from torchtitan_mixtures.models.mmdit.args import MMDiTModelArgs
from torchtitan_mixtures.models.mmdit.model import MMDiTDenoiser
from torchtitan_mixtures.objectives.patches import unpatchify

PROMPT = PromptSpec("text", "embeddings", length=5, dim=24, pooled_dim=12)


def make_theirs(std=0.2, **changes):
    """A small transformer of diffusers whose weights are all random; those of norms are about 1."""
    sizes = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 12,
        "caption_projection_dim": 16,
        "pos_embed_max_size": 6,
    }
    model = SD3Transformer2DModel(**{**sizes, **changes})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std, generator=generator)
            if ".attn.norm_" in name:
                parameter.add_(1)
    return model.eval()


def make_args(**changes):
    """Arguments of the model that `make_theirs` makes."""
    sizes = {
        "dim": 16,
        "n_layers": 3,
        "n_heads": 2,
        "patch_size": 2,
        "in_channels": 4,
        "image_size": 12,
        "position_grid": 4,
        "qk_norm": "none",
        "prompts": (PROMPT,),
    }
    return MMDiTModelArgs(**{**sizes, **changes})


def make_ours(theirs, args):
    model = MMDiTDenoiser(args)
    model.load_state_dict(sd3.from_sd3(theirs.state_dict(), args))
    return model.eval()


def config_of(theirs, **changes):
    """What `save_pretrained` writes to config.json."""
    config = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    return {**config, "_class_name": "SD3Transformer2DModel", **changes}


def draw_inputs(args, height, width, dtype):
    """Noised latents, and the prompts for them."""
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "latents": (3, args.in_channels, height, width),
        "text": (3, args.prompts[0].length, args.prompts[0].dim),
        "text_pooled": (3, args.prompts[0].pooled_dim),
    }
    drawn = {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }
    return drawn.pop("latents"), drawn


def run_both(theirs, ours, height, width, times, dtype=torch.float32):
    """What diffusers puts out, and what is put out here."""
    args = ours.model_args
    latents, prompts = draw_inputs(args, height, width, dtype)
    expected = theirs(latents, prompts["text"], prompts["text_pooled"], times).sample
    patches = ours(latents, times, prompts).prediction
    return expected, unpatchify(patches, args.patch_size, args.out_channels, height, width)
