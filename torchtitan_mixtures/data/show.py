"""A page of packed sequences as training sees them: `python scripts/prepare_data.py show`.

What is shown are the arrays of batches out of the loader that training builds, read back by
`data/inspection.py`; the documents they were packed from are not consulted.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures.data.batch import check_batch
from torchtitan_mixtures.data.codecs import build_codecs
from torchtitan_mixtures.data.encoding import Modalities
from torchtitan_mixtures.data.inspection import (
    compute_statistics,
    find_mistakes,
    read_rows,
    split_documents,
)
from torchtitan_mixtures.data.loader import (
    build_multimodal_dataloader,
    build_multimodal_validation_dataloader,
)
from torchtitan_mixtures.data.sequences import Batch, ValidationBatches
from torchtitan_mixtures.data.show_page import (
    SequenceView,
    build_decoders,
    definitions,
    render_page,
)
from torchtitan_mixtures.data.tokenizers import TextTokenizer

if TYPE_CHECKING:
    from torchtitan_mixtures.job_config import MixtureJobConfig, Multimodal

_DOCTYPE = b"<!DOCTYPE html>"


def write_page(
    job_config: MixtureJobConfig, out: Path, num_sequences: int = 8, split: str | None = None
) -> None:
    """Write one HTML page that needs no other file.

    The training split is read by the training loader, from the first sequence of a run on; the
    order is that of any number of ranks, unless `multimodal.streaming` makes the shards depend on
    it. Other splits are read by the validation loader, and may hold fewer sequences than asked for.

    Args:
        job_config: The whole configuration; read are its sections multimodal, model, training and
            validation.
        out: The page; an HTML file that exists is replaced.
        num_sequences: How many sequences to show.
        split: None for `multimodal.train_split`.

    Raises:
        ValueError: The page cannot be written, `num_sequences` is not positive, the split is
            unknown, or what the loader raises.
    """
    if num_sequences < 1:
        raise ValueError(f"--sequences = {num_sequences}: must be 1 or more.")
    if out.is_dir() or not out.parent.is_dir():
        reason = "is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise ValueError(f"--out {out}: {reason}; name a file in a folder that exists.")
    if _is_precious(out):
        raise ValueError(f"--out {out}: exists and is not an HTML page; name another file.")
    page = make_page(job_config, num_sequences, split)
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror}).") from error


def _is_precious(out: Path) -> bool:
    """Whether a file would be lost that is not the page of an earlier call, nor empty."""
    if not out.is_file():
        return False
    try:
        with out.open("rb") as file:
            begin = file.read(len(_DOCTYPE))
    except OSError:  # then it cannot be seen what it is
        return True
    return begin not in (b"", _DOCTYPE)


def make_page(job_config: MixtureJobConfig, num_sequences: int, split: str | None) -> str:
    """Make the page that `write_page` writes."""
    spec = get_train_spec(job_config.model.name)
    if spec.build_tokenizer_fn is None:
        raise ValueError(
            f"model.name = {job_config.model.name!r}: has images and no sequences of tokens, which "
            "this page shows; pictures are in the log of a run (tensorboard --logdir outputs)."
        )
    config = job_config.multimodal
    split = split or config.train_split
    codecs = build_codecs(job_config)
    tokenizer, modalities = codecs.text, codecs.modalities
    if split == config.train_split:
        batches, counts = take_training(job_config, tokenizer, num_sequences)
        section = job_config.training
    else:
        batches, counts = take_validation(job_config, tokenizer, num_sequences, split)
        section = job_config.validation
    rows = list(islice(chain.from_iterable(read_rows(*b) for b in batches), num_sequences))
    documents = [split_documents(row, tokenizer.sentinels) for row in rows]
    sequences = [
        SequenceView(row, of_row, find_mistakes(row))
        for row, of_row in zip(rows, documents, strict=True)
    ]
    facts = {
        "configuration": job_config.job.config_file,
        "model": f"{job_config.model.name} {job_config.model.flavor}",
        "split": f"{split} ({'training' if section is job_config.training else 'validation'})",
        "source": describe_source(config),
        "multimodal.seed": config.seed,
        "text tokenizer": f"{config.text_tokenizer} ({tokenizer.vocab_size:,} tokens)",
        **{
            f"{name} tokenizer": getattr(config, f"{name}_tokenizer", "none")
            for name in modalities.names[1:]
        },
        "token ids": ", ".join(
            f"{name} [{start:,}, {end:,})"
            for name, (start, end) in zip(modalities.names, modalities.vocab_ranges, strict=True)
        ),
        "seq_len": f"{section.seq_len:,} positions",
        "local_batch_size": section.local_batch_size,
        **describe_samples(counts),
    }
    values = {key: json.dumps(value) for key, value in asdict(config).items()}
    header = (
        definitions(facts)
        + f"<details><summary>all of [multimodal]</summary>{definitions(values)}</details>"
    )
    return render_page(
        f"{len(rows)} sequences of {split}",
        header,
        find_violations(batches, modalities),
        compute_statistics(rows, documents, modalities),
        sequences,
        modalities,
        tokenizer,
        build_decoders(codecs),
    )


def take_training(
    job_config: MixtureJobConfig, tokenizer: TextTokenizer, num_sequences: int
) -> tuple[list[Batch], list[dict[str, Any]]]:
    """Take the first batches of a run, and the counts of the samples read for them, by shard."""
    loader = build_multimodal_dataloader(1, 0, tokenizer, job_config)
    batch_size = job_config.training.local_batch_size
    batches = list(islice(loader, -(-num_sequences // batch_size)))
    state = loader.state_dict()
    shards = [json.loads(state[key]) for key in state if key.startswith("shard_")]
    taken = [shard["source"] for shard in shards if "source" in shard]
    return batches, [counts for source in taken for counts in sample_counts(source)]


def take_validation(
    job_config: MixtureJobConfig, tokenizer: TextTokenizer, num_sequences: int, split: str
) -> tuple[list[Batch], list[dict[str, Any]]]:
    """Take the first batches of a validation split, and the counts of the samples read for them."""
    job_config = deepcopy(job_config)
    job_config.validation.steps = -1
    # In this process, where the counts can be read; batches do not depend on workers.
    job_config.validation.dataloader.num_workers = 0
    try:
        loader = build_multimodal_validation_dataloader(1, 0, tokenizer, job_config, split)
    except ValueError as error:
        # The split was named here, and not by the key that a training takes it from.
        key = r"multimodal\.validation_splits"
        message = re.sub(rf"^{key}( = {re.escape(repr(split))})?: | \({key}\)", "", str(error))
        raise ValueError(f"--split {split}: {message}") from error
    batch_size = job_config.validation.local_batch_size
    batches = list(islice(loader, -(-num_sequences // batch_size)))
    documents = cast(ValidationBatches, loader.dataset).documents
    assert documents is not None  # it has been iterated
    return batches, sample_counts(documents.state_dict())


def describe_source(config: Multimodal) -> str:
    """Say where documents come from."""
    if config.source == "mixture":
        tables = [*config.sources, *config.validation_sources]
        return ", ".join(f"{t.get('name')} ({t.get('kind')} {t.get('path', '')})" for t in tables)
    return config.source if config.source == "emoji" else f"datasets: {config.path}"


def sample_counts(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The counts of samples in the state of a shard, of each source that counts them."""
    return [shard["counts"] for shard in state["shards"] if "counts" in shard]


def describe_samples(counts: list[dict[str, Any]]) -> dict[str, str]:
    """Say how many samples were skipped; nothing for a source that has no bad ones."""
    if not counts:
        return {}
    seen, bad = (sum(of_shard[key] for of_shard in counts) for key in ("seen", "bad"))
    keys = [key for of_shard in counts for key in of_shard["bad_keys"]]
    named = f": {'; '.join(keys)}{'; ...' if len(keys) < bad else ''}" if bad else ""
    return {"bad samples": f"{bad:,} of {seen:,} read were skipped{named}"}


def find_violations(batches: list[Batch], modalities: Modalities) -> list[str]:
    """Messages about batches that break the contract, one for each at most."""
    violations = []
    for number, (input_dict, labels) in enumerate(batches):
        try:
            check_batch(input_dict, labels, modalities.vocab_ranges)
        except ValueError as error:
            violations.append(f"batch {number} breaks the contract: {error}")
    return violations
