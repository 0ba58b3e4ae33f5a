"""Sources of documents in files, by the kind of an entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchtitan_mixtures.data import jsonl_source, webdataset_source
from torchtitan_mixtures.data.blocks import BlockSource
from torchtitan_mixtures.data.image_folder_source import build_folder_source
from torchtitan_mixtures.data.jsonl_source import JsonlSource
from torchtitan_mixtures.data.media import MediaReader
from torchtitan_mixtures.data.source_files import FileSettings, find_data_files
from torchtitan_mixtures.data.sources import PairOrder
from torchtitan_mixtures.data.webdataset_source import WebDatasetSource
from torchtitan_mixtures.source_entries import SourceEntry

if TYPE_CHECKING:
    from torchtitan_mixtures.multimodal_config import Multimodal


def build_file_source(
    entry: SourceEntry,
    config: Multimodal,
    media: MediaReader,
    order: PairOrder,
    is_endless: bool,
) -> BlockSource[Any]:
    """Open the files of an entry.

    Args:
        entry: Of kind `folder`, `webdataset`, `jsonl` or `parquet`.
        config: The section it is in.
        media: Reads pictures and sounds.
        order: Of pairs.
        is_endless: See `Source`.

    Raises:
        ValueError: There are no such files, they are empty, compressed or damaged; names the entry,
            its path and a remedy.
    """
    settings = FileSettings(entry, config, media, order, is_endless)
    try:
        return _build(settings)
    except OSError as error:
        raise ValueError(
            f"{settings.key}.path = {entry.path!r}: cannot read {error.filename} "
            f"({error.strerror}); repair it, or change the path."
        ) from error


def _build(settings: FileSettings) -> BlockSource[Any]:
    entry = settings.entry
    if entry.kind == "folder":
        return build_folder_source(settings)
    if entry.kind == "webdataset":
        return WebDatasetSource(find_data_files(settings, webdataset_source.SUFFIXES), settings)
    if entry.kind == "jsonl":
        return JsonlSource(find_data_files(settings, jsonl_source.SUFFIXES), settings)
    assert entry.kind == "parquet"
    # Imported late: Arrow takes a while to load, and the other kinds do without.
    from torchtitan_mixtures.data import parquet_source

    files = find_data_files(settings, parquet_source.SUFFIXES)
    return parquet_source.ParquetSource(files, settings)
