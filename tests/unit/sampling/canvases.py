"""Tiny models that canvases are drawn with, and canvases of a few regions."""

from dataclasses import replace

import torch

from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.models.mixdiff import MixtureOfDiffusers, mixdiff_args
from torchtitan_mixtures.models.mmdit.args import MMDiTModelArgs
from torchtitan_mixtures.models.mmdit.model import MMDiTDenoiser
from torchtitan_mixtures.models.mom.args import MoMModelArgs
from torchtitan_mixtures.models.mom.model import MoM
from torchtitan_mixtures.objectives.ddpm import DDPM
from torchtitan_mixtures.objectives.flow import RectifiedFlow
from torchtitan_mixtures.sampling.canvas import Canvas, Rectangle, Region
from torchtitan_mixtures.sampling.canvas_drawing import draw_canvas, predict_with
from torchtitan_mixtures.sampling.conditions import Condition, class_condition
from torchtitan_mixtures.sampling.images import ImageSettings

TEXT = PromptSpec("text", "tokens", 6, vocab_size=40, null_token=0)


def shaken(model, seed=0):
    """A model whose branches and head count, in evaluation mode."""
    model.init_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_mom(learned_variance=True, image_size=16, **fields):
    values = dict(dim=16, n_layers=2, patch_size=4, in_channels=3, num_classes=8, init_seed=0)
    sizes = dict(image_size=image_size, learned_variance=learned_variance)
    return shaken(MoM(MoMModelArgs(**{**values, **sizes, **fields})))


def tiny_mmdit(learned_variance=False):
    args = MMDiTModelArgs(
        dim=32, n_layers=2, n_heads=2, patch_size=4, in_channels=3, image_size=16,
        learned_variance=learned_variance, prompts=(TEXT,), encoder_layers=1, encoder_dim=16,
        encoder_heads=2, init_seed=0,
    )  # fmt: skip
    return shaken(MMDiTDenoiser(args))


def tiny_mixture():
    """Three experts that draw classes."""
    args = replace(mixdiff_args["debugmodel"], learned_variance=False, init_seed=0)
    return shaken(MixtureOfDiffusers(args))


def region(left, top, width=16, height=16, subject=1, guidance=1.0, **fields):
    place = Rectangle(left, top, width, height)
    return Region(f"at {left}, {top}", place, subject, guidance, **fields)


def canvas_of(width, height, *regions, **fields):
    return Canvas(width, height, regions, **fields)


def condition_of(model, canvas):
    """Classes, or prompts whose tokens are all the number of the subject."""
    subjects = [region.subject for region in canvas.regions]
    num_classes = getattr(model.model_args, "num_classes", 0)

    def of_classes(rows):
        return class_condition([subjects[row] for row in rows], num_classes, "cpu")

    def of_prompts(rows):
        ids = torch.tensor([[subjects[row]] * TEXT.length for row in rows])
        given = {"prompts": {"text": ids}, "kept": torch.ones(len(rows), 1, dtype=torch.bool)}
        return Condition(given, {**given, "kept": torch.zeros(len(rows), 1, dtype=torch.bool)})

    return of_prompts if isinstance(model, MMDiTDenoiser) else of_classes


def settings_of(sampler="ddpm", guidance=1.0, **fields):
    values = {"num_steps": 4, "eta": 0.0, "guided_channels": 0, "seed": 3}
    shift = 1.0 if sampler == "euler" else 0.0
    return ImageSettings(sampler, guidance=guidance, **{**values, "shift": shift, **fields})


def process_of(sampler, learned_variance=True):
    return RectifiedFlow() if sampler == "euler" else DDPM(3, 100, "linear", learned_variance)


def draw(model, canvas, settings, predict=None, **options):
    """Draw a canvas without a VAE; `(1, 3, height, width)`."""
    args = model.model_args
    process = process_of(settings.sampler, args.learned_variance)
    predict = predict or predict_with(model)
    conditions = condition_of(model, canvas)
    return draw_canvas(predict, args, process, canvas, conditions, settings, "cpu", **options)
