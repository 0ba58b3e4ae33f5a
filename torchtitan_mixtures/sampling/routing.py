"""Which experts of a mixture of diffusers draw an image, and when."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from torchtitan_mixtures.objectives.denoising import is_mixture_of_diffusers
from torchtitan_mixtures.objectives.outputs import DenoiserOutput
from torchtitan_mixtures.studies.chart import Line, Panel, Point, draw_chart

JSON_NAME = "routing.json"
PICTURE_NAME = "routing.png"

MAX_PANELS = 4
"""Subjects that `routing.png` shows, the first ones."""


@dataclass
class RoutingTrace:
    """The weights of experts at every step of every image that was drawn.

    Attributes:
        experts: Their names.
        steps: Of each call of the model what its embedding of time was fed, and the weights,
            `(batch, experts)` float32 on the CPU.
    """

    experts: Sequence[str]
    steps: list[tuple[float, Tensor]] = field(default_factory=list)

    def table(self, batches: Sequence[int]) -> tuple[list[float], NDArray[np.float32]]:
        """Arrange the weights by image.

        Args:
            batches: Images of each batch that was drawn, one batch after the other with the same
                steps.

        Returns:
            The time of each step, and `(images, steps, experts)`.
        """
        count = len(self.steps) // len(batches)
        times = [time for time, _ in self.steps[:count]]
        parts = [
            torch.stack([gates for _, gates in self.steps[first : first + count]], 1)
            for first in range(0, len(self.steps), count)
        ]
        return times, torch.cat(parts).numpy()


class Routing:
    """What a sampler tells a mixture of diffusers beside the condition; nothing of other models.

    Both halves of guidance have the same weights: then guiding the mixture is the same as mixing
    guided experts.

    Args:
        args: The model's arguments.
        once: Whether the weights of the first step are kept for all others.
        trace: Takes down the weights; None: nobody does.
    """

    def __init__(self, args: Any, once: bool = False, trace: RoutingTrace | None = None) -> None:
        self._is_mixture = is_mixture_of_diffusers(args)
        # What the prompt alone decides is the same at each step.
        self._once = once or (self._is_mixture and set(args.router_inputs) == {"prompt"})
        self._trace = trace
        self._gates: Tensor | None = None

    def inputs(self, copies: int) -> dict[str, Any]:
        """Further inputs of the model, for a batch that is so many copies of the same samples."""
        if not self._is_mixture:
            return {}
        return {"copies": copies, "gates": self._gates}

    def see(self, times: Tensor, output: DenoiserOutput, copies: int) -> None:
        """Look at what the model did."""
        if output.gates is None:
            return
        gates = output.gates[: len(output.gates) // copies]
        if self._once:
            self._gates = gates
        if self._trace is not None:
            self._trace.steps.append((float(times[0]), gates.float().cpu()))


def write_trace(
    folder: Path,
    experts: Sequence[str],
    times: Sequence[float],
    weights: NDArray[np.float32],
    labels: Sequence[str],
    columns: int,
) -> None:
    """Write who was used when: `routing.json` has every number, `routing.png` means of subjects.

    Args:
        folder: That of the images.
        experts: Their names.
        times: That of each step.
        weights: `(images, steps, experts)`.
        labels: What the images are of.
        columns: Images of each of these, one after the other.
    """
    content = {
        "experts": list(experts),
        "times": list(times),
        "images": [
            {"number": number, "subject": labels[number // columns], "weights": rows}
            for number, rows in enumerate(weights.round(6).tolist())
        ],
    }
    (folder / JSON_NAME).write_text(json.dumps(content, ensure_ascii=False) + "\n")
    panels = [
        Panel(label, _lines(weights[row * columns : (row + 1) * columns], experts))
        for row, label in enumerate(labels[:MAX_PANELS])
    ]
    Image.fromarray(draw_chart(panels, "step", "weight of experts")).save(folder / PICTURE_NAME)


def _lines(weights: NDArray[np.float32], experts: Sequence[str]) -> list[Line]:
    """The mean weight of each expert at each step, of `(images, steps, experts)`."""
    means = weights.mean(0)
    return [
        Line(name, [Point(step + 1, float(row[number])) for step, row in enumerate(means)])
        for number, name in enumerate(experts)
    ]


def summarize(experts: Sequence[str], weights: NDArray[np.float32]) -> str:
    """The mean weight of each expert over all images and steps, in words."""
    means = weights.mean((0, 1))
    parts = [f"{name} {mean:.0%}" for name, mean in zip(experts, means, strict=True)]
    return f"Weights of the experts: {', '.join(parts)}"
