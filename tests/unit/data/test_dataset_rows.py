"""`kind = "datasets"`: rows are documents, pairs of any kind or texts, and name only own files."""

from __future__ import annotations

import gzip
import itertools
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
from datasets import Audio, Dataset, Features, Image, List, Value

from tests.unit.data.file_fakes import RATE, SIZE, content_of, make_tar, open_source, picture, sound
from torchtitan_mixtures.data import datasets_source, sample_reader
from torchtitan_mixtures.data.datasets_source import build_datasets_source
from torchtitan_mixtures.data.media import MediaReader
from torchtitan_mixtures.data.sample_reader import DatasetFinder, undecoded
from torchtitan_mixtures.data.sources import Document, Source
from torchtitan_mixtures.data.tokenize_parts import files_state
from torchtitan_mixtures.multimodal_config import Multimodal
from torchtitan_mixtures.source_entries import SourceEntry


def build(path: Path, streaming: bool = False, bad: float = 0.01, **entry: Any) -> Source:
    split = entry.pop("split", "train")
    config = Multimodal(
        source="datasets", path=str(path), streaming=streaming, max_bad_fraction=bad
    )
    own = SourceEntry("mine", "datasets", str(path), **entry)
    return build_datasets_source(config, split, MediaReader(SIZE, RATE), False, own)


def read(source: Source) -> list[Document]:
    (shard,) = source.shards([0], 1)
    return list(shard)


def shape_of(document: Document) -> list[tuple[str, Any, bool]]:
    return [
        (s.modality, s.payload if isinstance(s.payload, str) else s.payload.shape, s.has_loss)
        for s in document.segments
    ]


SEGMENT = {"text": Value("string"), "image": Image(), "audio": Audio(), "loss": Value("bool")}


@pytest.mark.parametrize("streaming", [False, True])
def test_segments_with_images_and_sounds_that_are_not_decoded(
    tmp_path: Path, streaming: bool
) -> None:
    rows = [
        [
            {"text": "What is this? ", "loss": False},
            {"image": {"bytes": picture(9), "path": None}},
            {"audio": {"bytes": sound(320), "path": "meow.wav"}},
        ],
        [{"text": "Nothing."}],
    ]
    empty = dict.fromkeys(SEGMENT)
    data = Dataset.from_dict(
        {"parts": [[empty | segment for segment in row] for row in rows]},
        features=Features({"parts": List(SEGMENT)}),
    )
    data.to_parquet(tmp_path / "a.parquet")
    source = build(tmp_path / "a.parquet", streaming, segments_column="parts")
    assert [shape_of(document) for document in read(source)] == [
        [
            ("text", "What is this? ", False),
            ("image", (SIZE, SIZE, 3), True),
            ("speech", (320,), True),
        ],
        [("text", "Nothing.", True)],
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_alone_in_a_column_of_any_name(tmp_path: Path, streaming: bool) -> None:
    rows = [{"content": f"file {n}", "license": "mit"} for n in range(5)]
    Dataset.from_list(rows).to_json(tmp_path / "a.jsonl")
    documents = read(build(tmp_path / "a.jsonl", streaming, text_column="content"))
    assert [shape_of(document) for document in documents] == [
        [("text", f"file {n}", True)] for n in range(5)
    ]
    assert not documents[0].is_pair


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_are_packed(tmp_path: Path, streaming: bool) -> None:
    lines = b"".join(b'{"text": "line %d"}\n' % n for n in range(3))
    (tmp_path / "a.v1.jsonl.gz").write_bytes(gzip.compress(lines))
    documents = read(build(tmp_path / "a.v1.jsonl.gz", streaming))
    assert [shape_of(document)[0][1] for document in documents] == ["line 0", "line 1", "line 2"]


@pytest.mark.parametrize("streaming", [False, True])
def test_pairs_with_sounds(tmp_path: Path, streaming: bool) -> None:
    files = [{"bytes": sound(160 * n), "path": f"{n}.wav"} for n in range(1, 4)]
    data = Dataset.from_dict({"said": ["one", "two", "three"], "audio": files})
    data.cast_column("audio", Audio(sampling_rate=16000)).to_parquet(tmp_path / "a.parquet")
    documents = read(build(tmp_path / "a.parquet", streaming, caption_column="said"))
    assert [
        sorted(shape_of(document), key=lambda segment: segment[0]) for document in documents
    ] == [
        [("speech", (160 * n,), True), ("text", word, True)]
        for n, word in enumerate(("one", "two", "three"), 1)
    ]
    assert all(document.is_pair for document in documents)


def test_rows_are_what_they_are_in_parquet(tmp_path: Path) -> None:
    """The same file read by both kinds gives the same documents, but for the order of pairs."""
    rows = [
        {"segments": None, "caption": "a", "image": {"bytes": picture(1), "path": None}},
        {"segments": [{"text": "b ", "image": None}, {"text": None, "image": picture(2)}]},
        {"text": "c"},
    ]
    keys = {key for row in rows for key in row}
    Dataset.from_list([dict.fromkeys(keys) | row for row in rows]).to_parquet(
        tmp_path / "a.parquet"
    )
    (shard,) = open_source("parquet", tmp_path, is_endless=False).shards([0], 1)
    ours = [sorted(content_of(document)[1:]) for document in shard]
    theirs = [sorted(content_of(d)[1:]) for d in read(build(tmp_path / "a.parquet"))]
    assert theirs == ours and len(ours) == 3


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"image": picture(1), "text": "x"}, {}, r'sources\[mine\]\.caption_column = "caption": '),
        ({"text": "x"}, {"text_column": "body"}, r'\.text_column = "body": .* columns are text\.'),
        ({"body": "x"}, {}, r"has none of the columns segments, image, audio, text; its columns "),
    ],
)
def test_columns_that_are_missing_are_named_before_anything_is_read(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "a.parquet", **options)


# --- what rows name -------------------------------------------------------------------------------


def test_paths_must_lie_in_the_folders_of_the_data(tmp_path: Path) -> None:
    for place in ("data/images", "elsewhere", "media"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.png").write_bytes(picture(5))
    named = [
        "images/a.png",
        f"{tmp_path}/data/images/a.png",
        "../elsewhere/a.png",
        f"{tmp_path}/elsewhere/a.png",
    ]
    rows = [{"image": name, "caption": "a"} for name in named]
    Dataset.from_list(rows).to_csv(tmp_path / "data" / "a.csv")
    source = build(tmp_path / "data" / "a.csv", bad=0.5)
    (shard,) = source.shards([0], 1)
    assert len(list(shard)) == 2 and shard.progress()["bad"] == 2

    rows = [{"image": name, "caption": "a"} for name in ("a.png", f"{tmp_path}/data/images/a.png")]
    Dataset.from_list(rows).to_csv(tmp_path / "data" / "a.csv")
    moved = build(tmp_path / "data" / "a.csv", media_folder=str(tmp_path / "media"))
    assert len(read(moved)) == 2
    with pytest.raises(ValueError, match=r"4 of 4 .* outside of .*set media_folder of a source"):
        rows = [{"image": named[3], "caption": "a"}] * 4
        Dataset.from_list(rows).to_csv(tmp_path / "data" / "a.csv")
        read(build(tmp_path / "data" / "a.csv"))


def test_members_of_archives_that_are_streamed(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("metadata.csv", "file_name,caption\na.png,one\nb.png,two\n")
        for number, name in enumerate("ab"):
            archive.writestr(f"{name}.png", picture(100 * number))
    for streaming in (False, True):
        documents = read(build(tmp_path, streaming))
        found = {
            segment.payload if isinstance(segment.payload, str) else int(segment.payload[0, 0, 0])
            for document in documents
            for segment in document.segments
        }
        assert found == {"one", "two", 0, 100}


def test_addresses_are_read_of_remote_data_only(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/a.png", b"12345")
    local, remote = DatasetFinder(Path("/data"), None), DatasetFinder(None, None)
    assert remote("memory://a.png") == b"12345"
    for address in ("memory://a.png", "HTTP://host/a.png", "s3://a/b", "zip://a::https://b/c.zip"):
        with pytest.raises(ValueError, match="is an address and not a path; download it first"):
            local(address)
    for address in ("file:///etc/passwd", "local:///etc/passwd"):
        with pytest.raises(ValueError, match="is an address and not a path"):
            remote(address)
    inside = (
        "file:///data/a.png::b.csv",
        "local:///a.png::b.csv",
        "http://host/x::/data/t.csv",
        "simplecache::/data/a.png",
        "zip://x::file:///etc/b.zip::/data/a",
        "zip://a.png",
    )
    for address in inside:
        for find in (local, remote):
            with pytest.raises(ValueError, match="is an address and not a path"):
                find(address)
    for path in ("/etc/passwd", "etc/passwd", "zip://a::/etc/b.zip"):
        with pytest.raises(ValueError, match="is outside of the data"):
            remote(path)
    with pytest.raises(ValueError, match=r"cannot read memory://b\.png \(FileNotFoundError"):
        remote("memory://b.png")
    monkeypatch.setattr(sample_reader, "MAX_MEDIA_BYTES", 4)
    with pytest.raises(ValueError, match=r"memory://a\.png has more than 4 bytes"):
        remote("memory://a.png")


def test_what_datasets_has_downloaded_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", Path("/scratch/unpacked"))
    home = datasets.config.HF_CACHE_HOME
    for cached in (f"{home}/datasets/downloads/extracted/x/a.png", "/scratch/unpacked/x/a.png"):
        for folder in (None, Path("/data")):
            assert DatasetFinder(folder, None)(cached) == Path(cached)


def test_types_of_columns_are_undecoded_however_deep() -> None:
    nested = {"a": [{"b": Image()}], "c": datasets.LargeList({"d": Audio()}), "e": Value("int8")}
    raw = undecoded(nested)
    assert raw["a"][0]["b"] == Image(decode=False) and raw["e"] == Value("int8")
    assert raw["c"] == datasets.LargeList({"d": Audio(decode=False)})


@pytest.mark.parametrize("streaming", [False, True])
def test_resumption_at_any_row(tmp_path: Path, streaming: bool) -> None:
    Dataset.from_list([{"text": f"row {n}"} for n in range(23)]).to_parquet(tmp_path / "a.parquet")

    def shards() -> Any:
        return build(tmp_path / "a.parquet", streaming).shards([0, 1], 2)

    for number in range(2):
        whole = [document.key for document in shards()[number]]
        for taken in range(len(whole)):
            first, second = shards()[number], shards()[number]
            assert len(list(itertools.islice(first, taken))) == taken
            second.load_state_dict(first.state_dict())
            assert [document.key for document in second] == whole[taken:]


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_that_is_not_utf8_is_counted_and_named(
    tmp_path: Path, streaming: bool, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [b'{"text": "line %d"}' % number for number in range(300)]
    lines[150] = b'{"text": "line \xff"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    documents = read(build(tmp_path / "a.jsonl", streaming))
    assert len(documents) == 299
    assert re.search(r"a\.jsonl:train\[\S*150\]: 'utf-8' codec can't decode byte 0xff", caplog.text)


def test_a_stream_that_breaks_names_its_source(tmp_path: Path) -> None:
    lines = [b'{"text": "line %d"}' % number for number in range(300)]
    lines[150] = b'{"text": "line'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    message = r"sources\[mine\]\.path = .*a\.jsonl.*cannot be read .*kinds jsonl, "
    with pytest.raises(ValueError, match=message):
        read(build(tmp_path / "a.jsonl", True))
    packed = gzip.compress(b"\n".join(b'{"text": "%d"}' % number for number in range(9999)))
    (tmp_path / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"sources\[mine\]\.path = .*b\.jsonl\.gz"):
        read(build(tmp_path / "b.jsonl.gz", True))
    with pytest.raises(ValueError, match=r"^Cannot open split .*b\.jsonl\.gz"):
        read(build(tmp_path / "b.jsonl.gz"))


def test_what_is_damaged_in_a_saved_folder_is_one_message(tmp_path: Path) -> None:
    for name in ("cut", "gone", "state", "empty"):
        Dataset.from_list([{"text": f"{n}"} for n in range(999)]).save_to_disk(tmp_path / name)
    (arrow,) = (tmp_path / "cut").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:900])
    next((tmp_path / "gone").glob("*.arrow")).unlink()
    (tmp_path / "state" / "state.json").write_text("{")
    Dataset.from_list([]).save_to_disk(tmp_path / "empty")
    for name in ("cut", "gone", "state", "empty"):
        message = rf'^multimodal\.sources\[mine\]\.path = ".*{name}".*(damaged|no samples|none of)'
        with pytest.raises(ValueError, match=message):
            build(tmp_path / name)


def test_a_saved_format_and_slices_of_saved_data(tmp_path: Path) -> None:
    data = Dataset.from_list([{"id": n, "caption": f"{n}", "image": picture(n)} for n in range(20)])
    data.with_format("numpy").save_to_disk(tmp_path / "numpy")
    data.with_format(None, columns=["id"]).save_to_disk(tmp_path / "hidden")
    for name in ("numpy", "hidden"):
        assert len(read(build(tmp_path / name))) == 20
    for split, expected in (("train[:50%]", 10), ("train[15:]", 5), ("train[:2]+train[-3:]", 5)):
        assert len(read(build(tmp_path / "numpy", split=split))) == expected
    for split in ("test", "train[:x]", "test[:5]"):
        with pytest.raises(ValueError, match=r"has no split .* its splits are train, and a slice"):
            build(tmp_path / "numpy", split=split)


def test_a_column_can_be_left_out(tmp_path: Path) -> None:
    Dataset.from_list([{"text": "x", "image": picture(1)}]).to_parquet(tmp_path / "a.parquet")
    (document,) = read(build(tmp_path / "a.parquet", image_column=""))
    assert shape_of(document) == [("text", "x", True)]


def test_blocks_of_a_stream_have_a_limit_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets_source, "SHUFFLE_BYTES", 5000)
    rows = [{"text": f"{n} " + "x" * 998} for n in range(30)]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (shard,) = build(tmp_path / "a.parquet", True).shards([0], 1)
    assert [int(shape_of(document)[0][1].split()[0]) for document in shard] == list(range(30))
    (first,) = build(tmp_path / "a.parquet", True).shards([0], 1)
    assert len(list(itertools.islice(first, 13))) == 13
    state = first.state_dict()
    assert state["block"] >= 2 and state["num_taken"] <= 5
    (second,) = build(tmp_path / "a.parquet", True).shards([0], 1)
    second.load_state_dict(state)
    assert len(list(second)) == 17


def test_a_tar_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [("1.png", picture(1)), ("1.txt", b"one")]
    (tmp_path / "a.tar").write_bytes(make_tar(members))
    build(tmp_path / "a.tar", True, image_column="png", caption_column="txt")
    assert "a tar that is cut off for a shorter one" in caplog.text
    assert "kind = 'webdataset'" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_files_that_were_written_since_are_told_by_their_time(
    tmp_path: Path, streaming: bool
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "house"}')
    before = files_state(build(tmp_path / "a.jsonl", streaming))
    assert before == files_state(build(tmp_path / "a.jsonl", streaming)) is not None
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert files_state(build(tmp_path / "a.jsonl", streaming)) != before


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_goes_to_processes_that_are_not_forked(tmp_path: Path, streaming: bool) -> None:
    Dataset.from_list([{"text": f"row {n}"} for n in range(3)]).to_parquet(tmp_path / "a.parquet")
    source = build(tmp_path / "a.parquet", streaming)
    again = pickle.loads(pickle.dumps(source))
    assert [document.key for document in read(again)] == [d.key for d in read(source)]
