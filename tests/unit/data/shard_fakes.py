"""Documents, tokenizers and a source for tests of shards, and a reader of shards without tricks."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.unit.data.fakes import ByteTokenizer, GreyTokenizer
from torchtitan_mixtures.data.blocks import BlockSource
from torchtitan_mixtures.data.mixture import SourceTokenizers
from torchtitan_mixtures.data.shard_manifest import MANIFEST, Manifest, ShardModality
from torchtitan_mixtures.data.sources import Document, PairOrder, Segment
from torchtitan_mixtures.data.tokenize_parts import Tokenizable
from torchtitan_mixtures.data.tokenized_writing import PartNotes, inspect_part, open_writer


class PrintedText(ByteTokenizer):
    def fingerprint(self) -> str:
        return "text" * 16


class PrintedImage(GreyTokenizer):
    def fingerprint(self) -> str:
        return "grey" * 16


class LoudSpeech:
    """One unit for every ten samples: how loud they are."""

    num_codes, sample_rate, units_per_second = 8, 100, 10.0

    def encode(self, waveform: np.ndarray) -> np.ndarray:
        return (np.abs(waveform).reshape(-1, 10).mean(1) * 7).astype(np.int64)

    def decode(self, units: np.ndarray) -> np.ndarray:
        # The interface has it, for samples to be heard; whoever makes or reads shards never does.
        raise NotImplementedError

    def fingerprint(self) -> str:
        return "loud" * 16


TOKENIZERS = SourceTokenizers(PrintedText(), PrintedImage(), LoudSpeech())
NAMES = {"text": "bytes", "image": "grey", "speech": "loud"}
PRINTS = TOKENIZERS.fingerprints()

Plain = tuple[list[tuple[str, list[int], bool]], bool]
"""A document as modality, codes and loss of its segments, and whether it is a pair."""


def naive_codes(segment: Segment) -> list[int]:
    payload = segment.payload
    if isinstance(payload, str):
        return [7 + byte for byte in payload.encode()]
    if payload.ndim == 3:
        return GreyTokenizer().encode(payload[None])[0].tolist()
    if payload.dtype == np.float32:
        return LoudSpeech().encode(payload).tolist()
    return payload.tolist()


def plain(document: Document) -> Plain:
    """A document as shards should have it."""
    segments = [(s.modality, naive_codes(s), s.has_loss) for s in document.segments]
    if document.is_pair:
        segments.sort(key=lambda segment: segment[0] != "text")
    return segments, document.is_pair


def read_naively(folder: Path) -> list[Plain]:
    """All documents of shards, by the library, with loops."""
    documents: list[Plain] = []
    manifest = Manifest.read(folder)
    for file in manifest.files:
        entries = {name: items.tolist() for name, items in load_file(folder / file.file).items()}
        segment = start = 0
        for end, is_pair in zip(entries["document_ends"], entries["is_pair"], strict=True):
            segments = []
            while segment < end:
                stop = entries["segment_ends"][segment]
                name = manifest.modalities[entries["segment_modality"][segment]].name
                has_loss = bool(entries["segment_loss"][segment])
                segments.append((name, entries["codes"][start:stop], has_loss))
                segment, start = segment + 1, stop
            documents.append((segments, bool(is_pair)))
    return documents


def random_segment(rng: random.Random, kind: int) -> Segment:
    has_loss = rng.random() < 0.8
    if kind == 0:
        return Segment("text", "x" * rng.randint(0, 40), has_loss)
    if kind == 1:
        pixels = np.full((8, 8, 3), rng.randrange(256), np.uint8)
        return Segment("image", pixels, has_loss)
    if kind == 2:
        wave = np.full(10 * rng.randint(1, 5), rng.random(), np.float32)
        return Segment("speech", wave, has_loss)
    return Segment("image", np.array([rng.randrange(16) for _ in range(4)]), has_loss)


class ToySource(BlockSource[int]):
    """Blocks of 0 to 12 random documents; some are pairs, some are bad.

    Args:
        num_blocks: How many.
        bad: Share of samples that are bad, half when they are built and half when encoded.
        options: Of `BlockSource`.
    """

    def __init__(self, num_blocks: int = 20, bad: float = 0.0, **options: Any) -> None:
        defaults: dict[str, Any] = {"seed": 3, "is_endless": False, "name": "toy"}
        defaults["max_bad_fraction"] = 0.5
        super().__init__(num_blocks, **{**defaults, **options})
        self._bad = bad

    def read_block(self, block: int) -> Sequence[int]:
        return range(random.Random(block).randint(0, 12))

    def sample_key(self, block: int, number: int, sample: int) -> str:
        return f"toy {block}/{number}"

    def build(self, sample: int, key: str, rng: random.Random) -> Document:
        rng = random.Random(key)
        if rng.random() < self._bad:
            if rng.random() < 0.5:
                raise ValueError("it is bad")
            return Document((Segment("text", ""),), key)
        if rng.random() < 0.3:
            others = [random_segment(rng, kind) for kind in rng.choice([(1,), (2,), (1, 2)])]
            segments = PairOrder(0.5).arrange(rng, Segment("text", key), *others)
            return Document(segments, key, is_pair=True)
        count = rng.randint(1, 4)
        segments = tuple(random_segment(rng, rng.randrange(4)) for _ in range(count))
        return Document((Segment("text", key), *segments), key)

    def fingerprint(self) -> dict[str, Any]:
        return {"blocks": self.num_blocks, "multimodal.seed": self.seed}


def open_toy(num_blocks: int = 20, bad: float = 0.0, limit: float = 0.5) -> Tokenizable:
    source = ToySource(num_blocks, bad, max_bad_fraction=limit)
    return Tokenizable(source, TOKENIZERS, NAMES, source.fingerprint(), limit)


def content(folder: Path) -> dict[str, bytes]:
    """What is in a folder of shards."""
    assert (folder / MANIFEST).is_file()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


KINDS = ("text", "image")
"""Modalities of `write_shards`."""


def write_shards(folder: Path, documents: list[Plain], dtype: str = "<u2") -> Manifest:
    """Shards of one file, without a source."""
    notes = PartNotes("plan", 0, len(documents), 0, [])
    with open_writer(folder / "shard-000000.safetensors", np.dtype(dtype), KINDS) as writer:
        for segments, is_pair in documents:
            codes = [np.array(codes, np.int64) for _, codes, _ in segments]
            writer.add(codes, [s[0] for s in segments], [s[2] for s in segments], is_pair)
        part = writer.finish(notes)
    counts = part.counts
    modalities = tuple(
        ShardModality(
            name,
            name,
            name,
            70000,
            counts.documents[name],
            counts.segments[name],
            counts.codes[name],
        )
        for name in KINDS
    )
    manifest = Manifest(len(documents), modalities, (part.file,), {}, len(documents), 0, ())
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()))
    assert inspect_part(folder / part.file.file, "plan", 0) == part
    return manifest
