"""Batches of class images: read in an order that depends on no rank, worker or batch size.

The samples of a run have numbers g = 0, 1, 2, ... over all ranks, steps and epochs. Sample g is in
epoch g // images, at place g % images of that epoch's order, which follows from the seed and the
epoch. A step takes the next samples, as many as the global batch has; a microbatch of all ranks the
next `ranks * local_batch_size` of them, of which each rank takes a run. So what a step sees depends
on no rank, worker or local batch size, and all there is to save is how many samples are consumed.

A batch is `(input_dict, labels)`:

| key            | shape, dtype                               | meaning                            |
|----------------|--------------------------------------------|------------------------------------|
| `input`        | `(batch, channels, height, width)` float32 | pixels in [-1, 1], or mean latents |
| `latent_std`   | like `input`; for encoded latents alone    | their standard deviation           |
| `class_labels` | `(batch,)` int64, or of multi-label data   | class, or classes and then -1      |
|                | `(batch, max_labels)`                      |                                    |
| `domain_labels`| `(batch,)` int64; only with domains        | see `domains.py`; padding: 0       |
| `sample_index` | `(batch,)` int64                           | g; in validation the image's index |
| labels         | `(batch, tokens)` int64; of a classifier   | 0, or -100 = no loss               |
|                | `(batch, 1)`                               |                                    |

A broken image is counted and logged, and the run stops when there are too many
(`multimodal.max_bad_fraction`). In training the next one that can be read takes its place, in
validation it is left without loss.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from torchtitan_mixtures.data.augment import Augmentation
from torchtitan_mixtures.data.batch import IGNORE_INDEX
from torchtitan_mixtures.data.domains import Domains
from torchtitan_mixtures.data.image_files import BrokenImageError
from torchtitan_mixtures.data.image_sets import ClassImage, ImageSet
from torchtitan_mixtures.data.shards import Share
from torchtitan_mixtures.data.sources import document_rng, epoch_order
from torchtitan_mixtures.job_config import Multimodal

NO_CLASS = -1
"""What follows the classes of an image that has fewer than others."""

MAX_REPLACEMENTS = 100
"""Broken images in a row after which no replacement is looked for any more."""


class Draw(NamedTuple):
    """A sample as it was read.

    Attributes:
        number: Its `sample_index`.
        image: What the split says of it, such as a `ClassImage`; None if it could not be read.
        broken: Key and reason of every image that was tried in vain.
        domain: Number of the domain of the image, if there are domains.
    """

    number: int
    image: Any
    broken: Sequence[tuple[str, str]] = ()
    domain: int = 0


class CollatedDraws(NamedTuple):
    """A batch, and what is to be counted of it."""

    input_dict: dict[str, Tensor]
    labels: Tensor
    num_read: int
    broken: list[tuple[str, str]]
    num_truncated: int = 0  # prompts that were cut


class AnyCollator(Protocol):
    """Makes batches of draws of some kind."""

    @property
    def batch_size(self) -> int:
        """Samples of a batch; if there are fewer, the rest is padding without loss."""
        ...

    def __call__(self, draws: Sequence[Draw]) -> CollatedDraws:
        """Make a batch."""
        ...


@dataclass(frozen=True)
class Collator:
    """Makes batches of draws.

    Attributes:
        shape: Of an image, `(channels, height, width)`.
        has_std: Whether images are latents with a standard deviation.
        num_tokens: Positions of an image that are supervised.
        batch_size: Samples of a batch; if there are fewer, the rest is padding without loss.
        max_labels: Classes of an image at most; 1 = it has exactly one.
        has_domains: Whether images have domains.
    """

    shape: tuple[int, int, int]
    has_std: bool
    num_tokens: int
    batch_size: int
    max_labels: int = 1
    has_domains: bool = False

    def __call__(self, draws: Sequence[Draw]) -> CollatedDraws:
        """Make a batch; what could not be read has no loss."""
        size = self.batch_size
        inputs = {"input": torch.zeros(size, *self.shape)}
        if self.has_std:
            inputs["latent_std"] = torch.zeros(size, *self.shape)
        inputs["class_labels"] = torch.zeros(size, dtype=torch.int64)
        if self.max_labels > 1:
            inputs["class_labels"] = torch.full((size, self.max_labels), NO_CLASS)
        if self.has_domains:
            inputs["domain_labels"] = torch.zeros(size, dtype=torch.int64)
        inputs["sample_index"] = torch.zeros(size, dtype=torch.int64)
        labels = torch.full((size, self.num_tokens), IGNORE_INDEX)
        for row, draw in enumerate(draws):
            inputs["sample_index"][row] = draw.number
            if draw.image is None:
                continue
            inputs["input"][row] = draw.image.image
            if draw.image.std is not None:
                inputs["latent_std"][row] = draw.image.std
            if self.has_domains:
                inputs["domain_labels"][row] = draw.domain
            label = draw.image.label
            if isinstance(label, int):
                inputs["class_labels"][row] = label
            else:
                inputs["class_labels"][row, : len(label)] = torch.tensor(label, dtype=torch.int64)
            labels[row] = 0
        num_read = sum(draw.image is not None for draw in draws)
        return CollatedDraws(inputs, labels, num_read, [b for draw in draws for b in draw.broken])


class AnyImages(Protocol):
    """Images of a split, whatever comes with them."""

    def __len__(self) -> int:
        """Count the images."""
        ...

    def key(self, index: int) -> str:
        """What finds an image again, for messages."""
        ...


class EndlessImages(IterableDataset, ABC):
    """The microbatches of one data-parallel rank, endless.

    With worker processes, iterating yields every w-th of them, such that `DataLoader`, which asks
    its workers in turn, has them all in order.

    Args:
        images: The split.
        seed: Of the order.
        rank: Data-parallel rank.
        collator: Makes batches.
        domains: Which images are taken, and how often; None = all, once in an epoch.
    """

    def __init__(
        self,
        images: AnyImages,
        seed: int,
        rank: Share,
        collator: AnyCollator,
        domains: Domains | None = None,
    ) -> None:
        self.num_consumed = 0
        """Samples that were handed out on all ranks together; where the next iteration starts."""
        self.samples_of_round = collator.batch_size * rank.count
        self._images = images
        self._seed = seed
        self._rank = rank
        self._collator = collator
        self._domains = domains
        self._orders: dict[int, NDArray[np.int64]] = {}  # of the latest epochs

    @property
    def num_images(self) -> int:
        """Images that are taken."""
        return len(self._images) if self._domains is None else len(self._domains.chosen)

    @property
    def samples_of_epoch(self) -> int:
        """Samples after which every image was taken once more, or domains had their shares."""
        return self.num_images

    def __iter__(self) -> Iterator[CollatedDraws]:
        """Iterate from `num_consumed` on."""
        worker = _this_worker()
        batch_size = self._collator.batch_size
        first_of_rank = self.num_consumed + self._rank.index * batch_size
        for round_ in itertools.count(worker.index, worker.count):
            first = first_of_rank + round_ * self.samples_of_round
            yield self._collator([self.draw(first + place) for place in range(batch_size)])

    def draw(self, number: int) -> Draw:
        """Read a sample of the run; for a broken one the next that is not."""
        broken = []
        for candidate in self._candidates(number):
            try:
                image = self._read(candidate, number)
                return Draw(number, image, broken, _domain_of(self._domains, candidate))
            except BrokenImageError as error:
                broken.append((self._images.key(candidate), str(error)))
        return Draw(number, None, broken)

    @abstractmethod
    def _read(self, index: int, number: int) -> Any:
        """Read an image for a sample; what is drawn depends on the sample's number alone."""

    def _candidates(self, number: int) -> Iterable[int]:
        """The image of a sample, and those that may take its place, in order."""
        size = self.samples_of_epoch
        epoch, place = divmod(number, size)
        index = int(self._order(epoch)[place])
        if self._domains is not None:
            return from_member(self._domains.members_like(index), index)
        return ((index + step) % size for step in range(min(size, MAX_REPLACEMENTS)))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The image of each sample of an epoch, `(samples_of_epoch,)`."""
        if epoch not in self._orders:
            self._orders[epoch] = self._make_order(epoch)
            for finished in sorted(self._orders)[:-2]:  # a microbatch may lie in two
                del self._orders[finished]
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> NDArray[np.int64]:
        if self._domains is not None:
            return self._domains.order(self._seed, epoch)
        return epoch_order(self._seed, epoch, len(self._images))


class TrainingImages(EndlessImages):
    """Microbatches of images with classes.

    Args:
        images: The split.
        config: The `[multimodal]` section.
        rank: Data-parallel rank.
        collator: Makes batches.
        augmentation: Changes images; None = leave them as they are.
        domains: See `EndlessImages`.
    """

    def __init__(
        self,
        images: ImageSet,
        config: Multimodal,
        rank: Share,
        collator: Collator,
        augmentation: Augmentation | None = None,
        domains: Domains | None = None,
    ) -> None:
        super().__init__(images, config.seed, rank, collator, domains)
        self.images = images
        self._random_flip = config.random_flip
        self._augmentation = augmentation

    def _read(self, index: int, number: int) -> ClassImage:
        is_flipped = self._random_flip and is_mirrored(self._seed, number)
        if self._augmentation is None:
            return self.images.read(index, is_flipped)
        crop = self._augmentation.crop(self._seed, number)
        image = self.images.read(index, is_flipped, crop)
        pixels = self._augmentation.apply(image.image, self._seed, number)
        return image._replace(image=pixels)


def is_mirrored(seed: int, number: int) -> bool:
    """Whether a sample is among the half that is mirrored."""
    return document_rng(seed, number, "flip").random() < 0.5


class ImagePass(IterableDataset, ABC):
    """One pass over a split in a fixed mixed order, in batches of one data-parallel rank.

    Mixed, since `validation.steps` may end it early and the images are sorted by class; the order
    is that of no seed, so that runs can be compared. All ranks have the same number of batches.

    Args:
        images: The split.
        rank: Data-parallel rank.
        collator: Makes batches.
        max_batches: Batches of a pass at most; -1 = no limit.
        domains: Which images are taken; None = all.
    """

    def __init__(
        self,
        images: AnyImages,
        rank: Share,
        collator: AnyCollator,
        max_batches: int = -1,
        domains: Domains | None = None,
    ) -> None:
        self._images = images
        self._domains = domains
        self._rank = rank
        self._collator = collator
        self._samples_of_round = collator.batch_size * rank.count
        rounds = self._make_rounds()
        self._rounds = rounds if max_batches == -1 else rounds[:max_batches]
        self.num_batches = len(self._rounds)
        self.num_images = sum(map(len, self._rounds))
        """Images of a pass, of all ranks together."""

    def __iter__(self) -> Iterator[CollatedDraws]:
        """Ranks share the images of a round in turns, workers alternate in rounds."""
        worker = _this_worker()
        for of_all_ranks in self._rounds[worker.index :: worker.count]:
            of_rank = of_all_ranks[self._rank.index :: self._rank.count]
            yield self._collator([self._draw(int(index)) for index in of_rank])

    @abstractmethod
    def _read(self, index: int) -> Any:
        """Read an image, the same in every pass."""

    def _draw(self, index: int) -> Draw:
        try:
            return Draw(index, self._read(index), (), _domain_of(self._domains, index))
        except BrokenImageError as error:
            return Draw(index, None, [(self._images.key(index), str(error))])

    def _make_rounds(self) -> list[NDArray[np.int64]]:
        """The images of each batch of all ranks together; the last may have fewer."""
        return split_evenly(self._pass_order(), self._samples_of_round)

    def _pass_order(self) -> NDArray[np.int64]:
        """The images of a pass, mixed; some of them are in the order that all would be in."""
        order = epoch_order(0, 0, len(self._images), "validation")
        return order if self._domains is None else order[np.isin(order, self._domains.chosen)]


class ValidationImages(ImagePass):
    """A pass over images with classes.

    Args:
        images: The split.
        rank: Data-parallel rank.
        collator: Makes batches.
        max_batches: Batches of a pass at most; -1 = no limit.
        domains: See `ImagePass`.
    """

    def __init__(
        self,
        images: ImageSet,
        rank: Share,
        collator: Collator,
        max_batches: int = -1,
        domains: Domains | None = None,
    ) -> None:
        super().__init__(images, rank, collator, max_batches, domains)
        self.images = images

    def _read(self, index: int) -> ClassImage:
        return self.images.read(index)


def split_evenly(order: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Cut an order into parts of `size`, the last of which may be shorter."""
    return [order[start : start + size] for start in range(0, len(order), size)]


def from_member(members: NDArray[np.int64], index: int) -> Iterator[int]:
    """An image and those that may take its place: the members after it, in a circle."""
    first = int(np.searchsorted(members, index))
    for step in range(min(len(members), MAX_REPLACEMENTS)):
        yield int(members[(first + step) % len(members)])


def _domain_of(domains: Domains | None, index: int) -> int:
    return 0 if domains is None else int(domains.labels[index])


def _this_worker() -> Share:
    info = get_worker_info()
    return Share(info.id, info.num_workers) if info else Share(0, 1)
