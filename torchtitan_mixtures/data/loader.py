"""The data loaders of token models: resumable to the bit, with plain JSON in the checkpoint.

Training: every data-parallel rank, and in it every worker process, reads its own share of the
documents and packs them. Validation: all ranks pack the same documents and take turns at the
sequences, so that every rank has the same number of batches (collectives would hang otherwise) and
the result does not depend on the number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import JobConfig

from torchtitan_mixtures.data.batch import check_batch
from torchtitan_mixtures.data.packing import (
    BatchBuilder,
    DocumentEncoder,
    Modalities,
    Packer,
    Tokens,
)
from torchtitan_mixtures.data.sources import Source, build_source
from torchtitan_mixtures.data.tokenizers import (
    TextTokenizer,
    build_image_tokenizer,
    build_text_tokenizer,
)
from torchtitan_mixtures.data.vocabulary import token_model_args

if TYPE_CHECKING:
    from torchtitan_mixtures.job_config import Multimodal

Batch = tuple[dict[str, Tensor], Tensor]

_START_AFRESH = (
    'start the data from the beginning with checkpoint.exclude_from_loading = ["dataloader"]'
)


@dataclass(frozen=True)
class Share:
    """One of `count` equals: a data-parallel rank, or a worker process of one."""

    index: int
    count: int


class PackedDataset(IterableDataset):
    """Batches of packed sequences, with the state that `StatefulDataLoader` asks for.

    Args:
        source: Where documents come from; endless for training, finite for validation.
        packer: Fills sequences.
        builder: Makes batches of them.
        rank: Data-parallel rank whose share is read.
        batch_size: Sequences of a batch.
        max_batches: Batches of a finite pass at most; -1 = no limit.
        checked_ranges: Vocabulary ranges to check every batch against; None = no checks.
    """

    def __init__(
        self,
        source: Source,
        packer: Packer,
        builder: BatchBuilder,
        rank: Share,
        batch_size: int,
        max_batches: int = -1,
        checked_ranges: tuple[tuple[int, int], ...] | None = None,
    ) -> None:
        self._source = source
        self._packer = packer
        self._builder = builder
        self._rank = rank
        self._batch_size = batch_size
        self._max_batches = max_batches
        self._checked_ranges = checked_ranges
        self._num_rounds = 0  # batches per rank of this finite pass that are packed
        self._next_start: dict[str, Any] | None = None  # where the next iteration starts
        self._beginning = self.state_dict()

    def __iter__(self) -> Iterator[Batch]:
        """Start from the loaded state, or from the beginning."""
        start = self._next_start or self._beginning
        self._source.load_state_dict(start["source"])
        self._packer.load_state_dict(start["packer"])
        self._num_rounds = start["num_rounds"]
        self._next_start = None
        worker = get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        is_endless = self._source.is_endless
        batches = self._training_batches if is_endless else self._validation_batches
        for sequences in batches(Share(index, count)):
            arrays, labels = self._builder.build(sequences)
            input_dict = {key: torch.from_numpy(array) for key, array in arrays.items()}
            batch = input_dict, torch.from_numpy(labels)
            if self._checked_ranges is not None:
                check_batch(*batch, self._checked_ranges)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands and what the packer holds back, as plain JSON."""
        if self._next_start is not None:
            return self._next_start
        return {
            "source": self._source.state_dict(),
            "packer": self._packer.state_dict(),
            "num_rounds": self._num_rounds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue from a state."""
        self._next_start = state

    def _training_batches(self, worker: Share) -> Iterator[Sequence[Sequence[Tokens]]]:
        """Each worker of each rank packs documents of its own."""
        shard = self._rank.index * worker.count + worker.index
        documents = self._source.documents(shard, self._rank.count * worker.count)
        sequences = self._packer.pack(documents)
        while batch := list(islice(sequences, self._batch_size)):
            yield batch

    def _validation_batches(self, worker: Share) -> Iterator[Sequence[Sequence[Tokens]]]:
        """All pack the same; ranks share the sequences of a round, workers alternate in rounds."""
        sequences = self._packer.pack(self._source.documents(0, 1))
        while self._max_batches == -1 or self._num_rounds < self._max_batches:
            of_all_ranks = list(islice(sequences, self._rank.count * self._batch_size))
            if not of_all_ranks:
                return
            self._num_rounds += 1
            if (self._num_rounds - 1) % worker.count == worker.index:
                batch = of_all_ranks[self._rank.index :: self._rank.count]
                missing = self._batch_size - len(batch)
                yield [*batch, *([[]] * missing)]


class MultimodalDataLoader(StatefulDataLoader, BaseDataLoader):
    """Loader whose state is a JSON string per data-parallel rank.

    DCP merges the dictionaries of all ranks, so each rank writes a key of its own. A state is
    refused if the run differs from the one that saved it in anything the order of documents or the
    packing depends on.

    Args:
        dataset: Makes the batches.
        rank: Data-parallel rank.
        fingerprint: TOML keys and values that must not change between save and resume.
        **options: Options of `StatefulDataLoader`: workers, prefetching, pinned memory.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        rank: Share,
        fingerprint: dict[str, Any],
        **options: Any,
    ) -> None:
        # A generator of its own: the default one would be advanced by every new iterator, and the
        # random numbers of the training would depend on when validation ran.
        super().__init__(dataset, batch_size=None, generator=torch.Generator(), **options)
        self.rank = rank
        self.fingerprint = fingerprint

    def state_dict(self) -> dict[str, Any]:
        """The state of this rank's shards."""
        # Before the first batch there is nothing to ask the workers, which would have to start.
        state = self.next_iter_state if self._iterator is None else super().state_dict()
        content = json.dumps({"fingerprint": self.fingerprint, "state": state})
        return {self._rank_key: content, "world_size": self.rank.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: The run that saved it differs in a way that would change or repeat data.
        """
        if not state_dict:  # TorchTitan's convention for "nothing was saved"
            return
        saved_ranks = state_dict.get("world_size")
        if saved_ranks != self.rank.count or self._rank_key not in state_dict:
            raise ValueError(
                f"The checkpoint's data loader state is of {saved_ranks} data-parallel ranks, this "
                f"run has {self.rank.count}. Documents were dealt out by rank and some of them are "
                "in packing buffers, so the state cannot be dealt out anew. Set "
                "parallelism.data_parallel_replicate_degree and "
                "parallelism.data_parallel_shard_degree so that their product is "
                f"{saved_ranks} again, or {_START_AFRESH}."
            )
        content = json.loads(state_dict[self._rank_key])
        check_fingerprint(content["fingerprint"], self.fingerprint)
        super().load_state_dict(content["state"] or {})

    @property
    def _rank_key(self) -> str:
        return f"dp_rank_{self.rank.index}"


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise a `ValueError` that names the first key in which two fingerprints differ."""
    for key in [*current, *(key for key in saved if key not in current)]:
        old, new = saved.get(key), current.get(key)
        if old != new:
            raise ValueError(
                f"{key} is {new!r}, but {old!r} in the run that saved the checkpoint: its data "
                f"loader state does not fit. Put it back, or {_START_AFRESH}."
            )


def build_multimodal_tokenizer(job_config: JobConfig) -> TextTokenizer:
    """Build the text tokenizer that `multimodal.text_tokenizer` names."""
    return build_text_tokenizer(_multimodal(job_config).text_tokenizer)


def build_multimodal_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: TextTokenizer, job_config: JobConfig
) -> MultimodalDataLoader:
    """Build the endless loader of `multimodal.train_split`.

    Args:
        dp_world_size: Number of data-parallel ranks.
        dp_rank: Index of this one.
        tokenizer: From `build_multimodal_tokenizer`.
        job_config: The whole configuration; read are its sections multimodal, training and model.

    Raises:
        ValueError: A key does not fit the others; names it, its value and the remedy.
    """
    rank, split = Share(dp_rank, dp_world_size), _multimodal(job_config).train_split
    return _build_loader(job_config, tokenizer, rank, split, True)


def build_multimodal_validation_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: TextTokenizer, job_config: JobConfig, split: str
) -> MultimodalDataLoader:
    """Build a loader that passes once over `split`, the same way in every iteration.

    It ends after `validation.steps` batches, or after all data. Every rank has the same number of
    batches; the last ones may hold sequences of padding, without loss, but in no round are all
    ranks without loss.

    Args:
        dp_world_size: Number of data-parallel ranks.
        dp_rank: Index of this one.
        tokenizer: From `build_multimodal_tokenizer`.
        job_config: The whole configuration; read are its sections multimodal, validation and model.
        split: One of `multimodal.validation_splits`.

    Raises:
        ValueError: A key does not fit the others; names it, its value and the remedy.
    """
    return _build_loader(job_config, tokenizer, Share(dp_rank, dp_world_size), split, False)


def find_modalities(job_config: JobConfig, tokenizer: TextTokenizer) -> Modalities:
    """Look up the modalities of the configured model and lay out the vocabulary.

    Raises:
        ValueError: The text tokenizer has more tokens than the flavour's vocabulary.
    """
    model, config = job_config.model, _multimodal(job_config)
    model_args = token_model_args(job_config)
    if tokenizer.vocab_size > model_args.vocab_size:
        raise ValueError(
            f'multimodal.text_tokenizer = "{config.text_tokenizer}" has '
            f'{tokenizer.vocab_size} tokens, but model.flavor = "{model.flavor}" has a text '
            f"vocabulary of {model_args.vocab_size}. Choose a smaller tokenizer or another flavour."
        )
    return Modalities(tuple(model_args.modality_names), tuple(model_args.vocab_ranges))


def check_settings(job_config: JobConfig) -> None:
    """Build the cheap parts of all loaders of a job, for what they find wrong with its settings.

    Raises:
        ValueError: A tokenizer is missing, broken or does not fit the model, an embedded file is
            missing or corrupt, or an image does not fit into a sequence.
    """
    config = _multimodal(job_config)
    tokenizer = build_multimodal_tokenizer(job_config)
    image_tokenizer = build_image_tokenizer(config.image_tokenizer)
    modalities = find_modalities(job_config, tokenizer)
    lengths = {"training.seq_len": job_config.training.seq_len}
    if job_config.validation.enable:
        lengths["validation.seq_len"] = job_config.validation.seq_len
    for key, seq_len in lengths.items():
        DocumentEncoder(tokenizer, image_tokenizer, modalities, seq_len, key)


def _multimodal(job_config: JobConfig) -> Multimodal:
    """The section that this plugin adds to TorchTitan's configuration when it is parsed."""
    return job_config.multimodal  # pyrefly: ignore [missing-attribute]


def _build_loader(
    job_config: JobConfig, tokenizer: TextTokenizer, rank: Share, split: str, is_training: bool
) -> MultimodalDataLoader:
    section = "training" if is_training else "validation"
    settings = job_config.training if is_training else job_config.validation
    config = _multimodal(job_config)
    modalities = find_modalities(job_config, tokenizer)
    image_tokenizer = build_image_tokenizer(config.image_tokenizer)
    encoder = DocumentEncoder(
        tokenizer, image_tokenizer, modalities, settings.seq_len, f"{section}.seq_len"
    )
    source = build_source(config, split, image_tokenizer, is_training)
    builder = BatchBuilder(
        modalities,
        # A modality without a key of its own, for lack of data, counts in full.
        [getattr(config, f"{name}_weight", 1.0) for name in modalities.names],
        tokenizer.sentinels.pad,
        settings.seq_len,
        config.reset_positions,
    )
    dataset = PackedDataset(
        source,
        Packer(encoder, settings.seq_len),
        builder,
        rank,
        settings.local_batch_size,
        max_batches=-1 if is_training else job_config.validation.steps,
        checked_ranges=modalities.vocab_ranges if config.check_batches else None,
    )
    fingerprint = {
        **source.fingerprint(),
        f"{section}.seq_len": settings.seq_len,
        f"{section}.dataloader.num_workers": settings.dataloader.num_workers,
        "multimodal.text_tokenizer": config.text_tokenizer,
        "multimodal.image_tokenizer": config.image_tokenizer,
        "vocabulary ranges": [list(limits) for limits in modalities.vocab_ranges],
    }
    options = asdict(settings.dataloader)
    if settings.dataloader.num_workers == 0:  # torch refuses these without workers
        options.pop("persistent_workers")
        options.pop("prefetch_factor")
    return MultimodalDataLoader(dataset, rank, fingerprint, **options)
