"""What images are drawn of: inputs of a model beside latents and times, with and without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Any]
"""Keyword arguments of a model: tensors that begin with the batch, or mappings of such."""


@dataclass(frozen=True)
class Condition:
    """What the images of a batch are to be of.

    Attributes:
        given: What the model is told.
        without: What it is told in the other half of guidance; of the same names and shapes.
    """

    given: Inputs
    without: Inputs

    def both(self) -> Inputs:
        """Both after each other, for a batch of twice the size."""
        return _join(self.given, self.without)


def _join(first: Inputs, second: Inputs) -> dict[str, Any]:
    """Concatenate inputs along the batch."""
    return {
        name: _join(value, second[name])
        if isinstance(value, Mapping)
        else torch.cat([value, second[name]])
        for name, value in first.items()
    }


def is_prompted(args: Any) -> bool:
    """Say whether a model's images are of prompts, by its arguments."""
    return getattr(args, "is_prompted", False)


def class_condition(
    labels: Sequence[int] | Tensor, num_classes: int, device: torch.device | str
) -> Condition:
    """Images of classes; without them, of the class after the last.

    Args:
        labels: Class of each image, `(batch,)`.
        num_classes: Classes of the model.
        device: The model's.
    """
    classes = torch.as_tensor(labels, dtype=torch.int64, device=device)
    null = torch.full_like(classes, num_classes)
    return Condition({"class_labels": classes}, {"class_labels": null})


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts as a model takes them, in rows; see `PromptEncoder`.

    Attributes:
        tensors: What the model calls `prompts`: each `(prompts, ...)`.
        kept: Which encoders have something to say, `(prompts, encoders)` bool.
        is_spoken: Whether a prompt is spoken too, for each.
    """

    tensors: Mapping[str, Tensor]
    kept: Tensor
    is_spoken: tuple[bool, ...]

    def condition(
        self,
        rows: Sequence[int],
        device: torch.device | str,
        negative: EncodedPrompts | None = None,
    ) -> Condition:
        """Images of some of the prompts.

        Args:
            rows: Prompt of each image.
            device: The model's.
            negative: One prompt, to take the place of none in guidance.
        """
        given = self._select(rows, device)
        if negative is not None:
            return Condition(given, negative._select([0] * len(rows), device))
        return Condition(given, {**given, "kept": torch.zeros_like(given["kept"])})

    def _select(self, rows: Sequence[int], device: torch.device | str) -> dict[str, Any]:
        index = torch.tensor(list(rows), dtype=torch.int64)
        prompts = {name: tensor[index].to(device) for name, tensor in self.tensors.items()}
        return {"prompts": prompts, "kept": self.kept[index].to(device)}
