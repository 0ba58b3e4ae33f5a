"""Loaders: bit-equal resumption, refused resumption, equal numbers of validation batches."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.jobs import load_job
from tests.unit.data.fakes import MODALITIES, SENTINELS, RandomSource, make_encoder
from torchtitan_mixtures.data import sequences as sequences_module
from torchtitan_mixtures.data.batch import check_batch
from torchtitan_mixtures.data.batch_builder import BatchBuilder
from torchtitan_mixtures.data.loader import (
    MultimodalDataLoader,
    build_multimodal_dataloader,
    build_multimodal_tokenizer,
    build_multimodal_validation_dataloader,
    find_modalities,
)
from torchtitan_mixtures.data.mixing import Ingredient, Mixture
from torchtitan_mixtures.data.packing import Packer
from torchtitan_mixtures.data.sequences import TrainingSequences, ValidationBatches
from torchtitan_mixtures.data.shards import Share, count_shards
from torchtitan_mixtures.job_config import Multimodal

SEQ_LEN = 64
SHARDS = 12
Batch = tuple[dict[str, Tensor], Tensor]


def make_packer() -> Packer:
    return Packer(SEQ_LEN)


def mix(source: RandomSource) -> Mixture:
    return Mixture([Ingredient("random", source)], make_encoder(SEQ_LEN))


def make_builder() -> BatchBuilder:
    return BatchBuilder(MODALITIES, (1.0, 0.5), SENTINELS.pad, SEQ_LEN, False)


def make_loader(
    num_documents: int = 40,
    rank: Share = Share(0, 1),  # noqa: B008
    batch_size: int = 3,
    **options: Any,
) -> MultimodalDataLoader:
    source = RandomSource(num_documents, 0, True)
    sequences = TrainingSequences(mix(source), make_packer, rank, SHARDS)
    fingerprint = {**source.fingerprint(), "multimodal.shards": SHARDS}
    ranges = MODALITIES.vocab_ranges
    return MultimodalDataLoader(
        sequences, make_builder(), batch_size, fingerprint, ranges, **options
    )


def make_validation(
    num_documents: int = 40,
    rank: Share = Share(0, 1),  # noqa: B008
    max_batches: int = -1,
    **options: Any,
) -> DataLoader:
    source, ranges = RandomSource(num_documents, 0, False), MODALITIES.vocab_ranges
    batches = ValidationBatches(
        mix(source), make_packer, make_builder(), rank, 3, max_batches, ranges
    )
    return DataLoader(batches, batch_size=None, **options)


def take(loader: MultimodalDataLoader | DataLoader, count: int) -> list[Batch]:
    return list(itertools.islice(iter(loader), count))


def assert_equal(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected)
    for (inputs, labels), (expected_inputs, expected_labels) in zip(batches, expected, strict=True):
        assert inputs.keys() == expected_inputs.keys()
        for key, tensor in inputs.items():
            assert torch.equal(tensor, expected_inputs[key]), key
        assert torch.equal(labels, expected_labels)


def through_dcp(state: dict[str, Any], template: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A state dict after a round through a distributed checkpoint."""
    torch.distributed.checkpoint.save({"dataloader": state}, checkpoint_id=folder, no_dist=True)
    loaded = {"dataloader": template}
    torch.distributed.checkpoint.load(loaded, checkpoint_id=folder, no_dist=True)
    return loaded["dataloader"]


def check_resumption(
    make: Callable[[], MultimodalDataLoader], before: int, after: int, folder: Path | None = None
) -> None:
    whole = take(make(), before + after)
    loader = make()
    take_from = iter(loader)
    for _ in range(before):
        next(take_from)
    state = loader.state_dict()
    assert all(isinstance(json.loads(value), dict) for value in state.values())
    resumed = make()
    if folder is not None:
        state = through_dcp(state, resumed.state_dict(), folder)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state  # saving right after loading loses nothing
    assert_equal(take(resumed, after), whole[before:])


# 40 documents are about 13 sequences of this length: 100 batches of 3 cross many epochs.
@pytest.mark.parametrize("before", [0, 1, 2, 5, 33])
def test_next_hundred_batches_are_equal_to_the_bit(before: int, tmp_path: Path) -> None:
    check_resumption(make_loader, before, 100, tmp_path)


@pytest.mark.parametrize("before", [0, 1, 2, 5, 33])
def test_next_batches_are_equal_with_workers(before: int, tmp_path: Path) -> None:
    check_resumption(lambda: make_loader(num_workers=2), before, 30, tmp_path)


def test_resumption_within_one_rank_of_many() -> None:
    check_resumption(lambda: make_loader(rank=Share(2, 3)), 4, 20)


def test_a_loader_goes_on_where_a_broken_off_iteration_was() -> None:
    whole = take(make_loader(), 9)
    for num_workers in (0, 2):
        loader = make_loader(num_workers=num_workers)
        assert_equal(take(loader, 4) + take(loader, 5), whole)


# --- one order, whoever reads it ------------------------------------------------------------------


def rows_of(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for inputs, _ in batches for row in inputs["input"]]


def run_ranks(
    count: int,
    num_steps: int,
    state: dict[str, Any] | None = None,
    folder: Path | None = None,
    **options: Any,
) -> tuple[list[list[tuple[int, ...]]], dict[str, Any]]:
    """Let all ranks take so many batches.

    Args:
        count: Number of data-parallel ranks.
        num_steps: Batches of every rank.
        state: What all ranks of an earlier run have saved.
        folder: Where to pass it through a distributed checkpoint.
        **options: Of `make_loader`.

    Returns:
        The sequences of every step, over all ranks, sorted; and the merged states of all ranks.
    """
    steps: list[list[tuple[int, ...]]] = [[] for _ in range(num_steps)]
    merged: dict[str, Any] = {}
    for rank in range(count):
        loader = make_loader(rank=Share(rank, count), **options)
        if state is not None:
            template = loader.state_dict()
            loader.load_state_dict(
                through_dcp(state, template, folder / str(rank)) if folder else state
            )
        for step, batch in zip(steps, take(loader, num_steps), strict=True):
            step += rows_of([batch])
        saved = loader.state_dict()
        assert not merged.keys() & saved.keys() - {"fingerprint"}
        merged |= saved
    return [sorted(step) for step in steps], merged


def global_order(count: int) -> list[tuple[int, ...]]:
    return rows_of(take(make_loader(batch_size=1), count))


@pytest.mark.parametrize(
    ("ranks", "num_workers", "batch_size"),
    [(1, 0, 1), (1, 2, 3), (2, 0, 2), (4, 0, 1), (2, 2, 1), (3, 0, 1), (1, 3, 5)],
)
def test_order_depends_on_neither_ranks_nor_workers_nor_batches(
    ranks: int, num_workers: int, batch_size: int
) -> None:
    order, size = global_order(120), ranks * batch_size
    for rank in range(ranks):
        loader = make_loader(40, Share(rank, ranks), batch_size, num_workers=num_workers)
        assert rows_of(take(loader, 120 // size)) == order[rank::ranks]


def test_resuming_on_other_numbers_of_ranks_goes_on_with_the_next_sequences(
    tmp_path: Path,
) -> None:
    order, position, state = global_order(200), 0, None
    # 2 x 1 x 7 and then 3 x 1 x 5 batches: 3 ranks start at sequence 86, no multiple of 3
    runs = [(4, 2, 0, 5), (2, 2, 2, 8), (1, 0, 0, 0), (1, 3, 0, 0), (2, 1, 0, 7), (3, 1, 2, 5),
            (1, 4, 3, 6), (4, 1, 0, 9)]  # fmt: skip
    for number, (ranks, batch_size, num_workers, steps) in enumerate(runs):
        taken, state = run_ranks(
            ranks, steps, state, tmp_path / str(number), batch_size=max(1, batch_size),
            num_workers=num_workers,
        )  # fmt: skip
        assert len(state) == SHARDS + 1
        size = ranks * max(1, batch_size)
        for step in taken:
            assert step == sorted(order[position : position + size])
            position += size
    assert position > 150


def test_sequences_that_workers_packed_ahead_are_in_no_state() -> None:
    loader = make_loader(batch_size=2, num_workers=2, prefetch_factor=8)
    take(loader, 3)
    taken = [json.loads(loader.state_dict()[f"shard_{s}"])["taken"] for s in range(SHARDS)]
    assert taken == [1] * 6 + [0] * 6


def document_keys(batches: list[Batch]) -> set[str]:
    """The names that `RandomSource` puts first into every document."""
    keys = set()
    for inputs, _ in batches:
        for tokens, documents in zip(inputs["input"], inputs["document_ids"], strict=True):
            for number in documents.unique():
                inner = tokens[documents == number]
                if inner[0] == SENTINELS.bos:
                    text = bytes(
                        int(i) - 7 for i in itertools.takewhile(lambda i: i > 6, inner[1:])
                    )
                    keys.add(text.decode().rstrip("x"))
    return {key for key in keys if ":" in key}  # not the later parts of long documents


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_read_different_documents(num_workers: int) -> None:
    shares = [
        document_keys(take(make_loader(200, Share(r, 2), num_workers=num_workers), 8))
        for r in range(2)
    ]
    assert shares[0] and shares[1]
    assert not shares[0] & shares[1]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_has_as_many_batches_on_every_rank(num_ranks: int, num_workers: int) -> None:
    ranks = [
        list(make_validation(40, Share(r, num_ranks), num_workers=num_workers))
        for r in range(num_ranks)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    for of_one_round in zip(*ranks, strict=True):
        assert any((labels != -100).any() for _, labels in of_one_round)

    # The ranks' sequences are together those of a single rank: no result depends on their number.
    def sequences(batches: list[Batch]) -> list[tuple[int, ...]]:
        rows = [tuple(row.tolist()) for inputs, _ in batches for row in inputs["input"]]
        return sorted(row for row in rows if any(row))

    alone = list(make_validation(40))
    assert sequences([batch for batches in ranks for batch in batches]) == sequences(alone)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_repeats_and_stops_after_its_steps(num_workers: int) -> None:
    loader = make_validation(40, max_batches=3, num_workers=num_workers)
    first, second = list(loader), list(loader)
    assert len(first) == 3
    assert_equal(first, second)
    next(iter(loader))  # a pass that is broken off does not disturb the next
    assert_equal(list(loader), first)


def test_iterating_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(make_loader(), 2)
    assert torch.equal(torch.rand(3), expected)


def test_state_before_the_first_batch_starts_no_worker() -> None:
    loader = make_loader(num_workers=2)
    state = loader.state_dict()
    assert not multiprocessing.active_children()
    resumed = make_loader(num_workers=2)
    resumed.load_state_dict(state)
    assert_equal(take(resumed, 2), take(make_loader(num_workers=2), 2))


def test_other_runs_are_refused() -> None:
    loader = make_loader()
    take(loader, 2)
    state = loader.state_dict()
    for key, value in (("multimodal.seed", 7), ("multimodal.shards", 24)):
        other = make_loader()
        other.fingerprint = {**other.fingerprint, key: value}
        with pytest.raises(
            ValueError,
            match=rf"{key} is {value}, but \d+ .*Put it back, or .*"
            r'checkpoint\.exclude_from_loading = \["dataloader"\]',
        ):
            other.load_state_dict(state)
    make_loader(rank=Share(0, 2)).load_state_dict({})  # nothing was saved


# --- the whole chain, on the embedded corpus ------------------------------------------------------

TOML = """
[job]
custom_config_module = "torchtitan_mixtures.job_config"
[model]
name = "mot"
flavor = "debugmodel"
[training]
seq_len = 256
local_batch_size = 2
[validation]
seq_len = 256
local_batch_size = 2
steps = 4
[multimodal]
check_batches = true
"""


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Any]:
    """Make a job configuration out of `TOML` and overrides."""
    (tmp_path / "config.toml").write_text(TOML)
    return lambda *overrides: load_job(tmp_path / "config.toml", *overrides)


def build(config: Any, rank: int = 0, count: int = 1) -> MultimodalDataLoader:
    return build_multimodal_dataloader(count, rank, build_multimodal_tokenizer(config), config)


def test_emoji_batches_keep_the_contract(job: Callable[..., Any]) -> None:
    config = job("--multimodal.image_weight=0.5", "--multimodal.reset_positions")
    tokenizer = build_multimodal_tokenizer(config)
    ranges = find_modalities(config, tokenizer).vocab_ranges
    assert ranges == ((0, 2048), (2048, 3072))
    for inputs, labels in take(build(config), 5):
        check_batch(inputs, labels, ranges)
        assert inputs["input"].shape == (2, 256)
        assert inputs["positions"].max() < 255
        assert set(inputs["loss_weights"].unique().tolist()) == {0.0, 0.5, 1.0}
        is_text = inputs["input"][0] < 2048
        assert "<|" not in tokenizer.decode(inputs["input"][0][is_text].tolist())


def test_emoji_resumes_exactly(job: Callable[..., Any], tmp_path: Path) -> None:
    config = job("--multimodal.shards=8")
    check_resumption(lambda: build(config, 1, 4), 3, 10, tmp_path / "checkpoint")


def test_emoji_order_is_the_same_on_any_number_of_ranks(job: Callable[..., Any]) -> None:
    shards = "--multimodal.shards=6"
    order = rows_of(take(build(job("--training.local_batch_size=8", shards)), 3))
    config = job("--training.local_batch_size=1", "--training.dataloader.num_workers=2", shards)
    for rank in range(3):
        assert rows_of(take(build(config, rank, 3), 8)) == order[rank::3]


def test_shards_are_counted_for_many_numbers_of_ranks(job: Callable[..., Any]) -> None:
    config = job("--training.dataloader.num_workers=2")
    assert [count_shards(config, ranks) for ranks in (1, 6, 24, 5)] == [48, 48, 48, 240]
    stream = job("--multimodal.source=datasets", "--multimodal.streaming")
    assert [count_shards(stream, ranks) for ranks in (1, 6, 5)] == [1, 6, 5]
    stream.training.dataloader.num_workers = 3
    assert count_shards(stream, 2) == 6
    with pytest.raises(ValueError, match=r"multimodal\.shards = -1"):
        Multimodal(shards=-1)
    with pytest.raises(
        ValueError,
        match=r"into 16 shards \(multimodal\.shards.* 3 data-parallel ranks .*num_workers = 2"
        r".*: they are 6 readers.* launch one of 1, 2, 4, 8 of them.* a multiple of 6",
    ):
        build(job("--training.dataloader.num_workers=2", "--multimodal.shards=16"), 0, 3)


@pytest.mark.parametrize("options", [{}, {"prefetch_factor": 3}])
def test_dataloader_options_are_honoured(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
) -> None:
    config = job("--training.dataloader.num_workers=1", "--training.dataloader.pin_memory")
    config.training.dataloader.prefetch_factor = options.get("prefetch_factor")
    loader = build(config)
    # TorchTitan counts batches, of 2 sequences here
    assert loader._options["prefetch_factor"] == 2 * options.get("prefetch_factor", 2)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor * 0)
    monkeypatch.setattr(loader, "_pins_memory", True)
    ((inputs, labels),) = take(loader, 1)
    assert not any(tensor.any() for tensor in (*inputs.values(), labels))


@pytest.mark.parametrize("split", ["unseen_concept", "unseen_style"])
def test_emoji_validation_ends(job: Callable[..., Any], split: str) -> None:
    config = job()
    tokenizer = build_multimodal_tokenizer(config)
    batches = [
        list(build_multimodal_validation_dataloader(2, rank, tokenizer, config, split))
        for rank in range(2)
    ]
    assert [len(of_rank) for of_rank in batches] == [4, 4]


def test_emoji_errors_name_the_key(job: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r'train_split.* no split "dev".*unseen_concept'):
        build(job("--multimodal.train_split=dev"))
    with pytest.raises(ValueError, match=r"training\.seq_len = 67 .* at least 68"):
        build(job("--training.seq_len=67"))
    config = job()
    tokenizer = build_multimodal_tokenizer(config)
    with pytest.raises(ValueError, match=r'validation_splits.* no split "test"'):
        build_multimodal_validation_dataloader(1, 0, tokenizer, config, "test")

    class Larger:
        vocab_size = 5000

    with pytest.raises(
        ValueError, match=r'text_tokenizer = "emoji" has 5000 tokens.*"debugmodel".* of 2048'
    ):
        build_multimodal_dataloader(1, 0, Larger(), config)


def test_changed_configuration_is_refused(job: Callable[..., Any]) -> None:
    loader = build(job())
    take(loader, 1)
    state = json.loads(json.dumps(loader.state_dict()))
    for override, key in (
        ("--training.seq_len=512", r"training\.seq_len is 512, but 256"),
        ("--multimodal.scene_fraction=0.5", r"multimodal\.scene_fraction is 0\.5, but 0\.25"),
    ):
        with pytest.raises(ValueError, match=key):
            build(job(override)).load_state_dict(state)


@pytest.mark.parametrize("is_checked", [True, False])
def test_batches_are_checked_on_request(
    job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, is_checked: bool
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(sequences_module, "check_batch", lambda *arguments: calls.append(arguments))
    config = job()
    config.multimodal.check_batches = is_checked
    take(build(config), 3)
    assert len(calls) == (3 if is_checked else 0)
