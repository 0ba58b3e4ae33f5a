"""Sources of files: every kind gives every sample once, resumes exactly, and survives damage."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.unit.data.file_fakes import (
    WRITERS,
    content_of,
    open_source,
    read_once,
    text_of,
)
from torchtitan_mixtures.data import jsonl_source, webdataset_source
from torchtitan_mixtures.data.blocks import BlockSource
from torchtitan_mixtures.data.sources import Document

KINDS = list(WRITERS)
COUNT = 61


def label(document: Document) -> str:
    return " ".join(text_of(document).split()[:2])


def take_epochs(source: BlockSource[Any], count: int) -> list[list[str]]:
    """What all shards together give in their part of the first epochs, by epoch."""
    epochs: list[list[str]] = [[] for _ in range(source.max_epochs)]
    for shard in source.shards(range(count), count):
        documents = iter(shard)
        while (document := next(documents, None)) is not None:
            blocks = shard._index + shard._num_finished * count
            epochs[blocks // source.num_blocks].append(label(document))
    return epochs


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 3, 48])
@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_comes_once_an_epoch(kind: str, num_shards: int, tmp_path: Path) -> None:
    source = open_source(kind, WRITERS[kind](tmp_path, COUNT), max_epochs=2)
    epochs = take_epochs(source, num_shards)
    for epoch in epochs:
        assert Counter(epoch) == Counter(f"row {i}" for i in range(COUNT))
    assert epochs[0] != epochs[1]
    once = open_source(kind, tmp_path, is_endless=False)
    assert Counter(map(label, read_once(once, num_shards))) == Counter(epochs[0])


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_has_the_order_of_the_files_and_repeats(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path, 20)
    passes = [read_once(open_source(kind, tmp_path, is_endless=False)) for _ in range(2)]
    assert [content_of(d) for d in passes[0]] == [content_of(d) for d in passes[1]]
    numbers = [int(label(document).split()[1]) for document in passes[0]]
    steps = {"jsonl": 3, "parquet": 2, "webdataset": 3}
    if kind in steps:
        files = range(steps[kind])
        assert numbers == [i for n in files for i in range(n, 20, steps[kind])]


@pytest.mark.parametrize("kind", KINDS)
def test_reading_resumes_exactly_at_every_point(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path, 23)
    make = lambda: open_source(kind, tmp_path).shards([1], 3)[0]  # noqa: E731
    shard = make()
    documents, states = [], []
    for document in itertools.islice(iter(shard), 40):
        documents.append(content_of(document))
        states.append(json.dumps(shard.state_dict()))
    for place, state in enumerate(states[:-4]):
        resumed = make()
        resumed.load_state_dict(json.loads(state))
        following = [content_of(d) for d in itertools.islice(iter(resumed), 4)]
        assert following == documents[place + 1 : place + 5][:4]


@pytest.mark.parametrize("kind", KINDS)
def test_sources_can_be_sent_to_processes(kind: str, tmp_path: Path) -> None:
    source = open_source(kind, WRITERS[kind](tmp_path, 9), is_endless=False)
    copy = pickle.loads(pickle.dumps(source))
    assert list(map(content_of, read_once(copy))) == list(map(content_of, read_once(source)))


class MeteredFile:
    """Counts what is read of all such files."""

    num_bytes = 0

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> MeteredFile:
        return self

    def __exit__(self, *args: Any) -> None:
        self.stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def read(self, *args: Any) -> bytes:
        content = self.stream.read(*args)
        MeteredFile.num_bytes += len(content)
        return content

    def readline(self, *args: Any) -> bytes:
        content = self.stream.readline(*args)
        MeteredFile.num_bytes += len(content)
        return content


@pytest.mark.parametrize("kind", ["jsonl", "webdataset"])
def test_resuming_reads_little_of_the_data(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRITERS[kind](tmp_path, 600)
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    shard = open_source(kind, tmp_path).shards([0], 1)[0]
    for _ in zip(range(500), shard, strict=False):
        pass
    resumed = open_source(kind, tmp_path).shards([0], 1)[0]
    resumed.load_state_dict(shard.state_dict())
    webdataset_source._index.cache_clear()
    plain_open = Path.open
    monkeypatch.setattr(Path, "open", lambda *args: MeteredFile(plain_open(*args)))
    MeteredFile.num_bytes = 0
    next(iter(resumed))
    # of an archive all headers, which are most of one with members as small as these
    assert 0 < MeteredFile.num_bytes < {"jsonl": total / 50, "webdataset": total / 2}[kind]


# --- damage ---------------------------------------------------------------------------------------


def damage(content: bytes, rng: random.Random) -> bytes:
    """A file cut off, or with some bytes changed, put in or left out."""
    if rng.random() < 0.3:
        return content[: rng.randrange(len(content))]
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 3, 30])):
        place = rng.randrange(len(damaged))
        change = rng.randrange(4)
        if change == 0:
            del damaged[place : place + rng.randint(1, 600)]
            damaged += b"0"
        elif change == 1:
            damaged[place:place] = rng.randbytes(rng.choice([1, 512]))
        else:
            damaged[place] = rng.choice([0, 10, 255, damaged[place] ^ 1 << rng.randrange(8)])
    return bytes(damaged)


def check_damaged(kind: str, folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    for path in sorted(WRITERS[kind](folder, 12).rglob("*.*")):
        if rng.random() < 0.5:
            path.write_bytes(damage(path.read_bytes(), rng))
    webdataset_source._index.cache_clear()
    try:
        source = open_source(kind, folder, is_endless=False, bad=1.0)
    except ValueError as error:
        assert "multimodal.sources[own]" in str(error)
        return
    (shard,) = source.shards([0], 1)
    try:
        good = len(list(shard))
    except ValueError as error:
        assert "samples" in str(error)  # all are bad
        return
    counts = shard.state_dict()["counts"]
    assert good + counts["bad"] == counts["seen"] and good > 0


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_give_counted_bad_samples(kind: str, tmp_path: Path) -> None:
    for seed in range(50):
        folder = tmp_path / str(seed)
        folder.mkdir()
        check_damaged(kind, folder, seed)


@pytest.mark.parametrize("kind", ["jsonl", "webdataset", "parquet"])
def test_a_file_that_changes_ends_the_run(kind: str, tmp_path: Path) -> None:
    source = open_source(kind, WRITERS[kind](tmp_path, 12), bad=1.0)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"bytes and had \d+ at start-up.*start again"):
        next(iter(source.shards([0], 1)[0]))
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"is gone since start-up"):
        next(iter(source.shards([0], 1)[0]))


# --- finding files --------------------------------------------------------------------------------


def texts(path: Path | str, **options: Any) -> list[str]:
    source = open_source("jsonl", path, is_endless=False, **options)
    return [text_of(document) for document in read_once(source)]


def write_texts(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")


def test_files_folders_and_patterns_are_found_in_order(tmp_path: Path) -> None:
    names = ["a/1.jsonl", "a/b/2.ndjson", "a/b/c/3.jsonl", "z.jsonl"]
    write_texts(tmp_path, *names, "other.json", "README.md", ".hidden.jsonl", ".git/x.jsonl")
    assert texts(tmp_path) == names
    assert texts(f"{tmp_path}/**") == names
    assert texts(f"{tmp_path}/a/**/*.jsonl") == ["a/1.jsonl", "a/b/c/3.jsonl"]
    assert texts(f"{tmp_path}/**/b/*") == ["a/b/2.ndjson"]
    assert texts(f"{tmp_path}/[az]*") == names
    assert texts(f"{tmp_path}/*.json") == texts(tmp_path / "other.json") == ["other.json"]


def test_a_path_that_looks_like_a_pattern_is_a_path(tmp_path: Path) -> None:
    write_texts(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert texts(tmp_path / "a[1].jsonl") == ["a[1].jsonl"]


@pytest.mark.timeout(20)
def test_loops_of_links_end(tmp_path: Path) -> None:
    write_texts(tmp_path, "a/1.jsonl", "a/b/2.jsonl")
    for number in range(3):
        os.symlink(tmp_path, tmp_path / "a" / "b" / f"loop{number}")
        os.symlink(tmp_path / "a", tmp_path / "a" / f"loop{number}")
    os.symlink(tmp_path / "self.jsonl", tmp_path / "self.jsonl")
    assert texts(tmp_path) == texts(f"{tmp_path}/**/*.jsonl") == ["a/1.jsonl", "a/b/2.jsonl"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing.jsonl", r"there is no such file or folder"),
        ("*.none", r"it matches none\. Correct it; relative paths start at the current folder"),
        ("x" * 300, r"cannot read .*File name too long"),
        ("texts", r"an empty source, with no files of kind 'jsonl' \(\.jsonl, \.ndjson\)"),
        ("zero", r"an empty source, its 2 files have no bytes"),
        ("packed", r"x\.jsonl\.gz is compressed.*Decompress it.*or read it with kind = 'datasets'"),
        ("packed/x.jsonl.gz", r"is compressed"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl"])
def test_unusable_paths_are_named(kind: str, path: str, message: str, tmp_path: Path) -> None:
    for name in ("texts/a.txt", "zero/a.jsonl", "zero/b.jsonl", "packed/x.jsonl.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" if "zero" not in name else b"")
    with pytest.raises(ValueError, match=r"multimodal\.sources\[own\]\.path = '.*" + message):
        open_source(kind, tmp_path / path)


def test_other_kinds_name_what_is_wrong_too(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    (tmp_path / "a.txt").write_bytes(b"x")
    for kind, path, message in (
        ("webdataset", tmp_path, "is compressed"),
        ("folder", tmp_path / "a.txt", "is a file; kind 'folder' reads a folder"),
        ("folder", tmp_path, "an empty source, with no files of kind 'folder'"),
        ("parquet", tmp_path / "a.txt", "is no Parquet file, or is damaged"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(kind, path)


def test_what_is_compressed_may_lie_beside_what_is_not(tmp_path: Path) -> None:
    write_texts(tmp_path, "a.jsonl")
    (tmp_path / "a.jsonl.gz").write_bytes(b"x")
    assert texts(tmp_path) == ["a.jsonl"]


def test_the_fingerprint_moves_with_the_data_and_changes_with_it(tmp_path: Path) -> None:
    prints = []
    for place in ("here", "there/too"):
        write_texts(tmp_path / place, "a.jsonl", "b/c.jsonl")
        prints.append(open_source("jsonl", tmp_path / place).fingerprint())
    assert prints[0] == prints[1]
    assert json.loads(json.dumps(prints[0])) == prints[0]
    write_texts(tmp_path / "here", "longer.jsonl")
    changed = [
        open_source("jsonl", tmp_path / "here").fingerprint(),
        open_source("jsonl", tmp_path / "there", max_epochs=2).fingerprint(),
        open_source("jsonl", tmp_path / "there", caption_column="say").fingerprint(),
    ]
    for other in changed:
        assert any(other[key] != value for key, value in prints[0].items())
    key = "multimodal.sources[own]"
    assert prints[0][f"{key}.kind"] == "jsonl" and prints[0]["multimodal.seed"] == 0


@pytest.mark.parametrize("kind", ["jsonl", "webdataset", "parquet"])
def test_the_number_of_blocks_follows_from_the_data_alone(kind: str, tmp_path: Path) -> None:
    source = open_source(kind, WRITERS[kind](tmp_path, 60))
    blocks = source.num_blocks
    for count in (1, 48):
        source.shards(range(count), count)
        assert source.num_blocks == blocks > 3


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [9_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_stays_flat(count: int, tmp_path: Path) -> None:
    line = json.dumps({"text": "y" * 200}) + "\n"
    with (tmp_path / "x.jsonl").open("w") as stream:
        for _ in range(count // 1000 + 10):
            stream.write(line * 1000)
    shard = open_source("jsonl", tmp_path).shards([0], 1)[0]
    documents = iter(shard)
    for _ in itertools.islice(documents, 5_000):
        pass
    tracemalloc.start()
    try:
        for _ in itertools.islice(documents, count):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * jsonl_source.BLOCK_BYTES
