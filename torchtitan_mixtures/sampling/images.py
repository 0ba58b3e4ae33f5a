"""Images drawn by denoising models, of chosen classes or of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchtitan_mixtures.data.vae import Vae
from torchtitan_mixtures.job_config import Objective
from torchtitan_mixtures.objectives.ddpm import DDPM
from torchtitan_mixtures.objectives.denoising import is_mixture_of_diffusers
from torchtitan_mixtures.objectives.flow import RectifiedFlow
from torchtitan_mixtures.objectives.outputs import DenoiserOutput
from torchtitan_mixtures.objectives.patches import unpatchify
from torchtitan_mixtures.objectives.process import Process
from torchtitan_mixtures.sampling.conditions import (
    Condition,
    Inputs,
    class_condition,
    is_prompted,
)
from torchtitan_mixtures.sampling.denoise import (
    Denoiser,
    Progress,
    StepEdit,
    StepNoise,
    guide,
    noise_of_samples,
    sample_ddim,
    sample_ddpm,
    sample_euler,
)
from torchtitan_mixtures.sampling.routing import Routing, RoutingTrace
from torchtitan_mixtures.sampling.settings import setting_name


@dataclass(frozen=True)
class ImageSettings:
    """How images are drawn; names and meanings are those of `[sampling]`.

    The shift is what it is in the end, 0 of a model without.
    """

    sampler: str
    num_steps: int
    eta: float
    guidance: float
    guided_channels: int
    seed: int
    shift: float = 0.0
    routing: str = "step"


def check_image_settings(
    settings: Any, process: Process, args: Any, dropout: float, prefix: str = ""
) -> ImageSettings:
    """Check settings against the model that is to draw with them.

    Args:
        settings: Has the attributes of `ImageSettings`; an empty `sampler` becomes the process's.
        process: That of the model.
        args: The model's arguments.
        dropout: Share of its training samples that had no condition, see `condition_dropout`.
        prefix: Goes before the names in messages, see `setting_name`.

    Raises:
        ValueError: Names the setting, its value and what is allowed.
    """
    is_flow = isinstance(process, RectifiedFlow)
    allowed = ("euler",) if is_flow else ("ddpm", "ddim")
    sampler = settings.sampler or allowed[0]
    if sampler not in allowed:
        kind = "flow" if is_flow else "ddpm"
        raise ValueError(
            f"{prefix}sampler = {sampler!r}: a model of kind {kind} is drawn from with "
            f"{' or '.join(allowed)}."
        )
    steps = settings.num_steps
    if isinstance(process, DDPM) and steps > process.num_steps:
        raise ValueError(
            f"{setting_name(prefix, 'num_steps')} = {steps}: must be at most {process.num_steps}, "
            "the noise levels of the model."
        )
    if not 0 <= settings.guided_channels <= args.in_channels:
        name = setting_name(prefix, "guided_channels")
        raise ValueError(
            f"{name} = {settings.guided_channels}: must be from 0 (all) to {args.in_channels}, the "
            "channels of the model's images."
        )
    if settings.shift and not isinstance(process, RectifiedFlow):
        raise ValueError(
            f"{prefix}shift = {settings.shift}: a model of kind ddpm has no times that could be "
            "shifted; leave it out."
        )
    if settings.routing != "step" and not is_mixture_of_diffusers(args):
        raise ValueError(
            f"{prefix}routing = {settings.routing!r}: the model is no mixture of diffusers; leave "
            "it out."
        )
    _check_guidance(settings, args, dropout, prefix)
    return ImageSettings(
        sampler,
        steps,
        settings.eta,
        settings.guidance,
        settings.guided_channels,
        settings.seed,
        settings.shift or process.shift if isinstance(process, RectifiedFlow) else 0.0,
        settings.routing,
    )


def condition_dropout(objective: Objective, args: Any) -> float:
    """Share of training samples that lost their condition, and so what guidance can build on."""
    return objective.prompt_dropout if is_prompted(args) else objective.class_dropout


def _check_guidance(settings: Any, args: Any, dropout: float, prefix: str) -> None:
    """Check `guidance` and `negative_prompt`, as `check_image_settings`."""
    guidance, negative = settings.guidance, settings.negative_prompt
    name = setting_name(prefix, "negative_prompt")
    if negative and not is_prompted(args):
        raise ValueError(f"{name} = {negative!r}: the model draws images of classes; leave it out.")
    if negative and guidance == 1:
        raise ValueError(
            f"{name} = {negative!r}: there is no guidance away from it with {prefix}guidance = 1; "
            "set that to more, such as 4."
        )
    if guidance != 1 and dropout == 0 and not negative:
        kind = "prompt" if is_prompted(args) else "class"
        remedy = f"use 1, or name a {name}" if is_prompted(args) else "use 1"
        raise ValueError(
            f"{prefix}guidance = {guidance}: the model was trained with objective.{kind}_dropout = "
            f"0 and does not know images without a {kind}; {remedy}."
        )


def check_classes(labels: Sequence[int], num_classes: int, what: str) -> None:
    """Refuse classes that a model does not have.

    Raises:
        ValueError: Names the class and how many there are.
    """
    for label in labels:
        if not 0 <= label < num_classes:
            raise ValueError(f"{what} {label}: must be from 0 to {num_classes - 1}.")


def make_denoiser(
    model: Callable[..., DenoiserOutput],
    args: Any,
    condition: Condition,
    settings: ImageSettings,
    scales: Tensor | None = None,
    trace: RoutingTrace | None = None,
) -> Denoiser:
    """Wrap a model for a sampler, with guidance if asked for.

    Args:
        model: In evaluation mode.
        args: Its arguments.
        condition: What each sample is to be of, on the model's device.
        settings: See `check_image_settings`.
        scales: Guidance of each sample, `(batch,)`; None: all have that of the settings.
        trace: Takes down which experts of a mixture of diffusers are used; None: nobody does.
    """
    routing = Routing(args, settings.routing == "once", trace)
    scale = settings.guidance if scales is None else scales
    is_guided = scales is not None or settings.guidance != 1
    both = condition.both() if is_guided else {}

    def predict(latents: Tensor, times: Tensor, inputs: Inputs, copies: int = 1) -> Tensor:
        output = model(latents, times, **inputs, **routing.inputs(copies))
        routing.see(times, output, copies)
        return unpatchify(output.prediction, args.patch_size, args.out_channels, *latents.shape[2:])

    def plain(latents: Tensor, times: Tensor) -> Tensor:
        return predict(latents, times, condition.given)

    def guided(latents: Tensor, times: Tensor) -> Tensor:
        twice = latents.repeat(2, 1, 1, 1), times.repeat(2)
        given, without = predict(*twice, both, copies=2).chunk(2)
        return guide(given, without, scale, args.in_channels, settings.guided_channels)

    return guided if is_guided else plain


def draw_images(
    model: nn.Module,
    args: Any,
    process: Process,
    condition: Condition | Sequence[int],
    numbers: Sequence[int],
    settings: ImageSettings,
    device: torch.device | str,
    vae: Vae | None = None,
    progress: Progress | None = None,
    size: tuple[int, int] | None = None,
    trace: RoutingTrace | None = None,
) -> Tensor:
    """Draw one image for each number.

    Args:
        model: In evaluation mode.
        args: Its arguments.
        process: What it was trained with.
        condition: What each image is to be of, on the model's device; or the class of each.
        numbers: Number of each image; with the seed it decides all that is drawn for it.
        settings: See `check_image_settings`.
        device: The model's.
        vae: Makes pictures of latents; None: the model's images are pictures.
        progress: Told of each step.
        size: Height and width of what the model sees; None: the square of its arguments.
        trace: See `make_denoiser`.

    Returns:
        `(batch, channels, height, width)` float32, pictures in [-1, 1], not clipped.

    Raises:
        ValueError: There are not as many conditions as numbers.
    """
    shape = (args.in_channels, *(size or (args.image_size, args.image_size)))
    step_noise = noise_of_samples(settings.seed, torch.tensor(list(numbers)), shape, device)
    if not isinstance(condition, Condition):
        condition = class_condition(condition, args.num_classes, device)
    rows = next(leaf.shape[0] for leaf in tree_leaves(dict(condition.given)))
    if rows != len(numbers):
        raise ValueError(f"{rows} conditions for {len(numbers)} images: give one for each.")
    denoiser = make_denoiser(model, args, condition, settings, trace=trace)
    latents = draw_latents(denoiser, process, step_noise, settings, progress)
    return latents if vae is None else vae.decode(latents)


def draw_latents(
    denoiser: Denoiser,
    process: Process,
    step_noise: StepNoise,
    settings: ImageSettings,
    progress: Progress | None = None,
    edit: StepEdit | None = None,
) -> Tensor:
    """Run the sampler of the settings; arguments and result as those of `sample_ddpm`."""
    start, steps = step_noise(0), settings.num_steps
    if isinstance(process, RectifiedFlow):
        return sample_euler(denoiser, start, process, steps, progress, settings.shift, edit)
    if isinstance(process, DDPM) and settings.sampler == "ddim":
        eta = settings.eta
        return sample_ddim(denoiser, start, process, steps, step_noise, eta, progress, edit)
    if isinstance(process, DDPM):
        return sample_ddpm(denoiser, start, process, steps, step_noise, progress, edit)
    raise TypeError(f"no sampler for {type(process).__name__}")


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """Pictures in [-1, 1], `(batch, 3, height, width)`, as `(batch, height, width, 3)` uint8."""
    scaled = (images.clamp(-1, 1) + 1) * 127.5
    return scaled.round().permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()


def in_batches(
    draw: Callable[[Sequence[int], Sequence[int]], Tensor],
    subjects: Sequence[int],
    batch_size: int,
    keep: Callable[[int, NDArray[np.uint8]], None] = lambda number, picture: None,
) -> NDArray[np.uint8]:
    """Draw images numbered 0, 1, ... a batch at a time.

    Args:
        draw: Given subjects and numbers; see `draw_images`.
        subjects: Class of each image, or its prompt.
        batch_size: Images drawn together.
        keep: Given each number and its `(height, width, 3)` uint8 when its batch is done.

    Returns:
        `(images, height, width, 3)` uint8.
    """
    parts = []
    for first in range(0, len(subjects), batch_size):
        chosen = subjects[first : first + batch_size]
        parts.append(to_pixels(draw(chosen, range(first, first + len(chosen)))))
        for number, picture in enumerate(parts[-1], first):
            keep(number, picture)
    return np.concatenate(parts)
