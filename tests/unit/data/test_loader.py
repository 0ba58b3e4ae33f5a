"""Loaders: bit-equal resumption, refused resumption, equal numbers of validation batches."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.jobs import load_job
from tests.unit.data.fakes import MODALITIES, SENTINELS, RandomSource, make_encoder
from torchtitan_mixtures.data import loader as loader_module
from torchtitan_mixtures.data.batch import check_batch
from torchtitan_mixtures.data.loader import (
    MultimodalDataLoader,
    PackedDataset,
    Share,
    build_multimodal_dataloader,
    build_multimodal_tokenizer,
    build_multimodal_validation_dataloader,
    find_modalities,
)
from torchtitan_mixtures.data.packing import BatchBuilder, Packer

SEQ_LEN = 64
Batch = tuple[dict[str, Tensor], Tensor]


def make_loader(
    num_documents: int = 40,
    rank: Share = Share(0, 1),  # noqa: B008
    is_endless: bool = True,
    max_batches: int = -1,
    **options: Any,
) -> MultimodalDataLoader:
    builder = BatchBuilder(MODALITIES, (1.0, 0.5), SENTINELS.pad, SEQ_LEN, False)
    packer = Packer(make_encoder(SEQ_LEN), SEQ_LEN)
    source = RandomSource(num_documents, 0, is_endless)
    ranges = MODALITIES.vocab_ranges
    dataset = PackedDataset(source, packer, builder, rank, 3, max_batches, ranges)
    workers = {"training.dataloader.num_workers": options.get("num_workers", 0)}
    fingerprint = {**source.fingerprint(), **workers}
    return MultimodalDataLoader(dataset, rank, fingerprint, **options)


def take(loader: MultimodalDataLoader, count: int) -> list[Batch]:
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
    assert all(isinstance(value, (str, int)) for value in state.values())
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


@pytest.mark.parametrize("before", [0, 1, 6])
def test_next_batches_are_equal_with_workers(before: int) -> None:
    check_resumption(lambda: make_loader(num_workers=2), before, 30)


def test_resumption_within_one_rank_of_many() -> None:
    check_resumption(lambda: make_loader(rank=Share(2, 3)), 4, 20)


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
        list(make_loader(40, Share(r, num_ranks), is_endless=False, num_workers=num_workers))
        for r in range(num_ranks)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    for of_one_round in zip(*ranks, strict=True):
        assert any((labels != -100).any() for _, labels in of_one_round)

    # The ranks' sequences are together those of a single rank: no result depends on their number.
    def sequences(batches: list[Batch]) -> list[tuple[int, ...]]:
        rows = [tuple(row.tolist()) for inputs, _ in batches for row in inputs["input"]]
        return sorted(row for row in rows if any(row))

    alone = list(make_loader(40, is_endless=False))
    assert sequences([batch for batches in ranks for batch in batches]) == sequences(alone)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_repeats_and_stops_after_its_steps(num_workers: int) -> None:
    loader = make_loader(40, is_endless=False, max_batches=3, num_workers=num_workers)
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
    assert loader._iterator is None
    resumed = make_loader(num_workers=2)
    resumed.load_state_dict(state)
    assert_equal(take(resumed, 2), take(make_loader(num_workers=2), 2))


def test_other_runs_are_refused() -> None:
    loader = make_loader()
    take(loader, 2)
    state = loader.state_dict()
    with pytest.raises(
        ValueError,
        match=r"of 1 data-parallel ranks, this run has 2.*parallelism\.data_parallel_shard_degree"
        r'.*checkpoint\.exclude_from_loading = \["dataloader"\]',
    ):
        make_loader(rank=Share(0, 2)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"dataloader\.num_workers is 2, but 0 in the run"):
        make_loader(num_workers=2).load_state_dict(state)
    other = make_loader()
    other.fingerprint = {**other.fingerprint, "multimodal.seed": 7}
    with pytest.raises(ValueError, match=r"multimodal\.seed is 7, but 0 .*Put it back"):
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
    check_resumption(lambda: build(job(), 1, 4), 3, 10, tmp_path / "checkpoint")


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
    monkeypatch.setattr(loader_module, "check_batch", lambda *arguments: calls.append(arguments))
    config = job()
    config.multimodal.check_batches = is_checked
    take(build(config), 3)
    assert len(calls) == (3 if is_checked else 0)
