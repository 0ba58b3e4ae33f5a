"""Canvases drawn: the noise, the model's predictions of all regions as one, reference images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from torchtitan_mixtures.data.vae import Vae
from torchtitan_mixtures.objectives.outputs import DenoiserOutput
from torchtitan_mixtures.objectives.process import Process, at_least_float32
from torchtitan_mixtures.objectives.randomness import draw_normal
from torchtitan_mixtures.sampling.canvas import (
    Canvas,
    ReferenceImage,
    blending_weights,
    count_imposed_steps,
    mix_noise,
)
from torchtitan_mixtures.sampling.conditions import Condition, Inputs
from torchtitan_mixtures.sampling.denoise import (
    Denoiser,
    Progress,
    StepEdit,
    StepNoise,
    noise_of_samples,
)
from torchtitan_mixtures.sampling.images import ImageSettings, draw_latents, make_denoiser

Predict = Callable[[Sequence[int], Tensor, Tensor, Inputs], DenoiserOutput]
"""Calls the model, given numbers of regions, their latents, times and other inputs. With guidance
there are twice as many latents as numbers: those with a subject, then those without."""

ConditionOf = Callable[[Sequence[int]], Condition]
"""From numbers of regions to what a batch of them is to be of, on the model's device."""


def draw_canvas(
    predict: Predict,
    args: Any,
    process: Process,
    canvas: Canvas,
    condition_of: ConditionOf,
    settings: ImageSettings,
    device: torch.device | str,
    vae: Vae | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Tensor:
    """Draw one canvas.

    Args:
        predict: Calls the model, which is in evaluation mode; see `predict_with`.
        args: The model's arguments.
        process: What it was trained with.
        canvas: What to draw; all of it is covered.
        condition_of: See `ConditionOf`.
        settings: See `check_image_settings`; each region has a guidance of its own.
        device: The model's.
        vae: Makes pictures of latents; None: the model's images are pictures.
        batch_size: Regions that the model sees together, at most.
        progress: Told of each step.

    Returns:
        `(1, channels, height, width)` float32, a picture in [-1, 1], not clipped.
    """
    cell = 1 if vae is None else vae.factor
    noise = canvas_noise(canvas, cell, args.in_channels, settings.seed, device)
    denoiser = compose(predict, args, canvas, cell, condition_of, settings, batch_size, device)
    edit = impose_references(canvas, cell, process, settings.num_steps, noise(0), vae)
    latents = draw_latents(denoiser, process, noise, settings, progress, edit)
    return latents if vae is None else vae.decode(latents)


def predict_with(model: Callable[..., DenoiserOutput], trace: RegionTrace | None = None) -> Predict:
    """Call a model for `draw_canvas`.

    Args:
        model: In evaluation mode.
        trace: Takes down which experts of a mixture of diffusers are used; None: nobody does.
    """

    def predict(
        rows: Sequence[int], latents: Tensor, times: Tensor, inputs: Inputs
    ) -> DenoiserOutput:
        output = model(latents, times, **inputs)
        if trace is not None and output.gates is not None:
            trace.add(rows, float(times[0]), output.gates[: len(rows)].float().cpu())
        return output

    return predict


class RegionTrace:
    """The weights of experts at every step of every region of a canvas."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._gates: dict[int, list[Tensor]] = {}

    def add(self, rows: Sequence[int], time: float, gates: Tensor) -> None:
        """Add a call of the model.

        Args:
            rows: Numbers of its regions.
            time: What its embedding of time was fed.
            gates: `(regions, experts)` float32 on the CPU.
        """
        if time not in self.times:
            self.times.append(time)
        for row, weights in zip(rows, gates, strict=True):
            self._gates.setdefault(row, []).append(weights)

    def table(self) -> tuple[list[int], NDArray[np.float32]]:
        """Numbers of the regions that were drawn, and `(regions, steps, experts)`."""
        rows = sorted(self._gates)
        return rows, torch.stack([torch.stack(self._gates[row]) for row in rows]).numpy()


def canvas_noise(
    canvas: Canvas, cell: int, channels: int, seed: int, device: torch.device | str
) -> StepNoise:
    """Make the noise of a canvas.

    It is that of the canvas's seed; in regions with a seed it is that of theirs, whatever canvas
    they are on; then come the rerolls. All of this holds for the noise of every step, so that
    samplers that add some do not undo it.

    Args:
        canvas: What is to be drawn.
        cell: Pixels to a side of a cell of latents.
        channels: Of latents.
        seed: Of the canvas.
        device: Where noise is needed.

    Returns:
        Gives noise `(1, channels, height, width)`.
    """
    only = torch.zeros(1, dtype=torch.int64, device="cpu")
    whole = noise_of_samples(seed, only, (channels, *canvas.cells(cell)), "cpu")

    def draw(step: int) -> Tensor:
        noise = whole(step)
        for region in canvas.regions:
            if region.seed is not None:
                view = region.rectangle.in_cells(cell).crop(noise)
                purpose = f"canvas/region/{step}"
                view.copy_(draw_normal(region.seed, only, view.shape[1:], purpose))
        for number, reroll in enumerate(canvas.rerolls):
            view = reroll.rectangle.in_cells(cell).crop(noise)
            # With the number, as the same noise twice would not have the variance of a sum of two.
            purpose = f"canvas/reroll/{number}/{step}"
            other = draw_normal(reroll.seed, only, view.shape[1:], purpose)
            epsilon = reroll.epsilon
            view.copy_(other if epsilon is None else mix_noise(view, other, epsilon))
        return noise.to(device)

    return draw


def compose(
    predict: Predict,
    args: Any,
    canvas: Canvas,
    cell: int,
    condition_of: ConditionOf,
    settings: ImageSettings,
    batch_size: int,
    device: torch.device | str,
) -> Denoiser:
    """Make a denoiser of a canvas out of a model of its regions.

    Arguments as of `draw_canvas`; `cell` is that of `canvas_noise`. Regions of equal shape go
    through the model together, those without guidance apart from those with; what a region's
    prediction is added to does not depend on that.
    """
    regions = canvas.regions
    places = [region.rectangle.in_cells(cell) for region in regions]
    weights = blending_weights(canvas, cell)
    drawn = [row for row, weight in enumerate(weights) if bool((weight > 0).any())]
    shares = {row: weights[row].float().to(device) for row in drawn}
    shape = (1, args.out_channels, *canvas.cells(cell))
    unguided = replace(settings, guidance=1.0)  # but for the scales

    def denoiser_of(rows: Sequence[int]) -> Denoiser:
        def model(latents: Tensor, times: Tensor, **inputs: Any) -> DenoiserOutput:
            return predict(rows, latents, times, inputs)

        found = torch.tensor([regions[row].guidance for row in rows], dtype=torch.float64)
        scales = None if bool((found == 1).all()) else found.to(device)
        return make_denoiser(model, args, condition_of(rows), unguided, scales)

    batches = [(rows, denoiser_of(rows)) for rows in _batch_regions(canvas, drawn, batch_size)]

    def denoise(latents: Tensor, times: Tensor) -> Tensor:
        predictions = {}
        for rows, denoiser in batches:
            crops = torch.cat([places[row].crop(latents) for row in rows])
            found = at_least_float32(denoiser(crops, times.repeat(len(rows))))
            predictions.update(zip(rows, found.split(1), strict=True))
        blended = torch.zeros(shape, device=latents.device)
        for row in drawn:  # in one order, as sums of several depend on it
            places[row].crop(blended).add_(shares[row] * predictions[row])
        return blended

    return denoise


def _batch_regions(canvas: Canvas, rows: Sequence[int], batch_size: int) -> list[list[int]]:
    """Sort regions into batches that the model can take at once."""
    groups: dict[tuple[int, int, bool], list[int]] = {}
    for row in rows:
        region = canvas.regions[row]
        key = region.rectangle.height, region.rectangle.width, region.guidance == 1
        groups.setdefault(key, []).append(row)
    return [
        group[first : first + batch_size]
        for group in groups.values()
        for first in range(0, len(group), batch_size)
    ]


def impose_references(
    canvas: Canvas,
    cell: int,
    process: Process,
    num_steps: int,
    noise: Tensor,
    vae: Vae | None = None,
) -> StepEdit | None:
    """Keep parts of a canvas at the noised pictures that they are to be like, in the first steps.

    Args:
        canvas: Has the pictures.
        cell: Pixels to a side of a cell of latents.
        process: Adds noise.
        num_steps: Steps in all.
        noise: That of the first step, `(1, channels, height, width)`; also noises the pictures.
        vae: Makes latents of pictures, if these are what the model sees.

    Returns:
        Edits the latents; None if there are no pictures.
    """
    if not canvas.images:
        return None
    imposed = [
        (
            image.rectangle.in_cells(cell),
            _reference_latents(image, noise.device, vae),
            count_imposed_steps(num_steps, image.strength),
        )
        for image in canvas.images
    ]

    def edit(done: int, time: float, latents: Tensor) -> Tensor:
        latents = latents.clone()
        times = torch.tensor([time], device=latents.device)
        for place, clean, last in imposed:
            if 1 <= done <= last:
                place.crop(latents).copy_(process.corrupt(clean, place.crop(noise), times))
        return latents

    return edit


def _reference_latents(
    image: ReferenceImage, device: torch.device | str, vae: Vae | None
) -> Tensor:
    """What the model would see of a picture, `(1, channels, height, width)` float32."""
    size = image.rectangle.width, image.rectangle.height
    resized = np.array(image.picture.resize(size, Image.Resampling.LANCZOS), np.float32)
    pixels = torch.from_numpy(resized / 127.5 - 1).permute(2, 0, 1)[None].to(device)
    return pixels if vae is None else vae.encode(pixels)
