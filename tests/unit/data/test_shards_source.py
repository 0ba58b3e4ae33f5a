"""The source of shards: order, resumption, pairs, and which shards it refuses."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.data.fakes import make_encoder
from tests.unit.data.shard_fakes import (
    PRINTS,
    Plain,
    ToySource,
    open_toy,
    plain,
    write_shards,
)
from torchtitan_mixtures.data import shards_source
from torchtitan_mixtures.data.encoding import Modalities
from torchtitan_mixtures.data.shards_source import TokenizedSource, build_shards_source
from torchtitan_mixtures.data.sources import PairOrder, Segment
from torchtitan_mixtures.data.tokenize_source import Tokenizing, tokenize
from torchtitan_mixtures.data.tokenized_shards import TokenizedShards
from torchtitan_mixtures.multimodal_config import Multimodal
from torchtitan_mixtures.source_entries import SourceEntry


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    tokenize(open_toy, Tokenizing(folder, parts=3), lambda line: None)
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def entry(folder: Path, **options: Any) -> SourceEntry:
    return SourceEntry("mine", "shards", str(folder), **options)


CAPTION_FIRST = PairOrder(1.0)


def build(
    folder: Path, order: PairOrder = CAPTION_FIRST, is_endless: bool = True, **options: Any
) -> TokenizedSource:
    config = Multimodal(seed=options.pop("seed", 0))
    return build_shards_source(entry(folder, **options), config, PRINTS, order, is_endless)


def test_one_pass_gives_the_documents_that_were_tokenized_in_their_order(made: Path) -> None:
    (shard,) = build(made, is_endless=False).shards([0], 1)
    expected = [plain(d) for source in ToySource().shards(range(3), 3) for d in source]
    assert [plain(document) for document in shard] == expected


def test_tokens_of_shards_are_those_of_the_source(made: Path) -> None:
    modalities = Modalities(("text", "image", "speech"), ((0, 300), (300, 316), (316, 324)))
    encoder = make_encoder(1000, modalities)
    stored = build(made, is_endless=False).shards([0], 1)[0]
    originals = [d for shard in ToySource().shards(range(3), 3) for d in shard]
    pairs = zip(stored, originals, strict=True)
    compared = 0
    for document, original in pairs:
        if original.is_pair or any(s.modality == "speech" for s in original.segments):
            continue  # of another order, or of a tokenizer that this encoder has not
        (tokens,), (expected,) = encoder.encode(document), encoder.encode(original)
        assert tokens.tolist() == expected.tolist()
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("count", [1, 3, 48])
def test_every_epoch_has_every_document_once_whatever_the_shards(made: Path, count: int) -> None:
    source = build(made, max_epochs=2)
    keys = [d.key for shard in source.shards(range(count), count) for d in shard]
    assert len(keys) == 2 * source._shards.manifest.documents
    assert set(Counter(keys).values()) == {2}
    assert keys[0].startswith("mine: shard-00000")


def test_epochs_and_seeds_have_orders_of_their_own(made: Path) -> None:
    def keys(seed: int) -> list[str]:
        (shard,) = build(made, max_epochs=2, seed=seed).shards([0], 1)
        return [document.key for document in shard]

    one, other = keys(0), keys(1)
    half = len(one) // 2
    assert one[:half] != one[half:] and one != other and one == keys(0)
    assert sorted(one[:half]) == sorted(one[half:]) == sorted(other[:half])


def test_reading_goes_on_exactly_where_a_state_was_taken(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_source, "_MANY_BLOCKS", 8)
    order = PairOrder(0.5, 0.3)

    def contents(shard: Any, count: int) -> list[Any]:
        documents = itertools.islice(shard, count)
        return [(d.key, d.is_pair, [naive(s) for s in d.segments]) for d in documents]

    def naive(segment: Segment) -> Any:
        assert not isinstance(segment.payload, str) and segment.payload.dtype == np.int64
        return segment.modality, segment.payload.tolist(), segment.has_loss

    source = build(made, order)
    assert source.num_blocks < source._shards.manifest.documents / 8
    expected = contents(source.shards([1], 2)[0], 150)
    for taken in range(0, 100, 7):
        (shard,) = build(made, order).shards([1], 2)
        contents(shard, taken)
        state = json.loads(json.dumps(shard.state_dict()))
        (again,) = build(made, order).shards([1], 2)
        again.load_state_dict(state)
        assert contents(again, 50) == expected[taken : taken + 50]


def test_pairs_are_arranged_when_they_are_read(tmp_path: Path) -> None:
    pair: Plain = ([("text", [1, 2], True), ("image", [3], True)], True)
    fixed: Plain = ([("image", [3], True), ("text", [1, 2], False)], False)
    write_shards(tmp_path, [pair] * 600 + [fixed] * 100)

    def shapes(order: PairOrder) -> Counter[tuple[Any, ...]]:
        source = TokenizedSource(TokenizedShards(tmp_path), order, 0, True, "mine", max_epochs=1)
        documents = source.shards([0], 1)[0]
        return Counter((d.is_pair, *(s.modality for s in d.segments)) for d in documents)

    assert shapes(PairOrder(1.0)) == {(True, "text", "image"): 600, (False, "image", "text"): 100}
    mixed = shapes(PairOrder(0.5, 0.5))
    assert mixed[False, "image", "text"] == 100
    # Four standard deviations about a half and two quarters of 600.
    assert abs(mixed[True, "image", "text"] - 300) < 49
    assert abs(mixed[True, "text", "image"] - 150) < 43
    assert abs(mixed[True, "image"] - 150) < 43


def test_a_damaged_file_ends_training_whatever_may_be_bad(copied: Path) -> None:
    path = copied / "shard-000001.safetensors"
    octets = bytearray(path.read_bytes())
    octets[-100] ^= 1
    path.write_bytes(octets)
    source = TokenizedSource(
        TokenizedShards(copied), PairOrder(), 0, True, "mine", max_bad_fraction=1.0
    )
    with pytest.raises(ValueError, match=r"shard-000001.*is damaged"):
        list(itertools.islice(source.shards([0], 1)[0], 1000))


def test_shards_of_another_tokenizer_are_refused(made: Path) -> None:
    config = Multimodal(image_tokenizer="my_codes")
    other = {**PRINTS, "image": "f" * 64}
    with pytest.raises(ValueError) as caught:
        build_shards_source(entry(made), config, other, PairOrder(), True)
    for part in ("sources[mine].path", "'grey'", "greygrey", "my_codes", "ffff", "tokenize again"):
        assert part in str(caught.value)


def test_shards_with_a_modality_that_the_model_has_not_are_refused(made: Path) -> None:
    prints = {"text": PRINTS["text"], "image": PRINTS["image"]}
    with pytest.raises(ValueError, match="holds speech, and the model's modalities are text"):
        build_shards_source(entry(made), Multimodal(), prints, PairOrder(), True)


def test_a_tokenizer_that_made_none_of_the_codes_may_be_another(tmp_path: Path) -> None:
    write_shards(tmp_path, [([("text", [1], True)], False)])
    prints = {"text": "text", "image": "another"}
    build_shards_source(entry(tmp_path), Multimodal(), prints, PairOrder(), True)


def test_shards_without_documents_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, [])
    with pytest.raises(ValueError, match=r"sources\[mine\].path = .*holds no documents"):
        build_shards_source(entry(tmp_path), Multimodal(), PRINTS, PairOrder(), True)


def test_what_is_wrong_with_a_folder_is_told_with_the_entry(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sources\[mine\].path = .*has no manifest.json"):
        build_shards_source(entry(tmp_path), Multimodal(), PRINTS, PairOrder(), True)


def test_fingerprints_tell_shards_apart_and_not_where_they_are(made: Path, copied: Path) -> None:
    assert build(made).fingerprint() == build(copied).fingerprint()
    assert str(made) not in json.dumps(build(made).fingerprint())
    assert build(made).fingerprint() != build(made, seed=1).fingerprint()
    other = copied.parent / "other"
    tokenize(open_toy, Tokenizing(other, parts=2), lambda line: None)
    assert build(other).fingerprint() != build(made).fingerprint()


def test_blocks_are_smaller_where_documents_are_long(tmp_path: Path) -> None:
    long: Plain = ([("text", [1] * 5000, True)], False)
    write_shards(tmp_path, [long] * 300)
    source = TokenizedSource(TokenizedShards(tmp_path), PairOrder(), 0, False, "mine")
    assert source.num_blocks == 300  # few documents: as many blocks as there can be
    assert [len(source.read_block(block)) for block in range(300)] == [1] * 300
