"""Documents of pre-tokenised shards; see `tokenized_shards.py`."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from torchtitan_mixtures.data.blocks import BlockSource
from torchtitan_mixtures.data.shard_manifest import TOKENIZE_COMMAND
from torchtitan_mixtures.data.sources import Document, PairOrder, Segment
from torchtitan_mixtures.data.tokenized_shards import TokenizedShards
from torchtitan_mixtures.source_entries import SourceEntry

if TYPE_CHECKING:
    from torchtitan_mixtures.multimodal_config import Multimodal

BLOCK_DOCUMENTS = 256
"""Documents of a block; fewer if they are long, or if there are few."""

_BLOCK_CODES = 1 << 20
_MANY_BLOCKS = 256  # enough for shards to be dealt evenly


class TokenizedSource(BlockSource[int]):
    """Documents that are codes already, in blocks that are ranges of documents of a file.

    A damaged file ends the run, whatever share of bad samples is allowed: it can be made again.

    Args:
        shards: Holds at least one document.
        order: Of pairs.
        seed: See `BlockSource`.
        is_endless: See `BlockSource`.
        name: See `BlockSource`.
        max_bad_fraction: See `BlockSource`.
        max_epochs: See `BlockSource`.
    """

    def __init__(
        self,
        shards: TokenizedShards,
        order: PairOrder,
        seed: int,
        is_endless: bool,
        name: str,
        max_bad_fraction: float = 0.01,
        max_epochs: int = 0,
    ) -> None:
        self._shards = shards
        self._order = order
        files = shards.manifest.files
        # Documents are numbered over all files, and so are blocks.
        self._starts = [0, *accumulate(file.documents for file in files)]
        longest = sum(file.num_codes for file in files) // self._starts[-1] + 1
        wanted = min(BLOCK_DOCUMENTS, self._starts[-1] // _MANY_BLOCKS, _BLOCK_CODES // longest)
        self._block_documents = max(1, wanted)
        sizes = [-(-file.documents // self._block_documents) for file in files]
        self._block_starts = [0, *accumulate(sizes)]
        self._names = [modality.name for modality in shards.manifest.modalities]
        super().__init__(
            self._block_starts[-1], seed, is_endless, name, max_bad_fraction, max_epochs
        )

    def block_at(self, epoch: int, place: int) -> int:
        """See `BlockSource.block_at`; compares the checksums of the block.

        Raises:
            ValueError: Its file is damaged.
        """
        block = super().block_at(epoch, place)
        documents = self.read_block(block)
        file, first = self._find(documents.start)
        self._shards.file(file).check(first, first + len(documents))
        return block

    def read_block(self, block: int) -> range:
        """See `BlockSource.read_block`: the numbers of its documents."""
        file = bisect_right(self._block_starts, block) - 1
        start = self._starts[file] + (block - self._block_starts[file]) * self._block_documents
        return range(start, min(start + self._block_documents, self._starts[file + 1]))

    def sample_key(self, block: int, number: int, sample: int) -> str:
        """See `BlockSource.sample_key`."""
        file, document = self._find(sample)
        return f"{self.name}: {self._shards.manifest.files[file].file}[{document}]"

    def build(self, sample: int, key: str, rng: Random) -> Document:
        """See `BlockSource.build`."""
        file, number = self._find(sample)
        stored = self._shards.file(file).read(number)
        segments = tuple(
            Segment(self._names[modality], codes, bool(has_loss))
            for codes, modality, has_loss in zip(
                stored.codes, stored.modalities, stored.losses, strict=True
            )
        )
        if stored.is_pair:
            segments = self._order.arrange(rng, *segments)
        return Document(segments, key, stored.is_pair)

    def fingerprint(self) -> dict[str, Any]:
        """See `Source.fingerprint`."""
        key = f"multimodal.sources[{self.name}]"
        sums = "".join(file.sha256 for file in self._shards.manifest.files)
        return {
            f"{key}.kind": "shards",
            f"{key}.path: hash of the files": hashlib.sha256(sums.encode()).hexdigest()[:16],
            f"{key}.max_epochs": self.max_epochs,
            f"{key}: documents of a block": self._block_documents,
            "multimodal.seed": self.seed,
        }

    def _find(self, sample: int) -> tuple[int, int]:
        """The file of a document, and its number there."""
        file = bisect_right(self._starts, sample) - 1
        return file, sample - self._starts[file]


def build_shards_source(
    entry: SourceEntry,
    config: Multimodal,
    fingerprints: Mapping[str, str],
    order: PairOrder,
    is_endless: bool,
) -> TokenizedSource:
    """Open the shards of an entry.

    Args:
        entry: Of kind `shards`.
        config: The section it is in.
        fingerprints: Of the run's tokenizers, by modality.
        order: Of pairs.
        is_endless: See `Source`.

    Raises:
        ValueError: They are not there, incomplete, damaged, empty, or were made with other
            tokenizers; names the entry.
    """
    key = f"multimodal.sources[{entry.name}].path = {entry.path!r}"
    try:
        shards = TokenizedShards(Path(entry.path).expanduser())
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    if not shards.manifest.documents:
        raise ValueError(f"{key}: holds no documents; remove the entry, or tokenize other data.")
    _check_tokenizers(key, shards, config, fingerprints)
    return TokenizedSource(
        shards,
        order,
        config.seed,
        is_endless,
        entry.name,
        config.max_bad_fraction,
        entry.max_epochs,
    )


def _check_tokenizers(
    key: str, shards: TokenizedShards, config: Multimodal, fingerprints: Mapping[str, str]
) -> None:
    """Refuse codes that mean something else here."""
    for modality in shards.manifest.modalities:
        if not modality.segments:
            continue
        if modality.name not in fingerprints:
            raise ValueError(
                f"{key}: holds {modality.name}, and the model's modalities are "
                f"{', '.join(fingerprints)}. Choose another model.flavor, or tokenize data without "
                f"{modality.name}."
            )
        found = fingerprints[modality.name]
        if found != modality.fingerprint:
            setting = f"multimodal.{modality.name}_tokenizer"
            raise ValueError(
                f"{key}: its {modality.name} was made with the tokenizer {modality.tokenizer!r} "
                f"(fingerprint {modality.fingerprint[:16]}), and {setting} = "
                f"{getattr(config, setting.removeprefix('multimodal.'), '')!r} is another one "
                f"({found[:16]}). Set {setting} to the one it was made with, or tokenize again "
                f"into a new folder with `{TOKENIZE_COMMAND}`."
            )
