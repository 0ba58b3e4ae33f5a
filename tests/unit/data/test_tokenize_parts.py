"""Parts of a source: bad samples, codes of segments, how many parts, and all kinds of sources."""

from __future__ import annotations

import io
import logging
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.unit.data.shard_fakes import (
    NAMES,
    TOKENIZERS,
    PrintedImage,
    ToySource,
    open_toy,
    read_naively,
)
from torchtitan_mixtures.data import tokenize_parts
from torchtitan_mixtures.data.mixture import build_source
from torchtitan_mixtures.data.segment_encoder import SegmentEncoder
from torchtitan_mixtures.data.shard_manifest import MANIFEST, Manifest
from torchtitan_mixtures.data.sources import Document, IndexedShard, IndexedSource, Segment
from torchtitan_mixtures.data.tokenize_parts import (
    PartMaker,
    PartPlan,
    Tally,
    Tokenizable,
    count_parts,
)
from torchtitan_mixtures.data.tokenize_source import Tokenizing, tokenize
from torchtitan_mixtures.data.tokenized_writing import FinishedPart
from torchtitan_mixtures.multimodal_config import Multimodal


def run(out: Path, recipe: Callable[[], Tokenizable] = open_toy, **options: Any) -> Manifest:
    options = {"parts": 4, **options}
    return tokenize(recipe, Tokenizing(out, **options), lambda line: None)


def test_bad_samples_are_left_out_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        manifest = run(tmp_path, partial(open_toy, 20, 0.1))
    bad = manifest.bad_samples
    assert 3 < bad < manifest.samples / 2
    assert manifest.samples == manifest.documents + bad
    assert set(manifest.bad_keys) <= {message.split(":")[0][19:] for message in caplog.messages}
    assert len(manifest.bad_keys) >= 3
    logged = [message for message in caplog.messages if "Skipped" in message]
    assert len(logged) == bad
    assert any("is empty" in message for message in logged)
    assert len(read_naively(tmp_path)) == manifest.documents


def test_too_many_bad_samples_stop_the_run_and_a_higher_limit_ends_it(tmp_path: Path) -> None:
    recipe = partial(open_toy, 20, 0.1)
    expected = run(tmp_path / "whole", recipe)
    with pytest.raises(ValueError, match=r"are bad; .* = 0.02 allows"):
        run(tmp_path / "out", partial(recipe, limit=0.02), parts=10)
    assert not (tmp_path / "out" / MANIFEST).exists()
    manifest = run(tmp_path / "out", recipe, parts=10)
    assert manifest.bad_samples == expected.bad_samples
    assert manifest.documents == expected.documents


def test_a_source_without_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no documents"):
        run(tmp_path, partial(open_toy, 20, 1.0, 1.0))


def test_a_worker_hands_over_the_message_of_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tally = Tally(multiprocessing.get_context("spawn").Array("q", 4))
    (tmp_path / "shard-000000.safetensors").write_bytes(b"cut off")
    maker = PartMaker(open_toy(), PartPlan(tmp_path, "plan", 3), tally)
    monkeypatch.setattr(tokenize_parts, "_maker", maker)
    message = tokenize_parts.make_in_worker(0)
    assert isinstance(message, str) and "shard-000000.safetensors: is cut off" in message
    assert isinstance(tokenize_parts.make_in_worker(1), FinishedPart)
    tally.stop()
    assert tokenize_parts.make_in_worker(2) is None


def test_what_breaks_a_worker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, images: np.ndarray) -> np.ndarray:
        raise ValueError("too grey") if len(images) > 1 else TypeError("no such thing")

    monkeypatch.setattr(PrintedImage, "encode", broken)
    with pytest.raises(ValueError, match=r"toy .*: TypeError: no such thing"):
        run(tmp_path)


def test_a_bad_image_does_not_take_its_neighbours_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, sizes = PrintedImage.encode, []

    def picky(self: Any, images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        if (images == 200).any():
            raise ValueError("200 is no grey")
        return encode(self, images)

    monkeypatch.setattr(PrintedImage, "encode", picky)
    greys = (100, 200, 30)
    documents = [
        Document((Segment("image", np.full((8, 8, 3), grey, np.uint8)),), str(grey))
        for grey in greys
    ]
    good, bad, last = SegmentEncoder(TOKENIZERS).encode_documents(documents)
    assert isinstance(good, list) and good[0].tolist() == [6] * 4
    assert isinstance(bad, ValueError) and "Document 200: 200 is no grey" in str(bad)
    assert isinstance(last, list) and last[0].tolist() == [1] * 4
    assert sizes == [3, 1, 1, 1]


@pytest.mark.parametrize(
    ("segment", "problem"),
    [
        (Segment("image", np.array([3, 16])), r"span \[3, 16\].* 0 to 15"),
        (Segment("image", np.array([-1])), r"span \[-1, -1\]"),
        (Segment("smell", np.array([1])), "segment of 'smell'"),
    ],
)
def test_codes_that_no_tokenizer_has_are_bad(segment: Segment, problem: str) -> None:
    (error,) = SegmentEncoder(TOKENIZERS).encode_documents([Document((segment,), "key")])
    with pytest.raises(ValueError, match=problem):
        raise error  # type: ignore[misc]


class Lines(IndexedSource):
    """A thousand documents of ten tokens."""

    def shards(self, indices: Any, count: int) -> list[IndexedShard]:
        return [IndexedShard(self, index, count, self._build) for index in indices]

    def _build(self, epoch: int, index: int) -> Document:
        return Document((Segment("text", f"{epoch}-{index:08}"),), str(index))

    def fingerprint(self) -> dict[str, Any]:
        return {}


def test_parts_are_as_many_as_fill_files(tmp_path: Path) -> None:
    opened = Tokenizable(Lines(1000, 0, False), TOKENIZERS, NAMES, {}, 0.0)
    assert count_parts(opened, 2000) == 5
    assert count_parts(opened, 1 << 26) == 1
    assert count_parts(opened, 1) == 1000
    long = Tokenizable(Lines(10**6, 0, False), TOKENIZERS, NAMES, {}, 0.0)
    assert count_parts(long, 1 << 26) == 10  # of about a million each, for processes to share
    blocks = ToySource(64)
    mean = len([d for d in blocks.shards([0], 1)[0]]) / 64
    tokens = 64 * mean * 30  # about
    parts = count_parts(Tokenizable(blocks, TOKENIZERS, NAMES, {}, 0.5), int(tokens / 16))
    assert 8 < parts < 32


def test_several_epochs_are_all_in_the_shards_once(tmp_path: Path) -> None:
    source = Lines(1000, 0, True)
    source.max_epochs = 3
    opened = Tokenizable(source, TOKENIZERS, NAMES, {}, 0.0)
    manifest = run(tmp_path, lambda: opened, parts=0, shard_tokens=10000)
    assert manifest.documents == 3000 and len(manifest.files) == 3
    texts = {bytes(c - 7 for c in segments[0][1]) for segments, _ in read_naively(tmp_path)}
    assert texts == {f"{e}-{i:08}".encode() for e in range(3) for i in range(1000)}


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set of two files with sixty pictures and captions; of four, one is broken."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = []
    for number in range(60):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (number * 4,) * 3).save(buffer, "PNG")
        octets = buffer.getvalue() if number % 15 else b"no picture"
        rows.append({"image": {"bytes": octets, "path": None}, "caption": f"row {number}"})
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "caption": datasets.Value("string")}
    )
    (tmp_path / "data").mkdir()
    for half in range(2):
        part = datasets.Dataset.from_list(rows[half * 30 : half * 30 + 30], features=features)
        part.to_parquet(tmp_path / f"data/train-{half:05d}-of-00002.parquet")
    return str(tmp_path / "data")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_pairs_of_data_sets_become_shards_of_pairs(
    tmp_path: Path, pictures: str, is_streamed: bool
) -> None:
    config = Multimodal(
        source="datasets", path=pictures, streaming=is_streamed, max_bad_fraction=0.1
    )
    source = build_source(config, "train", TOKENIZERS, is_endless=False)
    opened = Tokenizable(source, TOKENIZERS, NAMES, source.fingerprint(), 0.1)
    manifest = run(tmp_path / "out", lambda: opened, parts=0)
    assert len(manifest.files) == (2 if is_streamed else 1)
    assert (manifest.samples, manifest.bad_samples, len(manifest.bad_keys)) == (60, 4, 4)
    expected = [
        (
            [("text", [7 + o for o in f"row {n}".encode()], True), ("image", [n // 4] * 4, True)],
            True,
        )
        for n in range(60)
        if n % 15
    ]
    assert read_naively(tmp_path / "out") == expected
