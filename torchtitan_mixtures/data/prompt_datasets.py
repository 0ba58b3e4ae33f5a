"""Images with captions out of anything that `datasets.load_dataset` opens and that has an index."""

from __future__ import annotations

import functools
import io
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.aspect_ratios import Bucket, nearest_bucket
from torchtitan_mixtures.data.image_datasets import (
    STRINGS,
    PictureRows,
    describe_feature,
    open_columns,
)
from torchtitan_mixtures.data.image_files import crop_to_cover
from torchtitan_mixtures.data.image_sets import to_tensor
from torchtitan_mixtures.data.prompt_sets import PromptedImage, draw_caption
from torchtitan_mixtures.data.prompt_texts import Prompter
from torchtitan_mixtures.data.samples import usable_captions
from torchtitan_mixtures.data.text_embeddings import digest_captions
from torchtitan_mixtures.job_config import Multimodal

_KEYS = ("path", "name", "streaming", "image_column", "caption_column")

_MANY = 50_000
"""Pictures whose sizes take so long to read that it is worth a message."""


def open_captioned(config: Multimodal, key: str, split: str) -> datasets.Dataset:
    """Open a split; only its images, not decoded, and captions. The same when asked for again.

    Args:
        config: The `[multimodal]` section.
        key: The key that names the split, for messages.
        split: The split.

    Raises:
        ValueError: There is no such split or column, or no images or no texts in it; names the key.
    """
    keys = {name: getattr(config, name) for name in _KEYS}
    return _open_captioned(tuple(config.data_files), key, split, **keys)


# A start-up looks into the data several times: for the checks and each loader.
@functools.lru_cache(maxsize=8)
def _open_captioned(
    data_files: tuple[str, ...], key: str, split: str, **keys: Any
) -> datasets.Dataset:
    config = Multimodal(source="datasets", data_files=list(data_files), **keys)
    data = open_columns(config, key, split, "caption_column")
    column = config.caption_column
    check_texts(data, column, f'multimodal.caption_column = "{column}"')
    if not len(data):
        raise ValueError(f'{key}: split "{split}" of "{config.path}" is empty.')
    return data


def check_texts(data: datasets.Dataset, column: str, key: str) -> None:
    """Check that a column holds texts.

    Args:
        data: The data set.
        column: The column, which it has.
        key: The key that names it, for messages.

    Raises:
        ValueError: It holds something else.
    """
    feature: Any = data.features[column]
    item = feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else feature
    if not isinstance(item, datasets.Value) or item.dtype not in STRINGS:
        raise ValueError(
            f"{key}: holds {describe_feature(feature)}; it must hold strings, or lists of them."
        )


def iterate_column(data: datasets.Dataset, column: str) -> Iterator[Any]:
    """The values of a column, read in parts."""
    selected = cast(datasets.Dataset, data.select_columns([column]))
    for batch in selected.iter(batch_size=1000):
        yield from cast(dict[str, Any], batch)[column]


class CaptionedPictures:
    """The pictures of a split of a data set, cropped, and their captions.

    Args:
        config: The `[multimodal]` section.
        key: The key that names the split, for messages.
        split: The split.
        buckets: Shapes that pictures are cropped to, in pixels: each to the nearest.

    Attributes:
        shapes: `(3, height, width)` by the number of the shape.
        buckets: Number of the shape of each picture, `(pictures,)` int64.
    """

    def __init__(self, config: Multimodal, key: str, split: str, buckets: Sequence[Bucket]) -> None:
        self._rows = PictureRows(open_captioned(config, key, split), config, split)
        self._config = config
        self.shapes = tuple((3, bucket.height, bucket.width) for bucket in buckets)
        self.buckets = np.zeros(len(self), np.int64)
        if len(buckets) > 1:
            self.buckets = nearest_bucket(buckets, *self._read_sizes())

    def __len__(self) -> int:
        """Count the pictures."""
        return len(self._rows)

    def list_captions(self) -> Iterator[Any]:
        """The captions of all pictures, as they are in their column."""
        return iterate_column(self._rows.data, self._config.caption_column)

    def hash_captions(self) -> str:
        """Hash the captions of all pictures; see `digest_captions`."""
        return digest_captions(self.list_captions())[1]

    def read(self, index: int) -> tuple[NDArray[np.uint8], list[str]]:
        """Read a picture, `(height, width, 3)` uint8, and its captions.

        Raises:
            BrokenImageError: The picture cannot be read.
        """
        row = self._rows.data[index]
        _, height, width = self.shapes[self.buckets[index]]
        picture = crop_to_cover(self._rows.open_picture(row), height, width)
        return np.asarray(picture, np.uint8), usable_captions(row[self._config.caption_column])

    def key(self, index: int) -> str:
        """What finds the picture again, for messages."""
        return self._rows.key(index)

    def relative_key(self, index: int) -> str:
        """What finds the picture again within its split."""
        return self._rows.relative_key(index)

    def fingerprint(self) -> dict[str, Any]:
        """What tells these pictures from others."""
        keys = ("name", "data_files", "image_column", "caption_column")
        values = {f"multimodal.{key}": getattr(self._config, key) for key in keys}
        return {**values, "images of the split": len(self)}

    def _read_sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Heights and widths of all pictures, from the headers of their files alone."""
        if len(self) >= _MANY:
            logger.info(f"Reading the sizes of {len(self)} pictures of {self._config.path}")
        pictures: Any = self._rows.data.select_columns([self._config.image_column])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of absurd sizes, which reading the picture refuses
            sizes = [_read_size(self._rows.find_file(row)) for row in pictures]
        heights, widths = np.array(sizes, np.int64).T
        return heights, widths


class PromptedPictures:
    """Pictures of a split of a data set, prompted by their captions; see `CaptionedPictures`.

    Args:
        pictures: The pictures.
        prompter: Makes the prompts.
    """

    has_std = False

    def __init__(self, pictures: CaptionedPictures, prompter: Prompter) -> None:
        prompter.check_captions(pictures.hash_captions)
        self._pictures = pictures
        self.shapes = pictures.shapes
        self.buckets = pictures.buckets
        self.prompter = prompter

    def __len__(self) -> int:
        """See `PromptedSet.__len__`."""
        return len(self._pictures)

    def read(self, index: int, rng: random.Random, is_flipped: bool = False) -> PromptedImage:
        """See `PromptedSet.read`."""
        pixels, captions = self._pictures.read(index)
        caption = draw_caption(captions, index, rng)
        tensors, num_truncated = self.prompter.make(caption)
        image = to_tensor(pixels)
        image = image.flip(-1) if is_flipped else image
        return PromptedImage(image, None, tensors, caption.text, num_truncated)

    def key(self, index: int) -> str:
        """See `PromptedSet.key`."""
        return self._pictures.key(index)

    def relative_key(self, index: int) -> str:
        """See `PromptedSet.relative_key`."""
        return self._pictures.relative_key(index)

    def fingerprint(self) -> dict[str, Any]:
        """See `PromptedSet.fingerprint`."""
        return self._pictures.fingerprint()


def _read_size(value: Any) -> tuple[int, int]:
    """Height and width of a picture; of one that cannot be read a square's."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as picture:
            width, height = picture.size
            # Of a PNG without such data, asking for it would decode the picture.
            has_data = picture.format != "PNG" or "exif" in picture.info
            turned = has_data and picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    # Of broken files Pillow raises errors of any class, see `images.py`. The shape alone is asked
    # for here: the picture is read later, and what is wrong with it is said and counted then.
    except Exception:
        return 1, 1
    return (width, height) if turned else (height, width)
