"""What a denoising model is told of the images of a batch, and what it is told in training only.

So that it can be guided, a model must know images without their condition: in training some samples
lose it (Ho and Salimans 2022, arXiv 2207.12598). A prompt that several encoders describe loses each
one's part by itself (Esser et al. 2024, arXiv 2403.03206, B.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.objectives.randomness import draw_normal, draw_uniform

PROMPT = "prompt_"
"""Prefix of what belongs to prompts in a batch."""

IDS = "_ids_"
"""Between the name of a prompt and the number of the frozen encoder whose tokens they are."""


class Condition(Protocol):
    """Makes of a batch what a model is told beside the image and the time."""

    def encode(self, input_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace what frozen encoders must see first by what they make of it; once per batch."""
        ...

    def inputs(
        self, input_dict: dict[str, Tensor], seed: int, purpose: str, is_training: bool
    ) -> dict[str, Any]:
        """Make further inputs of the model's `forward`.

        Args:
            input_dict: See `encode`; `sample_index` is on the CPU.
            seed: Of what is drawn.
            purpose: What it is drawn for.
            is_training: Whether samples lose their condition.

        Returns:
            Tensors with a row for each sample, or dictionaries of such.
        """
        ...


class ClassCondition:
    """The class of an image, and noise for the router if the model takes some.

    Args:
        num_classes: The number that stands for "no class".
        dropout: Share of samples that lose their class.
        router_noise: Shape of a sample's noise; None: none.
    """

    def __init__(
        self, num_classes: int, dropout: float, router_noise: Sequence[int] | None = None
    ) -> None:
        self._num_classes = num_classes
        self._dropout = dropout
        self._router_noise = router_noise

    def encode(self, input_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Condition`: classes are as they are."""
        return input_dict

    def inputs(
        self, input_dict: dict[str, Tensor], seed: int, purpose: str, is_training: bool
    ) -> dict[str, Any]:
        """See `Condition`: `class_labels` `(batch,)`, and `router_noise` `(batch, layers, dim)`."""
        classes, samples = input_dict["class_labels"], input_dict["sample_index"]
        if not is_training:
            return {"class_labels": classes}
        drawn = draw_uniform(seed, samples, f"{purpose}, class dropout").to(classes.device)
        null = torch.full_like(classes, self._num_classes)
        inputs = {"class_labels": torch.where(drawn < self._dropout, null, classes)}
        if self._router_noise is not None:
            noise = draw_normal(seed, samples, self._router_noise, f"{purpose}, router")
            inputs["router_noise"] = noise.to(classes.device)
        return inputs


class PromptCondition:
    """The prompts of an image.

    Args:
        specs: Those of the model.
        dropout: Share of samples that lose what one encoder says of a prompt.
        encoders: Folders of the frozen encoders of texts that come as ids; empty: none do.
        encoder_dtype: What these compute in.
    """

    def __init__(
        self,
        specs: Sequence[PromptSpec],
        dropout: float,
        encoders: Sequence[str] = (),
        encoder_dtype: str = "float32",
    ) -> None:
        self._specs = specs
        self._dropout = dropout
        self._folders = encoders
        self._encoder_dtype = getattr(torch, encoder_dtype)
        self._encoders: Any = None  # loaded when the first batch comes

    def encode(self, input_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Condition`: ids for frozen encoders become embeddings."""
        prefix = f"{PROMPT}text{IDS}"
        names = [name for name in input_dict if name.startswith(prefix)]
        if not names:
            return input_dict
        if self._encoders is None:
            from torchtitan_mixtures.data.text_encoders import FrozenTextEncoders

            device = input_dict[names[0]].device
            self._encoders = FrozenTextEncoders(self._folders, device, dtype=self._encoder_dtype)
        ids = [input_dict[f"{prefix}{number}"] for number in range(len(names))]
        embeddings, pooled = self._encoders.encode_ids(ids)
        encoded = {k: v for k, v in input_dict.items() if k not in names}
        encoded[f"{PROMPT}text"] = embeddings
        if pooled.shape[1]:
            encoded[f"{PROMPT}text_pooled"] = pooled
        return encoded

    def inputs(
        self, input_dict: dict[str, Tensor], seed: int, purpose: str, is_training: bool
    ) -> dict[str, Any]:
        """See `Condition`: `prompts` by name, and in training `kept` `(batch, encoders)` bool."""
        prompts = {
            name.removeprefix(PROMPT): tensor
            for name, tensor in input_dict.items()
            if name.startswith(PROMPT)
        }
        inputs: dict[str, Any] = {"prompts": prompts}
        if is_training and self._dropout > 0:
            samples, device = input_dict["sample_index"], input_dict["input"].device
            drawn = [
                draw_uniform(seed, samples, f"{purpose}, dropout of {spec.name} {number}")
                for spec in self._specs
                for number in range(spec.num_encoders)
            ]
            inputs["kept"] = (torch.stack(drawn, 1) >= self._dropout).to(device)
        return inputs


class RoutedCondition:
    """What experts are told, and what a mixture of them is told beside it in training.

    Args:
        inner: The experts' condition.
        router_noise: Shape of a sample's noise for the router; None: none.
        by_domain: Whether a sample is the business of its domain's expert alone.
    """

    def __init__(
        self, inner: Condition, router_noise: Sequence[int] | None, by_domain: bool
    ) -> None:
        self._inner = inner
        self._router_noise = router_noise
        self._by_domain = by_domain

    def encode(self, input_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Condition`."""
        return self._inner.encode(input_dict)

    def inputs(
        self, input_dict: dict[str, Tensor], seed: int, purpose: str, is_training: bool
    ) -> dict[str, Any]:
        """See `Condition`: in training also `router_noise`, or `domain_labels` `(batch,)`."""
        inputs = self._inner.inputs(input_dict, seed, purpose, is_training)
        if not is_training:
            return inputs
        if self._by_domain:
            inputs["domain_labels"] = input_dict["domain_labels"]
        if self._router_noise is not None:
            samples, device = input_dict["sample_index"], input_dict["input"].device
            noise = draw_normal(seed, samples, self._router_noise, f"{purpose}, router")
            inputs["router_noise"] = noise.to(device)
        return inputs
