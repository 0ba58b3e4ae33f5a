"""Domains that a column of a data set names (`multimodal.domain_column`)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from torchtitan_mixtures.data.image_datasets import STRINGS, describe_feature, open_columns
from torchtitan_mixtures.job_config import Multimodal

if TYPE_CHECKING:
    from collections.abc import Sequence

_compute: Any = pyarrow.compute  # whose functions are made at run time

_KEYS = ("path", "name", "train_split", "streaming", "image_column", "domain_column")
_TRAIN = "multimodal.train_split"


class DomainColumn:
    """A column whose values are domains: those of a `ClassLabel`, or the ones in training, sorted.

    Args:
        config: The `[multimodal]` section.

    Attributes:
        values: All values as strings, in the order of the domains.

    Raises:
        ValueError: There is no such column, or it holds something else; names the key.
    """

    def __init__(self, config: Multimodal) -> None:
        self._config = config
        data = open_columns(config, _TRAIN, config.train_split, "domain_column")
        feature: Any = data.features[config.domain_column]
        if isinstance(feature, datasets.ClassLabel):
            self._values: Sequence[Any] = range(len(feature.names))
            self.values = tuple(feature.names)
            return
        if not isinstance(feature, datasets.Value) or not (
            feature.dtype in STRINGS or feature.dtype.lstrip("u").startswith("int")
        ):
            raise ValueError(
                f'multimodal.domain_column = "{config.domain_column}": holds '
                f"{describe_feature(feature)}; it must hold strings, whole numbers or a ClassLabel."
            )
        self._values = sorted(_compute.unique(self._column(_TRAIN, config.train_split)).to_pylist())
        self.values = tuple(map(str, self._values))

    def read(self, key: str, split: str) -> NDArray[np.int64]:
        """The number of the domain of each row of a split, `(rows,)`.

        Raises:
            ValueError: A row has none, or one that training does not have; names `key`, which
                names the split.
        """
        column = self._column(key, split)
        found = _compute.index_in(column, value_set=pa.array(self._values, column.type))
        if found.null_count:
            first = _compute.index(_compute.is_null(found), True).as_py()
            raise ValueError(
                f'{key}: column "{self._config.domain_column}" of split "{split}" has '
                f"{column[first].as_py()!r} in row {first}, which is none of the domains "
                f"{', '.join(self.values)}. Leave these rows out, or add some to training."
            )
        return found.to_numpy().astype(np.int64)

    def _column(self, key: str, split: str) -> pa.ChunkedArray:
        name = self._config.domain_column
        data = open_columns(self._config, key, split, "domain_column")
        table = cast(datasets.Dataset, data.select_columns([name])).with_format("arrow")[:]
        column: pa.ChunkedArray = cast(Any, table)[name]
        if column.null_count:
            first = _compute.index(_compute.is_null(column), True).as_py()
            raise ValueError(
                f'{key}: column "{name}" of split "{split}" has null in {column.null_count} rows, '
                f"the first of them row {first}; every image must have a domain."
            )
        return column


def open_domain_column(config: Multimodal) -> DomainColumn:
    """Open the column of a job; the same one when it is asked for again."""
    keys = {key: getattr(config, key) for key in _KEYS}
    return _open_domain_column(tuple(config.data_files), **keys)


# A start-up looks into the data several times: for the model, the checks and each loader.
@functools.lru_cache(maxsize=4)
def _open_domain_column(data_files: tuple[str, ...], **keys: Any) -> DomainColumn:
    return DomainColumn(Multimodal(source="datasets", data_files=list(data_files), **keys))
