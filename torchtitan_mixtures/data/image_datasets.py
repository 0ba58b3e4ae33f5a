"""Images with classes out of anything that `datasets.load_dataset` opens and that has an index.

Classes are those of the training split: the names of a `ClassLabel`, the whole numbers from 0 to
the largest, or the strings there are, sorted. In a column of lists of these, an image may have
several classes or none.

Labels are checked in the columns as Arrow maps them from disk; an image is read when it is asked
for.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray
from PIL import Image

from torchtitan_mixtures.data.image_files import BrokenImageError, Crop, crop_picture
from torchtitan_mixtures.data.image_sets import ClassImage, to_tensor
from torchtitan_mixtures.data.images import open_image
from torchtitan_mixtures.data.opening import open_split
from torchtitan_mixtures.job_config import Multimodal

_compute: Any = pyarrow.compute  # whose functions are made at run time

MAX_CLASSES = 2**20
"""Classes that a column of whole numbers may have; more are rather something else's numbers."""

_KEYS = ("path", "name", "train_split", "streaming", "image_column", "label_column")

STRINGS = ("string", "large_string")
_BYTES = ("binary", "large_binary")


@dataclass(frozen=True)
class LabelType:
    """What a column of labels holds: classes as `kind`, or lists of them."""

    kind: Literal["names", "numbers", "strings"]
    is_list: bool
    names: tuple[str, ...] = ()  # of a `ClassLabel`


class ClassDataset:
    """A data set with a column of images and one of classes.

    Args:
        config: The `[multimodal]` section.

    Raises:
        ValueError: It cannot be opened, or its training split has not what it must; names the key.
    """

    def __init__(self, config: Multimodal) -> None:
        self._config = config
        self._splits: dict[str, datasets.Dataset] = {}
        key, split = "multimodal.train_split", config.train_split
        self.label_type = self._type_of_labels(self._open(key, split))
        self.class_names = self._name_classes(key, split)
        self.number_of = {name: number for number, name in enumerate(self.class_names)}

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have several classes, or none."""
        return self.label_type.is_list

    def open(self, key: str, split: str) -> datasets.Dataset:
        """Open a split; only the columns needed, images not decoded.

        Raises:
            ValueError: There is no such split, or its labels are no classes of training; names
                `key`, which names the split.
        """
        data = self._open(key, split)
        label_type = self._type_of_labels(data)
        if label_type != self.label_type:
            raise ValueError(
                f"{key}: {self._column_of(split)} has other classes than in training, or in "
                f"another form: {data.features[self._config.label_column]}."
            )
        self._check_labels(key, split)
        return data

    def max_labels(self, split: str) -> int:
        """Classes of an image of an open split at most; 1 = each has exactly one."""
        if not self.is_multi_label:
            return 1
        longest = _compute.max(_compute.list_value_length(self._labels(split))).as_py()
        # At least 2, so that one class of several can be told from one that is all there is.
        return max(longest, 2)

    def _open(self, key: str, split: str) -> datasets.Dataset:
        if split not in self._splits:
            self._splits[split] = open_columns(self._config, key, split, "label_column")
        return self._splits[split]

    def _type_of_labels(self, data: datasets.Dataset) -> LabelType:
        feature = data.features[self._config.label_column]
        is_list = isinstance(feature, (datasets.List, datasets.LargeList))
        item = feature.feature if is_list else feature
        if isinstance(item, datasets.ClassLabel):
            return LabelType("names", is_list, tuple(item.names))
        if isinstance(item, datasets.Value) and item.dtype in STRINGS:
            return LabelType("strings", is_list)
        if isinstance(item, datasets.Value) and item.dtype.lstrip("u").startswith("int"):
            return LabelType("numbers", is_list)
        raise ValueError(
            f'multimodal.label_column = "{self._config.label_column}": holds '
            f"{describe_feature(feature)}; it must hold classes (ClassLabel), whole numbers or "
            "strings, or lists of them."
        )

    def _name_classes(self, key: str, split: str) -> tuple[str, ...]:
        """The classes of the training split, whose labels are checked as far as they need be."""
        values = self._values(key, split)
        if self.label_type.kind == "names":
            self._check_range(key, split, len(self.label_type.names))
            return self.label_type.names
        if not len(values):
            raise ValueError(f"{key}: {self._column_of(split)} has no classes at all.")
        if self.label_type.kind == "strings":
            return tuple(sorted(_compute.unique(values).to_pylist()))
        self._check_range(key, split, MAX_CLASSES)
        return tuple(str(number) for number in range(_compute.max(values).as_py() + 1))

    def _check_labels(self, key: str, split: str) -> None:
        """Check that the labels of a split are classes of training."""
        if self.label_type.kind != "strings":
            self._check_range(key, split, len(self.class_names))
            return
        unknown = set(_compute.unique(self._values(key, split)).to_pylist()) - set(self.class_names)
        if unknown:
            raise ValueError(
                f'{key}: {self._column_of(split)} has the class "{min(unknown)}", which the '
                "training split does not have. Leave its images out, or add some to training."
            )

    def _check_range(self, key: str, split: str, num_classes: int) -> None:
        values = self._values(key, split)
        limits = _compute.min_max(values).as_py()
        for value in (limits["min"], limits["max"]):
            if value is not None and not 0 <= value < num_classes:
                raise ValueError(
                    f"{key}: {self._column_of(split)} has the label {value}, but classes are 0 to "
                    f"{num_classes - 1}. Leave its images out, or take another column or split "
                    "(-1 often stands for a label that is kept secret)."
                )

    def _values(self, key: str, split: str) -> pa.ChunkedArray:
        """All labels of a split, those of lists one after the other."""
        column = self._labels(split)
        if column.null_count:
            first = _compute.index(_compute.is_null(column), True).as_py()
            raise ValueError(
                f"{key}: {self._column_of(split)} has null for a label in {column.null_count} "
                f"rows, the first of them row {first}. Label these images, or leave them out"
                f"{' (an empty list: no class)' if self.is_multi_label else ''}."
            )
        values = _compute.list_flatten(column) if self.is_multi_label else column
        if values.null_count:
            raise ValueError(
                f"{key}: {self._column_of(split)} has lists with null in them; remove those."
            )
        return values

    def _labels(self, split: str) -> pa.ChunkedArray:
        column = self._config.label_column
        return self._splits[split].select_columns([column]).with_format("arrow")[:][column]

    def _column_of(self, split: str) -> str:
        return f'column "{self._config.label_column}" of split "{split}" of "{self._config.path}"'


class PictureRows:
    """The rows of an open split, and the pictures in them.

    Args:
        data: What `open_columns` opened.
        config: The `[multimodal]` section.
        split: Name of the split, for messages.
    """

    def __init__(self, data: datasets.Dataset, config: Multimodal, split: str) -> None:
        self.data = data
        self._path = config.path
        self._column = config.image_column
        self._split = split
        named = Path(config.data_files[0] if config.data_files else config.path)
        self._folder = named if named.is_dir() else named.parent

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.data)

    def open_picture(self, row: dict[str, Any]) -> Image.Image:
        """Decode the picture of a row, upright RGB.

        Raises:
            BrokenImageError: It cannot be read.
        """
        try:
            return open_image(self.find_file(row))
        except (OSError, ValueError) as error:  # the former of paths no file system can have
            raise BrokenImageError(str(error)) from error

    def find_file(self, row: dict[str, Any]) -> Any:
        """The image of a row; a relative path is found beside the data that names it."""
        image = row[self._column]
        path = image.get("path") if isinstance(image, dict) and not image.get("bytes") else image
        if isinstance(path, str) and not Path(path).exists() and (self._folder / path).is_file():
            return str(self._folder / path)
        return image

    def key(self, index: int) -> str:
        """What finds the image again, for messages."""
        image = self.data[index][self._column]
        path = image.get("path") if isinstance(image, dict) else image
        where = f"{self._path}:{self._split}[{index}]"
        return f"{where} ({path})" if path and isinstance(path, str) else where

    def relative_key(self, index: int) -> str:
        """The number of the row, as a string."""
        return str(index)


class DatasetImages:
    """The pictures of a split of a data set, with their classes.

    Args:
        config: The `[multimodal]` section.
        key: The key that names the split, for messages.
        split: The split.
        size: Height and width that pictures are cropped to.
    """

    has_std = False

    def __init__(self, config: Multimodal, key: str, split: str, size: int) -> None:
        dataset = class_dataset(config)
        self.shape = (3, size, size)
        self._rows = PictureRows(dataset.open(key, split), config, split)
        self.max_labels = dataset.max_labels(split)
        self._dataset = dataset
        self._config = config

    def __len__(self) -> int:
        """See `ImageSet.__len__`."""
        return len(self._rows)

    def read(self, index: int, is_flipped: bool = False, crop: Crop | None = None) -> ClassImage:
        """See `ImageSet.read`."""
        row = self._rows.data[index]
        label = self._number(row[self._config.label_column])
        picture = self._rows.open_picture(row)
        image = to_tensor(crop_picture(picture, self.shape[-1], crop))
        return ClassImage(image.flip(-1) if is_flipped else image, label)

    def key(self, index: int) -> str:
        """See `ImageSet.key`."""
        return self._rows.key(index)

    def relative_key(self, index: int) -> str:
        """See `ImageSet.relative_key`."""
        return self._rows.relative_key(index)

    def labels(self) -> NDArray[np.int64]:
        """See `ImageSet.labels`."""
        column = self._rows.data.with_format(None)[self._config.label_column]
        return np.array([self._number_of(label) for label in column], np.int64)

    def fingerprint(self) -> dict[str, Any]:
        """See `ImageSet.fingerprint`."""
        keys = ("name", "data_files", "image_column", "label_column")
        values = {f"multimodal.{key}": getattr(self._config, key) for key in keys}
        return {**values, "images of the split": len(self)}

    def _number(self, label: Any) -> int | tuple[int, ...]:
        if isinstance(label, list):
            return tuple(sorted({self._number_of(item) for item in label}))
        return self._number_of(label)

    def _number_of(self, label: int | str) -> int:
        return self._dataset.number_of[label] if isinstance(label, str) else label


def class_dataset(config: Multimodal) -> ClassDataset:
    """Open a data set; the same one when it is asked for again."""
    keys = {key: getattr(config, key) for key in _KEYS}
    return _class_dataset(tuple(config.data_files), **keys)


# A start-up looks into the data several times: for the model, the checks and each loader.
@functools.lru_cache(maxsize=4)
def _class_dataset(data_files: tuple[str, ...], **keys: Any) -> ClassDataset:
    return ClassDataset(Multimodal(source="datasets", data_files=list(data_files), **keys))


def open_columns(
    config: Multimodal,
    key: str,
    split: str,
    *columns: Literal["label_column", "caption_column", "domain_column"],
) -> datasets.Dataset:
    """Open a split; only the images, not decoded, and other columns.

    Args:
        config: The `[multimodal]` section.
        key: The key that names the split.
        split: The split.
        columns: Keys that name the other columns.

    Raises:
        ValueError: There is no such split or column, or no image in it; names the key.
    """
    if config.streaming:
        raise ValueError(
            "multimodal.streaming = true: models of images read them in any order, which a "
            "stream does not have; set it to false."
        )
    data = open_split(config, split, key == "multimodal.train_split")
    assert isinstance(data, datasets.Dataset)  # since it is not streamed
    wanted = [_find_column(config, name, data.column_names) for name in ("image_column", *columns)]
    column = config.image_column
    feature = data.features[column]
    if not _holds_images(feature):
        raise ValueError(
            f'multimodal.image_column = "{column}": holds {describe_feature(feature)}; it must '
            "hold images, their bytes or their paths."
        )
    kept = cast(datasets.Dataset, data.select_columns(list(dict.fromkeys(wanted))))
    if isinstance(feature, datasets.Image):
        return kept.cast_column(column, datasets.Image(decode=False))
    return kept


def _find_column(config: Multimodal, key: str, names: Sequence[str]) -> str:
    column = getattr(config, key)
    if column not in names:
        raise ValueError(
            f'multimodal.{key} = "{column}": "{config.path}" has no such column; '
            f"its columns are {', '.join(names)}."
        )
    return column


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, datasets.Value):
        return feature.dtype in STRINGS + _BYTES
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def describe_feature(feature: Any) -> str:
    """Say what a column holds, for messages."""
    return getattr(feature, "dtype", None) or str(feature)
