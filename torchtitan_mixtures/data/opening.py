"""Opening a data set: what `multimodal.path` may be, and which columns are read of it."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets
import pyarrow as pa

from torchtitan_mixtures.data.documents import Columns
from torchtitan_mixtures.data.sample_reader import undecoded
from torchtitan_mixtures.data.source_files import COMPRESSED, walk
from torchtitan_mixtures.source_entries import COLUMN_KEYS

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


_KEYS_OF_ENTRIES = {"name": "subset", "train_split": "split", "validation_splits": "split"}
"""Keys of `[multimodal]` that are called otherwise in an entry of a mixture."""


@dataclass(frozen=True)
class Naming:
    """What the keys are called that say what a data set is.

    Attributes:
        split: Which part of it.
        entry: Name of the entry of a mixture; empty: the keys are those of `[multimodal]`.
    """

    split: str = ""
    entry: str = ""

    def key(self, key: str) -> str:
        """The whole name of a key that is called so in `[multimodal]`."""
        if not self.entry:
            return f"multimodal.{key}"
        return f"multimodal.sources[{self.entry}].{_KEYS_OF_ENTRIES.get(key, key)}"

    def samples(self) -> str:
        """What the samples of the split are called as a whole."""
        return f'source "{self.entry}"' if self.entry else f'split "{self.split}"'


def open_split(
    config: Multimodal, split: str, is_training: bool, naming: Naming | None = None
) -> AnyDataset:
    """Open one split of what `multimodal.path` names.

    Args:
        config: The `[multimodal]` section.
        split: Name of the split; unless streaming also a slice such as `train[:90%]`.
        is_training: Which key named the split, for the message.
        naming: Of the keys, for the message. None: they are those of `[multimodal]`.

    Returns:
        The split with all its columns; a folder written by `save_to_disk` is memory-mapped whatever
        `multimodal.streaming` says, since that reads nothing ahead either.

    Raises:
        ValueError: There is no such path or split.
    """
    naming = naming or Naming()
    key = naming.key("train_split" if is_training else "validation_splits")
    path_key, files_key = naming.key("path"), naming.key("data_files")
    if not config.path:
        kind = naming.key("kind" if naming.entry else "source")
        raise ValueError(
            f'{path_key} is empty: with {kind} = "datasets" it must be a hub name, a local folder '
            f"or file, or a format whose files {files_key} lists."
        )
    path = Path(config.path)
    if config.path.startswith((".", "/", "~")) and not path.exists():
        # `datasets` would ask the hub, for minutes if there is no network.
        raise ValueError(f'{path_key} = "{config.path}": there is no such file or folder.')
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(config.path, split, key, path_key)
    builder, data_files = config.path, config.data_files or None
    is_here = path.is_dir() or config.path in FORMAT_OF_SUFFIX.values()
    is_here &= not any("://" in name for name in config.data_files)
    if data_files and is_here and local_files(config) is None:
        raise ValueError(
            f"{files_key} = {data_files}: matches no file; paths are relative to {path_key} if "
            "that is a folder, else to the current one."
        )
    if path.is_file():
        builder, data_files = _format_of(path), [config.path]
        if not builder:
            raise ValueError(
                f'{path_key} = "{config.path}": cannot tell the format of a {path.suffix} '
                f"file; known are {', '.join(FORMAT_OF_SUFFIX)}. For others set path to the name "
                f"of the format and list the file in {files_key}."
            )
    try:
        return datasets.load_dataset(
            builder,
            config.name or None,
            data_files=data_files,
            split=split,
            streaming=config.streaming,
        )
    # Every format has classes of errors of its own: a cut .gz is an EOFError.
    except Exception as error:
        # `datasets` says what is wrong (it lists the splits, the configurations) but not where the
        # value came from.
        raise ValueError(
            f'Cannot open split "{split}" ({key}) of {path_key} = "{config.path}", '
            f'{naming.key("name")} = "{config.name}", data_files = {config.data_files}: '
            f"{error.__cause__ or error}"
        ) from error


def _format_of(path: Path) -> str:
    """The format in which `datasets` reads a file, packed or not; empty if nobody knows."""
    plain = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    return FORMAT_OF_SUFFIX.get(plain[-1], "") if plain else ""


def keep_columns(
    data: AnyDataset, config: Multimodal, columns: Columns, naming: Naming
) -> AnyDataset:
    """Leave only the columns that are read, with images and sounds as bytes and paths.

    Args:
        data: What `open_split` gave.
        config: The `[multimodal]` section.
        columns: Those that are read. Alone, an image and a caption must be there; of a mixture,
            what its entry names, and something to make documents of.
        naming: Of the keys, for the message.

    Raises:
        ValueError: A column is missing; names the key and the columns present.
    """
    names = data.column_names
    if names is None:  # a stream whose columns are known only by reading it
        try:
            names = list(next(iter(data), {}))
        # Every format has classes of errors of its own: ArrowInvalid, ParserError, EOFError, ...
        except Exception as error:
            raise ValueError(
                f'{naming.key("path")} = "{config.path}": its first rows cannot be read '
                f"({type(error).__name__}: {error}). Repair or leave out the file; of a mixture, "
                "kinds jsonl, parquet and webdataset skip and count what is bad."
            ) from error
    for key in _missing(columns, names, is_entry=naming.entry != ""):
        raise ValueError(
            f'{naming.key(key)} = "{columns.called(key)}": "{config.path}" has no such column; '
            f"its columns are {', '.join(names)}."
        )
    if not set(columns.content()) & set(names):
        raise ValueError(
            f'{naming.key("path")} = "{config.path}" has none of the columns '
            f"{', '.join(columns.content())}; its columns are {', '.join(names)}. Set text_column, "
            "segments_column, or caption_column with image_column or audio_column."
        )
    features = data.features
    kept = [name for name in names if name in (*columns.names(), "__key__")]
    data = cast(AnyDataset, data.select_columns(kept))
    for name, feature in (features or {}).items():
        if name in kept and (raw := undecoded(feature)) != feature:
            data = cast(AnyDataset, data.cast_column(name, raw))
    # As tables: a row with text that is not UTF-8 can be told from others. A format that was saved
    # with the data is no matter then.
    return data.with_format("arrow")


def _missing(columns: Columns, names: Sequence[str], is_entry: bool) -> list[str]:
    """Keys of columns that must be there and are not."""
    if not is_entry:
        required = ["image_column", "caption_column"]
    else:
        defaults = Columns()
        required = [key for key in COLUMN_KEYS if columns.called(key) != defaults.called(key)]
        if columns.segments not in names and {columns.image, columns.audio} & set(names):
            required.append("caption_column")
    return [key for key in required if columns.called(key) not in (*names, "")]


def _open_saved(path: str, split: str, key: str, path_key: str) -> datasets.Dataset:
    try:
        saved = datasets.load_from_disk(path)
    # Damage shows as an error of Arrow, of JSON or of the system, and as a lack of keys or items.
    except (pa.ArrowException, ValueError, OSError, LookupError, TypeError) as error:
        raise ValueError(
            f'{path_key} = "{path}": the folder that save_to_disk wrote is empty or damaged '
            f"({type(error).__name__}: {error}). Save it again, or copy it again."
        ) from error
    if isinstance(saved, datasets.Dataset):  # one split, saved alone
        saved = datasets.DatasetDict({str(saved.split or "train"): saved})
    try:
        lengths = {str(name): len(part) for name, part in saved.items()}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f'{key}: "{path}" has no split "{split}"; its splits are {", ".join(map(str, saved))}, '
            f'and a slice is "train[:90%]" ({error}).'
        ) from error
    chosen: list[datasets.Dataset] = []
    for part in parts:
        data: Any = saved[part.splitname]
        if part.from_ is not None or part.to is not None:
            end = len(data) if part.to is None else part.to
            data = data.select(range(part.from_ or 0, end))
        chosen.append(data)
    if len(chosen) == 1:
        return chosen[0]
    return cast(datasets.Dataset, datasets.concatenate_datasets(chosen))


@dataclass(frozen=True)
class LocalFiles:
    """The files on this machine that a data set is read from.

    Attributes:
        folder: All of them are below it.
        files: Of each its name, which moves with the data, and its size in bytes, sorted; without
            what `datasets` puts beside them to find its results again.
    """

    folder: Path
    files: list[tuple[str, int]]


def local_files(config: Multimodal) -> LocalFiles | None:
    """Look up the files that a data set is read from; None: they are elsewhere, or unknown.

    Args:
        config: The `[multimodal]` section.
    """
    named = Path(config.path)
    if config.data_files:
        base = named if named.is_dir() else Path()
        if any("://" in pattern for pattern in config.data_files):
            return None
        matches = {
            base / match
            for pattern in config.data_files
            for match in glob.glob(pattern, root_dir=base, recursive=True)
            if (base / match).is_file()
        }
        if not matches:
            return None
        root = Path(os.path.commonpath([match.parent for match in matches]))
        found = [(match.relative_to(root), match) for match in matches]
    elif named.is_file():
        root, found = named.parent, [(Path(named.name), named)]
    elif named.is_dir():
        root, found = named, [(path.relative_to(named), path) for path in walk(named)]
    else:
        return None
    files = sorted(
        (name.as_posix(), path.stat().st_size)
        for name, path in found
        if not name.name.startswith("cache-")
    )
    return LocalFiles(root, files)
