"""What is particular to JSON Lines, to Parquet, and to folders of images."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.unit.data.file_fakes import (
    SIZE,
    make_tar,
    open_source,
    picture,
    read_once,
    sound,
    text_of,
    write_images,
)
from torchtitan_mixtures.data import jsonl_source, parquet_source
from torchtitan_mixtures.data.source_files import DataFile
from torchtitan_mixtures.data.sources import Document


def read_counting(kind: str, path: Path, **options: Any) -> tuple[list[Document], int, list[str]]:
    """All documents, how many samples are bad, and their keys."""
    (shard,) = open_source(kind, path, is_endless=False, bad=1.0, **options).shards([0], 1)
    documents = list(shard)
    counts = shard.state_dict()["counts"]
    return documents, counts["bad"], counts["bad_keys"]


# --- JSON Lines -----------------------------------------------------------------------------------


def test_ranges_of_any_size_give_every_line_once(tmp_path: Path) -> None:
    rng = random.Random(0)
    for number in range(60):
        path = tmp_path / f"{number}.jsonl"
        parts = [rng.choice([b"", b" ", b"a", b"bc", b"d" * rng.randint(1, 40)]) for _ in range(9)]
        content = b"\n".join(parts) + rng.choice([b"", b"\n"])
        path.write_bytes(content)
        expected, position = [], 0
        for line in content.split(b"\n"):
            if line.strip():
                expected.append((position, line))
            position += len(line) + 1
        file = DataFile(path, path.name, len(content))
        for size in (1, 2, 3, 7, 64):
            found = []
            for start in range(0, len(content), size):
                found += jsonl_source.read_lines(file, start, min(start + size, len(content)))
            assert [(line.start, line.content.rstrip(b"\n")) for line in found] == expected


def test_marks_and_ends_of_lines_of_other_systems_are_understood(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"row {i}"}).encode() for i in range(3)]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([lines[0], b"", b"  ", *lines[1:]]))
    documents = read_once(open_source("jsonl", path, is_endless=False))
    assert [text_of(document) for document in documents] == ["row 0", "row 1", "row 2"]
    assert documents[0].key == f"{path}, byte 3"


def test_bad_lines_are_counted_with_file_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    good = b'{"text": "good"}\n'
    bad = [b"\xff\n", b"{\n", b"[" * 5000 + b"\n", b"3\n", b'{"text": "\\ud800"}\n']
    path.write_bytes(good + b"".join(bad))
    documents, num_bad, keys = read_counting("jsonl", path)
    assert len(documents) == 1 and num_bad == len(bad)
    starts = [len(good) + sum(map(len, bad[:i])) for i in range(len(bad))]
    assert keys == [f"{path}, byte {start}" for start in starts]


def test_lines_that_are_too_long_are_bad_and_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl_source, "MAX_LINE_BYTES", 1 << 16)
    monkeypatch.setattr(jsonl_source, "BLOCK_BYTES", 1 << 12)
    path = tmp_path / "x.jsonl"
    good = json.dumps({"text": "good " + "x" * 60_000}) + "\n"
    long = json.dumps({"text": "x" * 5_000_000}) + "\n"
    path.write_text(good + long + good)
    tracemalloc.start()
    try:
        documents, num_bad, keys = read_counting("jsonl", path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(documents) == 2 and num_bad == 1 and keys == [f"{path}, byte {len(good)}"]
    assert peak < 1_000_000


def test_blank_lines_alone_are_an_empty_source(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("\n \r\n" * 5000)
    with pytest.raises(ValueError, match=r"own.*an empty source, its 1 files have blank lines"):
        open_source("jsonl", tmp_path)
    (tmp_path / "y.jsonl").write_text('{"text": "one"}')
    assert len(read_once(open_source("jsonl", tmp_path, is_endless=False))) == 1


def test_shards_of_processes_of_their_own_wait_for_their_first_sample(tmp_path: Path) -> None:
    # 3 lines that begin in 3 of about 1000 blocks: most shards see none of them in an epoch
    lines = [json.dumps({"text": f"row {i} " + "x" * 100_000}) for i in range(3)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    for index in range(0, 48, 6):
        (shard,) = open_source("jsonl", tmp_path).shards([index], 48)
        documents = [document for _, document in zip(range(4), shard, strict=False)]
        assert len(documents) == 4


def test_paths_are_relative_to_the_file_or_to_the_media_folder(tmp_path: Path) -> None:
    for folder, brightness in (("rows", 10), ("media", 20)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(picture(brightness))
    path = tmp_path / "rows" / "x.jsonl"
    path.write_text(json.dumps({"segments": [{"image": "a.png"}]}))
    for options, brightness in (({}, 10), ({"media_folder": str(tmp_path / "media")}, 20)):
        (document,) = read_once(open_source("jsonl", path, is_endless=False, **options))
        assert (document.segments[0].payload == brightness).all()


# --- Parquet --------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_segments_may_be_structs_or_json(tmp_path: Path) -> None:
    segments = [{"text": "a", "loss": False}, {"image": {"bytes": picture()}}, {"audio": "s.wav"}]
    (tmp_path / "s.wav").write_bytes(sound(80))
    write_rows(tmp_path / "0.parquet", [{"segments": segments}])  # absent keys become null
    (tmp_path / "i.png").write_bytes(picture())
    spelled = [{"text": "a", "loss": False}, {"image": "i.png"}, {"audio": "s.wav"}]
    write_rows(tmp_path / "1.parquet", [{"segments": json.dumps(spelled)}])
    documents = read_once(open_source("parquet", tmp_path, is_endless=False))
    for document in documents:
        assert [s.modality for s in document.segments] == ["text", "image", "speech"]
        assert [s.has_loss for s in document.segments] == [False, True, True]
        assert document.segments[1].payload.shape == (SIZE, SIZE, 3)
        assert document.segments[2].payload.shape == (80,)
    assert [document.key for document in documents] == [
        f"{tmp_path / name}[0]" for name in ("0.parquet", "1.parquet")
    ]


@pytest.mark.parametrize("spelling", ["struct", "binary", "path"])
def test_images_may_be_structs_bytes_or_paths(spelling: str, tmp_path: Path) -> None:
    (tmp_path / "i.png").write_bytes(picture(30))
    image = {
        "struct": {"bytes": picture(30), "path": "elsewhere.png"},
        "binary": picture(30),
        "path": "i.png",
    }[spelling]
    path = write_rows(tmp_path / "x.parquet", [{"pic": image, "say": ["one"]}])
    options = {"image_column": "pic", "caption_column": "say"}
    (document,) = read_once(open_source("parquet", path, is_endless=False, **options))
    assert document.is_pair and text_of(document) == "one"
    (image,) = [s.payload for s in document.segments if s.modality == "image"]
    assert (image == 30).all()


@pytest.mark.parametrize("cached_bytes", [0, 1 << 26])
def test_large_groups_of_rows_are_cut_and_all_rows_found(
    cached_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_source, "CACHED_BYTES", cached_bytes)
    monkeypatch.setattr(parquet_source, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(parquet_source, "_BATCH_ROWS", 5)
    rng = random.Random(0)
    rows = [{"text": f"row {i} {rng.random()}" * 5} for i in range(200)]
    path = write_rows(tmp_path / "x.parquet", rows, row_group_size=90)
    source = open_source("parquet", path, is_endless=False)
    assert source.num_blocks > 6
    documents = read_once(source)
    assert [text_of(document) for document in documents] == [row["text"] for row in rows]
    assert [document.key for document in documents] == [f"{path}[{i}]" for i in range(200)]


def test_groups_that_unpack_to_much_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal strings are stored once: what a file says of its size is no limit of memory."""
    monkeypatch.setattr(parquet_source, "CACHED_BYTES", 1 << 20)
    monkeypatch.setattr(parquet_source, "_BATCH_ROWS", 64)
    rows = [{"text": "x" * 20_000}] * 1000  # 20 MB
    path = write_rows(tmp_path / "x.parquet", rows, row_group_size=1000)
    assert path.stat().st_size < 1 << 16
    source = open_source("parquet", path, is_endless=False)
    parquet_source._read_group.cache_clear()
    before = pa.total_allocated_bytes()
    documents = iter(source.shards([0], 1)[0])
    assert text_of(next(documents)) == "x" * 20_000
    assert pa.total_allocated_bytes() - before < 4 << 20
    assert 1 + sum(1 for _ in documents) == 1000


def test_only_the_columns_that_are_needed_are_read(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.parquet", [{"text": "a", "other": "b" * 1000, "caption": "c"}])
    source = open_source("parquet", path, is_endless=False)
    (row,) = source.read_block(0)
    assert set(row.content) == {"text", "caption"}


def test_a_string_that_is_no_utf_8_spoils_its_row_alone(tmp_path: Path) -> None:
    strings = pa.array([b"one", b"\xff", b"three"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": strings}), tmp_path / "x.parquet")
    documents, num_bad, keys = read_counting("parquet", tmp_path)
    assert [text_of(document) for document in documents] == ["one", "three"]
    assert num_bad == 1 and keys == [f"{tmp_path / 'x.parquet'}[1]"]


def test_unusable_tables_are_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.parquet", [{"content": "a", "url": "b"}])
    with pytest.raises(ValueError, match=r"has none of the columns .*its columns are content, url"):
        open_source("parquet", tmp_path)
    table = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"own.*an empty source, its 1 files have no rows"):
        open_source("parquet", tmp_path)
    content = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(content[:-20])
    with pytest.raises(ValueError, match=r"own.*x\.parquet is no Parquet file, or is damaged"):
        open_source("parquet", tmp_path)


# --- folders of images ----------------------------------------------------------------------------


def test_captions_beside_images_are_found(tmp_path: Path) -> None:
    write_images(tmp_path, 6)
    (tmp_path / "a" / "list.png").write_bytes(picture())
    (tmp_path / "a" / "list.json").write_text(json.dumps({"caption": ["of a list"]}))
    (tmp_path / "a" / "dotted.name.png").write_bytes(picture())
    (tmp_path / "a" / "dotted.name.txt").write_text("dotted\n")
    documents = read_once(open_source("folder", tmp_path, is_endless=False))
    expected = {*(f"row {i}" for i in range(6)), "of a list", "dotted"}
    assert {text_of(document) for document in documents} == expected
    assert all(document.is_pair for document in documents)


def test_images_without_a_usable_caption_are_bad(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    for name, caption in (
        ("none", None),
        ("empty.txt", b" \n"),
        ("bytes.txt", b"\xff"),
        ("json.json", b"{}"),
        ("list.json", b"[]"),
        ("broken.json", b"{"),
    ):
        (tmp_path / name).with_suffix(".png").write_bytes(picture())
        if caption is not None:
            (tmp_path / name).write_bytes(caption)
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "zero.txt").write_text("x")
    documents, num_bad, keys = read_counting("folder", tmp_path)
    assert len(documents) == 3 and num_bad == 7
    assert all(key.endswith(".png") for key in keys)


def test_metadata_says_which_images_are_read(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    rows = [
        {"file_name": "0.png", "text": "zero"},
        {"file_name": "../b/1.png", "caption": ["one"], "text": "not this"},
        {"file_name": "2.png"},
        {"caption": "no file"},
    ]
    (tmp_path / "a" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    documents, num_bad, _ = read_counting("folder", tmp_path)
    assert [text_of(document) for document in documents] == ["zero"]
    assert num_bad == 3  # one of them outside of the folder of its metadata
    assert open_source("folder", tmp_path, is_endless=True).shards([0], 1)


@pytest.mark.parametrize("suffix", [".jfif", ".JP2", ".pgm", ".ppm", ".avif"])
def test_every_suffix_that_is_read_is_a_picture(suffix: str, tmp_path: Path) -> None:
    Image.new("L", (SIZE, SIZE), 200).save(tmp_path / f"a{suffix}")
    (tmp_path / "a.txt").write_text("grey")
    (document,) = read_once(open_source("folder", tmp_path, is_endless=False))
    (image,) = (s.payload for s in document.segments if not isinstance(s.payload, str))
    assert np.abs(np.asarray(image, np.int64) - 200).max() < 8


def test_files_with_captions_that_are_not_read_are_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, 4)
    open_source("folder", tmp_path)
    assert caplog.text == ""
    names = (
        *("a/x.heic", "a/x.txt", "b/y.HEIC", "b/y.caption", "c/z.svg", "c/z.json"),
        *("a/alone.heic", "a/0.npz", "c/list", "c/list.txt", ".hidden/h.heic", ".hidden/h.txt"),
        *("c/.i.heic", "c/.i.txt"),
    )
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    os.symlink(tmp_path, tmp_path / "c" / "loop")
    open_source("folder", tmp_path)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(
        "multimodal.sources[own]: 3 files with captions beside them are not read (2 .heic, 1 .svg)"
    )
    assert "only .avif .bmp .gif .jfif " in message


@pytest.mark.timeout(20)
def test_loops_of_links_do_not_repeat_images(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    os.symlink(tmp_path / "missing.png", tmp_path / "a" / "dangling.png")
    assert len(read_once(open_source("folder", tmp_path, is_endless=False))) == 4


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../secret.png"])
def test_paths_that_lead_out_of_the_folder_are_not_opened(path: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(picture())
    (folder / "in.png").write_bytes(picture())
    good = {"caption": "seen", "image": "in.png"}
    lines = [json.dumps(row) for row in (good, {"caption": "hidden", "image": path})]
    (folder / "x.jsonl").write_text("\n".join(lines))
    documents, num_bad, _ = read_counting("jsonl", folder)
    assert [text_of(document) for document in documents] == ["seen"]
    assert num_bad == 1
    if path != "/etc/passwd":  # and with leave, it is
        rows = [{"caption": "hidden", "image": str(tmp_path / "secret.png")}]
        (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = open_source("jsonl", folder, is_endless=False, media_folder=str(tmp_path))
        assert [text_of(document) for document in read_once(source)] == ["hidden"]


@pytest.mark.parametrize(("suffix", "is_bad"), [("heic", True), ("pkl", True), ("cls", False)])
def test_captions_of_unknown_media_are_no_texts(suffix: str, is_bad: bool, tmp_path: Path) -> None:
    members = [("0.txt", b"a caption"), (f"0.{suffix}", b"5"), ("1.txt", b"a text")]
    (tmp_path / "x.tar").write_bytes(make_tar(members))
    documents, num_bad, _ = read_counting("webdataset", tmp_path)
    assert [text_of(d) for d in documents] == (["a text"] if is_bad else ["a caption", "a text"])
    assert num_bad == is_bad
