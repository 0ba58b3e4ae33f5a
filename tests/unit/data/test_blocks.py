"""Blocks dealt to shards, and what they do with samples that cannot be read."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest

from torchtitan_mixtures.data.blocks import BlockSource
from torchtitan_mixtures.data.sources import Document, Segment


class Lists(BlockSource[Any]):
    """Blocks that are lists; of a sample that is an exception, building raises it."""

    def __init__(
        self, blocks: Sequence[Any], is_endless: bool = True, bad: float = 0.01, max_epochs: int = 0
    ) -> None:
        super().__init__(len(blocks), 0, is_endless, "lists", bad, max_epochs)
        self.blocks = blocks

    def read_block(self, block: int) -> Sequence[Any]:
        if isinstance(self.blocks[block], Exception):
            raise self.blocks[block]
        return self.blocks[block]

    def sample_key(self, block: int, number: int, sample: Any) -> str:
        return f"block {block}, sample {number}"

    def build(self, sample: Any, key: str, rng: Random) -> Document:
        if isinstance(sample, Exception):
            raise sample
        return Document((Segment("text", f"{sample} {rng.random()}"),), key)

    def fingerprint(self) -> dict[str, Any]:
        return {}


def keys(source: Lists, count: int = 1, limit: int | None = None) -> list[str]:
    shards = source.shards(range(count), count)
    return [d.key for shard in shards for d in itertools.islice(iter(shard), limit)]


SIZES = [3, 0, 5, 1, 0, 2, 7]
BLOCKS = [list(range(size)) for size in SIZES]
ALL = {f"block {block}, sample {i}" for block, size in enumerate(SIZES) for i in range(size)}


@pytest.mark.parametrize("count", [1, 2, 5, 48])
def test_shards_of_any_number_read_each_sample_once_an_epoch(count):
    assert Counter(keys(Lists(BLOCKS, is_endless=False), count)) == Counter(ALL)
    assert Counter(keys(Lists(BLOCKS, max_epochs=3), count)) == Counter(sorted(ALL) * 3)


def test_orders_differ_from_epoch_to_epoch_in_blocks_and_of_blocks():
    found = keys(Lists(BLOCKS), limit=2 * len(ALL))
    first, second = found[: len(ALL)], found[len(ALL) :]
    assert sorted(first) == sorted(second) == sorted(ALL)
    assert first != second
    inside = [[k for k in order if k.startswith("block 6")] for order in (first, second)]
    assert inside[0] != inside[1]


def test_one_pass_is_in_order():
    source = Lists(BLOCKS, is_endless=False)
    expected = [f"block {b}, sample {i}" for b, size in enumerate(SIZES) for i in range(size)]
    assert keys(source) == expected


def test_what_is_drawn_in_a_sample_is_the_same_on_any_number_of_shards():
    def texts(count: int) -> set[Any]:
        shards = Lists(BLOCKS, max_epochs=2).shards(range(count), count)
        return {(d.key, d.segments[0].payload) for shard in shards for d in shard}

    assert texts(1) == texts(4)
    assert len(texts(1)) == 2 * len(ALL)  # anew in each epoch


def test_shards_far_from_each_other_read_their_own_epochs():
    source = Lists(BLOCKS)
    near, far = source.shards([0, 1], 2)
    expected = [d.key for d in itertools.islice(iter(Lists(BLOCKS).shards([0], 2)[0]), 5)]
    assert len(list(itertools.islice(iter(far), 500))) == 500
    assert [d.key for d in itertools.islice(iter(near), 5)] == expected


def test_blocks_and_samples_that_cannot_be_read_are_counted(caplog):
    blocks = [*([list(range(50))] * 4), ValueError("torn"), [ValueError("blurred"), 1]]
    (shard,) = Lists(blocks, is_endless=False).shards([0], 1)
    assert len(list(shard)) == 201
    assert shard.progress() == {"epochs": 1.0, "samples": 203, "bad": 2}
    assert "Skipped bad sample lists, block 4: torn" in caplog.text
    assert "Skipped bad sample block 5, sample 0: blurred" in caplog.text
    blocks[-1] = [ValueError("blurred")] * 3
    with pytest.raises(ValueError, match=r'4 of 204 .*"lists" are bad; .*lists, block 4; block 5'):
        list(Lists(blocks, is_endless=False).shards([0], 1)[0])


def test_a_mistake_of_ours_names_the_sample():
    with pytest.raises(ValueError, match=r"^block 0, sample 1: KeyError: 'x'$"):
        keys(Lists([[1, KeyError("x")]], is_endless=False))


def test_one_bad_sample_of_a_process_that_reads_a_part_stops_nothing():
    """1 of 10 samples of this shard, and 1 of 400 of all."""
    blocks = [[ValueError("bad"), *range(9)], *([list(range(10))] * 39)]
    whole = Lists(blocks, is_endless=False).shards(range(40), 40)
    assert sum(len(list(shard)) for shard in whole) == 399
    (part,) = Lists(blocks, is_endless=False).shards([0], 40)
    assert len(list(part)) == 9
    with pytest.raises(ValueError, match="1 of 10 samples"):
        list(Lists(blocks[:1], is_endless=False).shards([0], 1)[0])


@pytest.mark.parametrize("count", [1, 48])
def test_a_source_of_empty_blocks_is_no_endless_loop(count):
    with pytest.raises(ValueError, match='source "lists": holds no samples; check'):
        keys(Lists([[], [], []]), count, limit=1)


def test_nothing_but_bad_samples_ends_whatever_the_limit_and_the_readers():
    source = Lists([[ValueError("bad")] * 10] * 4, bad=1.0)
    with pytest.raises(ValueError, match=r"1000 of 1000 samples \(100.00%\)"):
        list(source.shards([0], 2)[0])
