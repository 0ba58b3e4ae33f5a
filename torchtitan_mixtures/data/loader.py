"""The data loaders of token models: resumable to the bit, with plain JSON in the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import JobConfig

from torchtitan_mixtures.data.batch_builder import BatchBuilder
from torchtitan_mixtures.data.emoji_source import check_speech_fits
from torchtitan_mixtures.data.encoding import DocumentEncoder, Modalities
from torchtitan_mixtures.data.mixing import Mixture
from torchtitan_mixtures.data.mixture import SourceTokenizers, build_ingredients, check_sources
from torchtitan_mixtures.data.packing import Packer
from torchtitan_mixtures.data.sequences import (
    Batch,
    PackedSequence,
    TrainingSequences,
    ValidationBatches,
    make_batch,
)
from torchtitan_mixtures.data.shards import Share, check_fingerprint, count_shards
from torchtitan_mixtures.data.speech import build_speech_tokenizer
from torchtitan_mixtures.data.tokenizers import (
    TextTokenizer,
    build_image_tokenizer,
    build_text_tokenizer,
)
from torchtitan_mixtures.data.vocabulary import token_model_args
from torchtitan_mixtures.data.workers import end_with_parent

if TYPE_CHECKING:
    from torchtitan_mixtures.job_config import Multimodal


_ORDER_KEYS = ("caption_first", "condition_dropout", "packing", "long_documents")


class MultimodalDataLoader(BaseDataLoader):
    """Endless loader whose state is a JSON string per shard.

    DCP merges the dictionaries of all ranks, and a rank of a run with another number of ranks asks
    it for the shards that are its own there. A state is refused if the run differs from the one
    that saved it in anything the order of documents or the packing depends on.

    Args:
        sequences: The sequences of this rank.
        builder: Makes batches of them.
        batch_size: Sequences of a batch.
        fingerprint: TOML keys and values that must not change between save and resume.
        checked_ranges: See `make_batch`.
        pin_memory: Put batches into memory that an accelerator copies from faster.
        **options: Options of `DataLoader` about worker processes.
    """

    def __init__(
        self,
        sequences: TrainingSequences,
        builder: BatchBuilder,
        batch_size: int,
        fingerprint: dict[str, Any],
        checked_ranges: tuple[tuple[int, int], ...] | None = None,
        pin_memory: bool = False,
        **options: Any,
    ) -> None:
        self.fingerprint = fingerprint
        self._sequences = sequences
        self._builder = builder
        self._batch_size = batch_size
        self._checked_ranges = checked_ranges
        # Batches are made in this process: `DataLoader` itself could pin sequences only.
        self._pins_memory = pin_memory and torch.accelerator.is_available()
        self._options = options

    def __iter__(self) -> Iterator[Batch]:
        """Continue after the last batch that was handed out, or from the loaded state."""
        # Sequences that a worker has packed ahead are in no state: only those handed out count.
        sequences = iter(_make_loader(self._sequences, collate_fn=_as_it_is, **self._options))
        while True:
            chosen: list[PackedSequence] = list(islice(sequences, self._batch_size))
            batch = make_batch(
                self._builder, [sequence.documents for sequence in chosen], self._checked_ranges
            )
            if self._pins_memory:
                input_dict, labels = batch
                pinned = {key: tensor.pin_memory() for key, tensor in input_dict.items()}
                batch = pinned, labels.pin_memory()
            self._sequences.states.update((sequence.shard, sequence.state) for sequence in chosen)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The states of this rank's shards."""
        return {
            "fingerprint": json.dumps(self.fingerprint),
            **{
                f"shard_{shard}": json.dumps(state, default=np.ndarray.tolist)
                for shard, state in self._sequences.states.items()
            },
        }

    @property
    def source_names(self) -> list[str]:
        """What the data are mixed of."""
        return [part.name for part in self._sequences.mixture.ingredients]

    def counts(self) -> list[dict[str, float]]:
        """What the batches handed out so far have cost of each source, in this rank's shards.

        Returns:
            For each source: `tokens` in the batches, and what was read for that: `documents`,
            `split` and `dropped` ones, pieces left out as `mute` (nothing to predict), `samples`,
            `bad` ones of them, and `epochs`, whose sum over all ranks is the mean over shards.
            After the last source one more: `tokens` and `positions` of the sequences.
        """
        names = ("tokens", "documents", "split", "dropped", "mute", "samples", "bad", "epochs")
        sums = [dict.fromkeys(names, 0.0) for _ in self.source_names]
        packed = {"tokens": 0.0, "positions": 0.0}
        for state in self._sequences.states.values():
            if not state["taken"]:
                continue
            packed["tokens"] += state["tokens"]
            packed["positions"] += state["taken"] * self._builder.seq_len
            source = state["source"]
            rows = zip(sums, source["counts"], source["progress"], strict=True)
            for total, counts, progress in rows:
                shares = {"epochs": progress["epochs"] / self._sequences.num_shards}
                for name in names:
                    total[name] += {**counts, **progress, **shares}[name]
            waiting = state["packer"]
            for number, tokens in zip(waiting["sources"], waiting["buffer"], strict=True):
                sums[number]["tokens"] -= len(tokens)
        return [*sums, packed]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: The run that saved it differs in a way that would change or repeat data.
        """
        if not state_dict:  # TorchTitan's convention for "nothing was saved"
            return
        check_fingerprint(json.loads(state_dict["fingerprint"]), self.fingerprint)
        for shard in self._sequences.states:
            self._sequences.states[shard] = json.loads(state_dict[f"shard_{shard}"])


def _make_loader(dataset: TrainingSequences | ValidationBatches, **options: Any) -> DataLoader:
    # A generator of its own: the default one would be advanced by every new iterator, and the
    # random numbers of the training would depend on when validation ran.
    return DataLoader(
        dataset,
        batch_size=None,
        generator=torch.Generator(),
        worker_init_fn=end_with_parent,
        **options,
    )


def _as_it_is(item: Any) -> Any:
    """Keep `DataLoader` from making tensors of the arrays in an item."""
    return item


def build_multimodal_tokenizer(job_config: JobConfig) -> TextTokenizer:
    """Build the text tokenizer that `multimodal.text_tokenizer` names."""
    return build_text_tokenizer(multimodal_section(job_config).text_tokenizer)


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
    config, settings = multimodal_section(job_config), job_config.training
    options = worker_options(job_config, "training")
    num_shards = count_shards(job_config, dp_world_size)
    parts = _LoaderParts(job_config, tokenizer, "training", config.train_split)
    sequences = TrainingSequences(
        parts.mixture, parts.make_packer, Share(dp_rank, dp_world_size), num_shards
    )
    fingerprint = {
        **parts.mixture.fingerprint(),
        "training.seq_len": settings.seq_len,
        "multimodal.shards": num_shards,
        # Of what they hold, not where they are: a file may move, and another may take its place.
        **{
            f"content of multimodal.{name}_tokenizer": content
            for name, content in parts.tokenizers.fingerprints().items()
        },
        **{f"multimodal.{key}": getattr(config, key) for key in _ORDER_KEYS},
        "vocabulary ranges": [list(limits) for limits in parts.modalities.vocab_ranges],
    }
    if "prefetch_factor" in options:  # workers hand over sequences, the option counts batches
        per_worker = options["prefetch_factor"]
        options["prefetch_factor"] = settings.local_batch_size * (
            2 if per_worker is None else per_worker
        )
    return MultimodalDataLoader(
        sequences,
        parts.builder,
        settings.local_batch_size,
        fingerprint,
        parts.checked_ranges,
        **options,
    )


def build_multimodal_validation_dataloader(
    dp_world_size: int, dp_rank: int, tokenizer: TextTokenizer, job_config: JobConfig, split: str
) -> DataLoader:
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
    parts = _LoaderParts(job_config, tokenizer, "validation", split)
    batches = ValidationBatches(
        parts.mixture,
        parts.make_packer,
        parts.builder,
        Share(dp_rank, dp_world_size),
        job_config.validation.local_batch_size,
        job_config.validation.steps,
        parts.checked_ranges,
    )
    return _make_loader(batches, **worker_options(job_config, "validation"))


def find_modalities(job_config: JobConfig, tokenizer: TextTokenizer) -> Modalities:
    """Look up the modalities of the configured model and lay out the vocabulary.

    Raises:
        ValueError: The text tokenizer has more tokens than the flavour's vocabulary.
    """
    model, config = job_config.model, multimodal_section(job_config)
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
            missing or corrupt, or an image or a spoken name does not fit into a sequence.
    """
    config = multimodal_section(job_config)
    tokenizer = build_multimodal_tokenizer(job_config)
    image_tokenizer = build_image_tokenizer(config.image_tokenizer)
    modalities = find_modalities(job_config, tokenizer)
    check_sources(config, modalities.names, job_config.validation.enable)
    lengths = {"training.seq_len": job_config.training.seq_len}
    if job_config.validation.enable:
        lengths["validation.seq_len"] = job_config.validation.seq_len
    for key, seq_len in lengths.items():
        DocumentEncoder(tokenizer, image_tokenizer, modalities, seq_len, key)
    if config.source == "emoji" and "speech" in modalities.names:
        check_speech_fits(lengths)


def multimodal_section(job_config: JobConfig) -> Multimodal:
    """The section that this plugin adds to TorchTitan's configuration when it is parsed."""
    return job_config.multimodal  # pyrefly: ignore [missing-attribute]


class _LoaderParts:
    """What the loaders of both sections are put together from."""

    def __init__(
        self,
        job_config: JobConfig,
        tokenizer: TextTokenizer,
        section: Literal["training", "validation"],
        split: str,
    ) -> None:
        config, seq_len = multimodal_section(job_config), getattr(job_config, section).seq_len
        self.modalities = find_modalities(job_config, tokenizer)
        names = self.modalities.names
        speech = build_speech_tokenizer(config.speech_tokenizer) if "speech" in names else None
        self.tokenizers = tokenizers = SourceTokenizers(
            tokenizer, build_image_tokenizer(config.image_tokenizer), speech
        )
        encoder = DocumentEncoder(
            tokenizer,
            tokenizers.image,
            self.modalities,
            seq_len,
            f"{section}.seq_len",
            speech,
            config.long_documents,
        )
        self.make_packer = partial(Packer, seq_len, config.packing)
        is_training = section == "training"
        ingredients = build_ingredients(config, split, tokenizers, is_training, names)
        self.mixture = Mixture(ingredients, encoder, config.seed)
        self.builder = BatchBuilder(
            self.modalities,
            # A modality without a key of its own, for lack of data, counts in full.
            [getattr(config, f"{name}_weight", 1.0) for name in self.modalities.names],
            tokenizer.sentinels.pad,
            seq_len,
            config.reset_positions,
        )
        self.checked_ranges = self.modalities.vocab_ranges if config.check_batches else None


def worker_options(
    job_config: JobConfig, section: Literal["training", "validation"]
) -> dict[str, Any]:
    """The options of a section's `dataloader`, without those that torch refuses."""
    options = asdict(getattr(job_config, section).dataloader)
    if options["num_workers"] == 0:
        options.pop("persistent_workers")
        options.pop("prefetch_factor")
    return options
