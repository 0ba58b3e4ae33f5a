"""Samples that `datasets` reads made into documents; bad ones are skipped, counted and logged.

Images and sounds are decoded here and not inside `datasets`, so that one broken file does not end
the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import fsspec
import pyarrow as pa
from huggingface_hub import constants

from torchtitan_mixtures.data.documents import DocumentBuilder, Finder
from torchtitan_mixtures.data.media import MAX_MEDIA_BYTES
from torchtitan_mixtures.data.samples import SampleJudge
from torchtitan_mixtures.data.sources import Document, document_rng

_ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4")
"""What `datasets` looks into while it streams, by the names of `fsspec`."""


@dataclass(frozen=True)
class Reading:
    """What all shards of a source read samples with.

    Attributes:
        builder: Makes documents of rows.
        find: Of the paths in rows.
        where: What messages call the source.
        seed: Of what is drawn inside documents.
    """

    builder: DocumentBuilder
    find: Finder
    where: str
    seed: int


class SampleReader:
    """Turns the samples of one shard into documents and counts those it cannot read.

    Args:
        reading: See there.
        judge: Of all shards of this process. The counts are in the checkpoint by shard, so that
            processes with other shares of the shards add up what is theirs.
    """

    def __init__(self, reading: Reading, judge: SampleJudge) -> None:
        self._reading = reading
        self._judge = judge
        self._counts = judge.new_counts()

    def read(self, fetch: Callable[[], pa.Table], epoch: int, number: int | str) -> Document | None:
        """The document of a sample, or None if the sample is bad.

        Args:
            fetch: Gets the one row, its images and sounds not decoded.
            epoch: Number of the pass, for the random choices.
            number: What tells the sample from others of the epoch.
        """
        self._counts.seen += 1
        reading = self._reading
        rng = document_rng(reading.seed, epoch, number)
        key = f"{reading.where}[{number}]"
        try:
            (sample,) = fetch().to_pylist()  # fails on text that is not UTF-8
            key = self._key(sample, key)
            document = reading.builder.build(sample, key, rng, reading.find)
        # OSError: of files that are cut, and of paths no file system can have.
        except (ValueError, OSError) as error:
            self._judge.count_bad(self._counts, key, error)
            return None
        # What else goes wrong is a mistake of ours, of a worker process at that: say with what.
        except Exception as error:
            raise ValueError(f"{key}: {type(error).__name__}: {error}") from error
        self._counts.good_in_epoch += 1
        return document

    def end_epoch(self) -> None:
        """Tell the judge that the shard has ended an epoch."""
        self._judge.end_epoch(self._counts)

    def reject(self, document: Document, error: ValueError) -> None:
        """Count a document that was read as a bad one; see `Shard.reject`."""
        self._counts.good_in_epoch -= 1
        self._judge.count_bad(self._counts, document.key, error)

    def progress(self) -> dict[str, float]:
        """How many samples were seen, and how many bad ones among them."""
        return {"samples": self._counts.seen, "bad": self._counts.bad}

    def state_dict(self) -> dict[str, Any]:
        """The counts of this shard, as plain JSON."""
        return asdict(self._counts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting from a state."""
        counts = self._counts
        counts.seen, counts.bad = state["seen"], state["bad"]
        counts.good_in_epoch, counts.bad_in_epoch = state["good_in_epoch"], state["bad_in_epoch"]
        counts.bad_keys = list(state["bad_keys"])

    def _key(self, sample: dict[str, Any], where: str) -> str:
        columns = self._reading.builder.columns
        file = sample.get(columns.image) or sample.get(columns.audio)
        path = file.get("path") if isinstance(file, dict) else file
        name = sample.get("__key__") or (path if isinstance(path, str) else None)
        return f"{where} ({name})" if name else where


class DatasetFinder:
    """Finds the files that rows of a data set name; a `Finder` that goes to other processes.

    Rows may come from anybody: paths on this machine must lie in the folders of the data or where
    `datasets` unpacks what it downloads, and addresses are read only of data that are remote
    themselves, whose files have no other names.

    Args:
        folder: That of the data; None: they are not on this machine.
        media_folder: What relative paths are relative to instead; absolute ones may be in it too.
    """

    def __init__(self, folder: Path | None, media_folder: Path | None) -> None:
        self._is_remote = folder is None
        self._base = media_folder or folder
        roots = (self._base, folder, *_caches())
        self._roots = [os.path.abspath(root) for root in roots if root]

    def __call__(self, path: str) -> Path | bytes:
        """Look up a path; see `Finder`.

        Raises:
            ValueError: It leads elsewhere, or cannot be read.
        """
        # "zip://a.png::/data/b.zip" is a member of an archive, as streams name them.
        *inner, last = path.split("::")
        scheme, is_address, _ = last.rpartition("://")
        may_be_address = self._is_remote and scheme.lower() not in ("", "file", "local", *_ARCHIVES)
        if (is_address and not may_be_address) or not all(
            part.partition("://")[0] in _ARCHIVES for part in inner
        ):
            raise ValueError(f"{path} is an address and not a path; download it first")
        if is_address:
            return _fetch(path)
        absolute = os.path.abspath(os.path.join(self._base or "/", last))
        if not any(os.path.commonpath([root, absolute]) == root for root in self._roots):
            raise ValueError(
                f"{path} is outside of {self._base or 'the data'}; put data and media below one "
                "folder, or set media_folder of a source of a mixture"
            )
        return _fetch("::".join([*inner, absolute])) if inner else Path(absolute)


def _caches() -> list[str | Path]:
    """Where `datasets` puts what it downloads or unpacks; variables of the shell set each alone."""
    config = datasets.config
    unpacked = (config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH)
    return [config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, *unpacked, constants.HF_HUB_CACHE]


def _fetch(address: str) -> bytes:
    """Read a whole small file that is remote, or in an archive.

    Raises:
        ValueError: There is none, it cannot be read, or is too large.
    """
    try:
        with cast(fsspec.core.OpenFile, fsspec.open(address, "rb")) as stream:
            content = stream.read(MAX_MEDIA_BYTES + 1)
    # Every file system raises classes of its own, and every archive too.
    except Exception as error:
        raise ValueError(f"cannot read {address} ({type(error).__name__}: {error})") from error
    if len(content) > MAX_MEDIA_BYTES:
        raise ValueError(f"{address} has more than {MAX_MEDIA_BYTES} bytes")
    return content


def undecoded(feature: Any) -> Any:
    """The type of a column, with images and sounds in it left as files hold them.

    Args:
        feature: Of `datasets`; nested ones are lists and dictionaries.
    """
    if isinstance(feature, datasets.Image | datasets.Audio):
        return type(feature)(decode=False)
    if isinstance(feature, dict):
        return {name: undecoded(part) for name, part in feature.items()}
    if isinstance(feature, Sequence) and not isinstance(feature, str):
        return [undecoded(part) for part in feature]
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(undecoded(feature.feature))
    return feature
