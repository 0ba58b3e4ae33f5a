"""Images with prompts that can be read in any order: drawings of emoji, and captioned latents.

What a sample is told of its image is drawn anew whenever it is read: another caption of a drawing,
another of an image's captions, another scene. A random generator given by the caller decides it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchtitan_mixtures.data.emoji import STYLES, EmojiCorpus
from torchtitan_mixtures.data.image_files import BrokenImageError
from torchtitan_mixtures.data.image_sets import drawing_key, to_tensor
from torchtitan_mixtures.data.latents import CaptionedLatents
from torchtitan_mixtures.data.prompt_texts import Caption, Prompter
from torchtitan_mixtures.data.spoken import voices_of


class PromptedImage(NamedTuple):
    """An image and its prompts.

    Attributes:
        image: `(channels, height, width)` float32; pixels in [-1, 1], or the mean of latents.
        std: Of latents, like `image`; None for pixels.
        prompts: By their keys in a batch, see `prompt_texts.py`.
        caption: The text that the prompts were made of.
        num_truncated: How many of the prompts were cut.
    """

    image: Tensor
    std: Tensor | None
    prompts: dict[str, Tensor]
    caption: str
    num_truncated: int = 0


class PromptedSet(Protocol):
    """The images of a split.

    Attributes:
        shapes: Of images, `(channels, height, width)`, by the number of the shape.
        buckets: Number of the shape of each image, `(images,)` int64.
        has_std: Whether images are latents with a standard deviation.
        prompter: Made the prompts.
    """

    shapes: tuple[tuple[int, int, int], ...]
    buckets: NDArray[np.int64]
    has_std: bool
    prompter: Prompter

    def __len__(self) -> int:
        """Count the images."""
        ...

    def read(self, index: int, rng: random.Random, is_flipped: bool = False) -> PromptedImage:
        """Read an image and draw its prompts.

        Args:
            index: Of the image.
            rng: What the prompts are drawn by; equal states give equal samples.
            is_flipped: Whether to mirror the image.

        Raises:
            BrokenImageError: The image cannot be read, or has no caption.
            ValueError: Nor can others, or a prompt is too long.
        """
        ...

    def key(self, index: int) -> str:
        """What finds the image again, for messages."""
        ...

    def relative_key(self, index: int) -> str:
        """What finds the image again within its split, wherever that lies."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What samples depend on, beside the keys of the TOML that all sets read."""
        ...


class PromptedEmoji:
    """The drawings of a split of the embedded corpus, and scenes composed of them.

    A share of the samples of a drawing show a scene in its place. A drawing is spoken too, for a
    model that hears, by one of the voices of the split; a scene is not.

    Args:
        split: A split of the corpus.
        size: Height and width: 16, 32 or 64.
        scene_fraction: Share of scenes.
        prompter: Makes the prompts.
        by_style: Whether a scene is of one style alone, that of the drawing it stands for.
    """

    has_std = False

    def __init__(
        self,
        split: str,
        size: int,
        scene_fraction: float,
        prompter: Prompter,
        by_style: bool = False,
    ) -> None:
        self._corpus = EmojiCorpus.load()
        self._drawings = self._corpus.drawings(split)
        self._pools = {style: self._drawings for style in STYLES}  # what scenes are composed of
        if by_style:
            for style in STYLES:
                self._pools[style] = tuple(d for d in self._drawings if d.style == style)
        self._split = split
        self._size = size
        self._scene_fraction = scene_fraction
        self._voices = voices_of(split)
        self._pixels: dict[int, NDArray[np.uint8]] = {}  # of drawings that were read before
        self.prompter = prompter
        self.shapes: tuple[tuple[int, int, int], ...] = ((3, size, size),)
        self.buckets = np.zeros(len(self._drawings), np.int64)

    def __len__(self) -> int:
        """See `PromptedSet.__len__`."""
        return len(self._drawings)

    def read(self, index: int, rng: random.Random, is_flipped: bool = False) -> PromptedImage:
        """See `PromptedSet.read`; never mirrored, which would make some captions false."""
        assert not is_flipped
        if rng.random() < self._scene_fraction:
            pool = self._pools[self._drawings[index].style]
            scene = self._corpus.compose_scene(rng, self._split, self._size, pool)
            tensors, num_truncated = self.prompter.make(Caption(scene.caption))
            image = to_tensor(scene.image)
            return PromptedImage(image, None, tensors, scene.caption, num_truncated)
        drawing = self._drawings[index]
        caption = self._corpus.caption(drawing, rng)
        units = []
        if self.prompter.hears:
            units = self._corpus.spoken(drawing.concept, rng.choice(self._voices))
        tensors, num_truncated = self.prompter.make(Caption(caption), units)
        if index not in self._pixels:
            self._pixels[index] = self._corpus.image(drawing, self._size)
        image = to_tensor(self._pixels[index])
        return PromptedImage(image, None, tensors, caption, num_truncated)

    def key(self, index: int) -> str:
        """See `PromptedSet.key`."""
        return drawing_key(self._drawings[index])

    def relative_key(self, index: int) -> str:
        """See `PromptedSet.relative_key`."""
        return drawing_key(self._drawings[index])

    def fingerprint(self) -> dict[str, Any]:
        """See `PromptedSet.fingerprint`."""
        return {
            "multimodal.scene_fraction": self._scene_fraction,
            "images of the split": len(self),
        }


class PromptedLatents:
    """Latents that were encoded before, with captions.

    Args:
        folder: Has a `latents.json` of captioned images.
        split: One of its splits.
        prompter: Makes the prompts.

    Raises:
        ValueError: A file is missing or corrupt; names it.
    """

    has_std = True

    def __init__(self, folder: Path, split: str, prompter: Prompter) -> None:
        self._latents = CaptionedLatents(folder, split)
        prompter.check_captions(lambda: self._latents.captions_sha256)
        self.prompter = prompter
        self.shapes = self._latents.shapes
        self.buckets = self._latents.buckets

    def __len__(self) -> int:
        """See `PromptedSet.__len__`."""
        return len(self._latents)

    def read(self, index: int, rng: random.Random, is_flipped: bool = False) -> PromptedImage:
        """See `PromptedSet.read`."""
        captions, row = self._latents.captions(index), int(self._latents.rows[index])
        caption = draw_caption(captions, row, rng)
        tensors, num_truncated = self.prompter.make(caption)
        mean, std = self._latents.moments(index, is_flipped)
        return PromptedImage(mean, std, tensors, caption.text, num_truncated)

    def key(self, index: int) -> str:
        """See `PromptedSet.key`."""
        return self._latents.key(index)

    def relative_key(self, index: int) -> str:
        """See `PromptedSet.relative_key`."""
        return self._latents.relative_key(index)

    def fingerprint(self) -> dict[str, Any]:
        """See `PromptedSet.fingerprint`."""
        return self._latents.fingerprint()


def draw_caption(captions: list[str], image: int, rng: random.Random) -> Caption:
    """Draw one of an image's captions.

    Args:
        captions: All that there are.
        image: Row of the split of the data set.
        rng: What decides.

    Raises:
        BrokenImageError: It has none.
    """
    if not captions:
        raise BrokenImageError("it has no caption, or an empty one")
    number = rng.randrange(len(captions))
    return Caption(captions[number], image, number)
