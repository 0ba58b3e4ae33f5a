"""Opening a data set: what `multimodal.path` may be, and which columns are read of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import datasets

if TYPE_CHECKING:
    from torchtitan_mixtures.job_config import Multimodal

AnyDataset = datasets.Dataset | datasets.IterableDataset

FORMAT_OF_SUFFIX = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".arrow": "arrow",
    ".tar": "webdataset",
}
"""For a `multimodal.path` that is one file: the format in which `datasets` reads it."""


def open_split(config: Multimodal, split: str, is_training: bool) -> AnyDataset:
    """Open one split of what `multimodal.path` names.

    Args:
        config: The `[multimodal]` section.
        split: Name of the split; unless streaming also a slice such as `train[:90%]`.
        is_training: Which key named the split, for the message.

    Returns:
        The split with all its columns; a folder written by `save_to_disk` is memory-mapped whatever
        `multimodal.streaming` says, since that reads nothing ahead either.

    Raises:
        ValueError: There is no such path or split.
    """
    key = "multimodal.train_split" if is_training else "multimodal.validation_splits"
    if not config.path:
        raise ValueError(
            'multimodal.path is empty: with multimodal.source = "datasets" it must be a hub name, '
            "a local folder or file, or a format whose files multimodal.data_files lists."
        )
    path = Path(config.path)
    if config.path.startswith((".", "/", "~")) and not path.exists():
        # `datasets` would ask the hub, for minutes if there is no network.
        raise ValueError(f'multimodal.path = "{config.path}": there is no such file or folder.')
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(config.path, split, key)
    builder, data_files = config.path, config.data_files or None
    if path.is_file():
        builder, data_files = FORMAT_OF_SUFFIX.get(path.suffix, ""), [config.path]
        if not builder:
            raise ValueError(
                f'multimodal.path = "{config.path}": cannot tell the format of a {path.suffix} '
                f"file; known are {', '.join(FORMAT_OF_SUFFIX)}. For others set path to the name "
                "of the format and list the file in multimodal.data_files."
            )
    try:
        return datasets.load_dataset(
            builder,
            config.name or None,
            data_files=data_files,
            split=split,
            streaming=config.streaming,
        )
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        # `datasets` says what is wrong (it lists the splits, the configurations) but not where the
        # value came from.
        raise ValueError(
            f'Cannot open split "{split}" ({key}) of multimodal.path = "{config.path}", '
            f'name = "{config.name}", data_files = {config.data_files}: {error.__cause__ or error}'
        ) from error


def keep_columns(data: AnyDataset, config: Multimodal) -> AnyDataset:
    """Leave only the columns that are read, with images as bytes and paths, not decoded.

    Raises:
        ValueError: A column is missing; names the key and the columns present.
    """
    names = data.column_names
    if names is None:  # a stream whose columns are known only by reading it
        names = list(next(iter(data), {}))
    wanted = {
        "multimodal.image_column": config.image_column,
        "multimodal.caption_column": config.caption_column,
    }
    for key, column in wanted.items():
        if column not in names:
            raise ValueError(
                f'{key} = "{column}": "{config.path}" has no such column; '
                f"its columns are {', '.join(names)}."
            )
    features = data.features
    kept = [name for name in names if name in (*wanted.values(), "__key__")]
    data = cast(AnyDataset, data.select_columns(kept))
    if features is not None and isinstance(features[config.image_column], datasets.Image):
        return data.cast_column(config.image_column, datasets.Image(decode=False))
    return data


def _open_saved(path: str, split: str, key: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(path)
    if isinstance(saved, datasets.Dataset):  # one split, saved alone
        saved = {str(saved.split or "train"): saved}
    if split not in saved:
        raise ValueError(
            f'{key}: "{path}" has no split "{split}"; its splits are {", ".join(map(str, saved))}.'
        )
    return saved[split]
