"""Batches of prompted images: read in an order that depends on no rank, worker or batch size.

The order is that of `image_batches.py`. With several shapes of images (`aspect_ratios.py`) all
samples of a step share one, so there the order is one of whole global batches: in an epoch each
shape has its images in an order of its own, cut into global batches, the last of which is filled up
with the first of its images once more; the batches of all shapes are mixed. Then an epoch has a few
more samples than images, and the order depends on the global batch size.

What is drawn for a sample (its caption, a scene, a voice, whether it is mirrored) depends on the
seed and its number alone, in validation on its image alone.

A batch is `(input_dict, labels)`:

| key            | shape, dtype                               | meaning                            |
|----------------|--------------------------------------------|------------------------------------|
| `input`        | `(batch, channels, height, width)` float32 | pixels in [-1, 1], or mean latents |
| `latent_std`   | like `input`; for encoded latents alone    | their standard deviation           |
| `prompt_...`   | `(batch, ...)`                             | see `prompt_texts.py`              |
| `domain_labels`| `(batch,)` int64; only with domains        | see `domains.py`; padding: 0       |
| `sample_index` | `(batch,)` int64                           | g; in validation the image's index |
| labels         | `(batch, tokens)` int64                    | 0, or -100 = no loss               |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.batch import IGNORE_INDEX
from torchtitan_mixtures.data.domains import Domains
from torchtitan_mixtures.data.image_batches import (
    CollatedDraws,
    Draw,
    EndlessImages,
    ImagePass,
    from_member,
    is_mirrored,
    split_evenly,
)
from torchtitan_mixtures.data.image_counter import BrokenImageCounter
from torchtitan_mixtures.data.prompt_sets import PromptedImage, PromptedSet
from torchtitan_mixtures.data.shards import Share
from torchtitan_mixtures.data.sources import document_rng, epoch_order
from torchtitan_mixtures.job_config import Multimodal


@dataclass(frozen=True)
class PromptCollator:
    """Makes batches of draws, all of one shape.

    Attributes:
        images: The split.
        patch: Side of a patch of `input`; each is a position that is supervised.
        batch_size: Samples of a batch; if there are fewer, the rest is padding without loss.
        has_domains: Whether images have domains.
    """

    images: PromptedSet
    patch: int
    batch_size: int
    has_domains: bool = False

    def __call__(self, draws: Sequence[Draw]) -> CollatedDraws:
        """Make a batch; what could not be read has no loss."""
        size = self.batch_size
        read = [draw.image for draw in draws if draw.image is not None]
        shape = tuple(read[0].image.shape) if read else self.images.shapes[0]
        inputs = {"input": torch.zeros(size, *shape)}
        if self.images.has_std:
            inputs["latent_std"] = torch.zeros(size, *shape)
        blanks = self.images.prompter.blank
        for key, blank in blanks.items():
            inputs[key] = blank.new_empty(size, *blank.shape)
        if self.has_domains:
            inputs["domain_labels"] = torch.zeros(size, dtype=torch.int64)
        inputs["sample_index"] = torch.zeros(size, dtype=torch.int64)
        num_tokens = (shape[1] // self.patch) * (shape[2] // self.patch)
        labels = torch.full((size, num_tokens), IGNORE_INDEX)
        blank_rows = set(range(size))
        for row, draw in enumerate(draws):
            inputs["sample_index"][row] = draw.number
            if draw.image is not None:
                _put_row(inputs, row, draw.image)
                if self.has_domains:
                    inputs["domain_labels"][row] = draw.domain
                labels[row] = 0
                blank_rows.remove(row)
        for row in blank_rows:
            for key, blank in blanks.items():
                inputs[key][row] = blank
        broken = [each for draw in draws for each in draw.broken]
        num_truncated = sum(image.num_truncated for image in read)
        return CollatedDraws(inputs, labels, len(read), broken, num_truncated)


def _put_row(inputs: dict[str, Tensor], row: int, image: PromptedImage) -> None:
    inputs["input"][row] = image.image
    if image.std is not None:
        inputs["latent_std"][row] = image.std
    for key, prompt in image.prompts.items():
        inputs[key][row] = prompt


class PromptCounter(BrokenImageCounter):
    """Counts prompts that were cut, too, and warns of them: ever more seldom, and in total.

    Args:
        config: The `[multimodal]` section.
        split: Name of the split, for messages.
        num_images: Images of an epoch, of all ranks together.

    Attributes:
        num_truncated: Prompts of this rank that were cut so far.
    """

    def __init__(self, config: Multimodal, split: str, num_images: int) -> None:
        super().__init__(config, split, num_images)
        self.num_truncated = 0
        self._num_prompted = 0
        self._split = split

    def add(self, batch: CollatedDraws) -> None:
        """Count the images and prompts of a batch."""
        before = self.num_truncated
        self.num_truncated += batch.num_truncated
        self._num_prompted += batch.num_read
        if before.bit_length() < self.num_truncated.bit_length():  # 1, 2, 4, 8, ...
            self._warn("so far")
        super().add(batch)

    def end_epoch(self) -> None:
        """Judge a whole epoch, and say how many prompts were cut."""
        if self.num_truncated:
            self._warn("at the end of a pass")
        super().end_epoch()

    def _warn(self, when: str) -> None:
        logger.warning(
            f'{self.num_truncated} prompts in {self._num_prompted} samples of split "{self._split}"'
            f" were cut {when}: they are longer than their encoder's window (multimodal."
            'long_prompts = "refuse" makes that an error).'
        )


class PromptTraining(EndlessImages):
    """The microbatches of one data-parallel rank, endless; see `EndlessImages`.

    Args:
        images: The split.
        config: The `[multimodal]` section.
        rank: Data-parallel rank.
        collator: Makes batches.
        global_batch_size: Samples of a step, of all ranks together.
        domains: See `EndlessImages`; their shares are not for several shapes of images.
    """

    def __init__(
        self,
        images: PromptedSet,
        config: Multimodal,
        rank: Share,
        collator: PromptCollator,
        global_batch_size: int,
        domains: Domains | None = None,
    ) -> None:
        super().__init__(images, config.seed, rank, collator, domains)
        self.images = images
        self._random_flip = config.random_flip
        self._global_batch_size = global_batch_size
        numbers = range(len(images.shapes))
        chosen = np.arange(len(images)) if domains is None else domains.chosen
        self._members = [chosen[images.buckets[chosen] == number] for number in numbers]

    @property
    def has_buckets(self) -> bool:
        """Whether there are several shapes, and so an order of whole global batches."""
        return len(self._members) > 1

    @property
    def bucket_sizes(self) -> list[int]:
        """Images of each shape."""
        return [len(members) for members in self._members]

    @property
    def samples_of_epoch(self) -> int:
        """Samples after which every image was taken once more."""
        if not self.has_buckets:
            return super().samples_of_epoch
        size = self._global_batch_size
        return sum(-(-len(members) // size) * size for members in self._members)

    def _read(self, index: int, number: int) -> PromptedImage:
        is_flipped = self._random_flip and is_mirrored(self._seed, number)
        return self.images.read(index, document_rng(self._seed, number, "prompt"), is_flipped)

    def _candidates(self, number: int) -> Iterable[int]:
        """The image of a sample, and those of its shape that may take its place, in order."""
        if not self.has_buckets:
            return super()._candidates(number)
        epoch, place = divmod(number, self.samples_of_epoch)
        index = int(self._order(epoch)[place])
        return from_member(self._members[self.images.buckets[index]], index)

    def _make_order(self, epoch: int) -> NDArray[np.int64]:
        if not self.has_buckets:
            return super()._make_order(epoch)
        batches = []
        for number, members in enumerate(self._members):
            order = members[epoch_order(self._seed, epoch, len(members), f"bucket {number}")]
            whole = -(-len(members) // self._global_batch_size) * self._global_batch_size
            batches += split_evenly(np.resize(order, whole), self._global_batch_size)
        mixed = epoch_order(self._seed, epoch, len(batches), "batches")
        return np.concatenate([batches[number] for number in mixed])


class PromptValidation(ImagePass):
    """One pass over a split; see `ImagePass`. All images of a batch of all ranks share a shape.

    Args:
        images: The split.
        rank: Data-parallel rank.
        collator: Makes batches.
        max_batches: Batches of a pass at most; -1 = no limit.
        domains: See `ImagePass`.
    """

    def __init__(
        self,
        images: PromptedSet,
        rank: Share,
        collator: PromptCollator,
        max_batches: int = -1,
        domains: Domains | None = None,
    ) -> None:
        self.images = images
        super().__init__(images, rank, collator, max_batches, domains)

    def _read(self, index: int) -> PromptedImage:
        return self.images.read(index, document_rng(0, index, "validation prompt"))

    def _make_rounds(self) -> list[NDArray[np.int64]]:
        if len(self.images.shapes) == 1:
            return super()._make_rounds()
        order = self._pass_order()
        buckets = self.images.buckets[order]
        rounds = [
            part
            for number in range(len(self.images.shapes))
            for part in split_evenly(order[buckets == number], self._samples_of_round)
        ]
        mixed = epoch_order(0, 0, len(rounds), "validation batches")
        return [rounds[number] for number in mixed]
