"""Sources: sharding, order, exact resumption, and what happens to bad samples."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.unit.data.fakes import ByteTokenizer, GreyTokenizer, RandomSource
from torchtitan_mixtures.data import datasets_source
from torchtitan_mixtures.data.images import decode_image, open_image
from torchtitan_mixtures.data.mixture import SourceTokenizers, build_source
from torchtitan_mixtures.data.samples import choose_caption
from torchtitan_mixtures.data.sources import Document, Shard, Source
from torchtitan_mixtures.data.tokenizers import build_image_tokenizer, build_text_tokenizer
from torchtitan_mixtures.job_config import Multimodal

TOKENIZERS = SourceTokenizers(ByteTokenizer(), GreyTokenizer(), None)


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep what `datasets` caches in the test's folder, and its progress bars off."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def png(brightness: int = 128, size: int = 8, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (brightness,) * 3).save(buffer, "PNG", **options)
    return buffer.getvalue()


def rows(count: int, bad: dict[int, Any] | None = None) -> list[dict[str, Any]]:
    bad = bad or {}
    return [
        {"image": {"bytes": bad.get(i, png(i % 256)), "path": f"{i}.png"}, "caption": f"row {i}"}
        for i in range(count)
    ]


def write_parquet(
    folder: Path, table: list[dict[str, Any]], files: int = 4, split: str = "train"
) -> str:
    folder.mkdir(exist_ok=True)
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "caption": datasets.Value("string")}
    )
    for number in range(files):
        part = datasets.Dataset.from_list(table[number::files], features=features)
        part = part.cast_column("image", datasets.Image())
        part.to_parquet(folder / f"{split}-{number:05d}-of-{files:05d}.parquet")
    return str(folder)


def build(path: str, split: str = "train", is_endless: bool = True, **options: Any) -> Source:
    config = Multimodal(source="datasets", path=path, **options)
    return build_source(config, split, TOKENIZERS, is_endless)


def caption(document: Document) -> str:
    return next(segment.payload for segment in document.segments if segment.modality == "text")


def content(document: Document) -> tuple[Any, ...]:
    """A document as something that compares."""
    return document.key, *(
        s.payload if isinstance(s.payload, str) else (s.payload.shape, s.payload.tobytes())
        for s in document.segments
    )


def only_shard(source: Source, shard: int = 0, num_shards: int = 1) -> Shard:
    (only,) = source.shards([shard], num_shards)
    return only


def take(source: Source, count: int, shard: int = 0, num_shards: int = 1) -> list[Document]:
    return list(itertools.islice(only_shard(source, shard, num_shards), count))


# --- sources with an index ------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 20])
def test_shards_are_disjoint_and_cover_every_epoch(num_shards: int) -> None:
    # 10 documents; as many epochs as make whole rounds of all shards
    keys: list[str] = []
    for shard in range(num_shards):
        taken = take(RandomSource(10, 0, True), 10, shard, num_shards)
        keys += [document.key for document in taken]
    epochs = [[f"{e}:{i}" for i in range(10)] for e in range(num_shards)]
    assert sorted(keys) == sorted(itertools.chain(*epochs))


def test_epochs_are_shuffled_anew_and_seeds_differ() -> None:
    keys = [document.key for document in take(RandomSource(50, 0, True), 150)]
    orders = [[key.split(":")[1] for key in keys[i : i + 50]] for i in (0, 50, 100)]
    other = [d.key.split(":")[1] for d in take(RandomSource(50, 1, True), 50)]
    assert len({tuple(order) for order in (*orders, other)}) == 4


def test_finite_pass_is_ordered_and_repeats() -> None:
    first, second = (take(RandomSource(10, 0, False), 99) for _ in range(2))
    assert [document.key for document in first] == [f"0:{i}" for i in range(10)]
    assert [content(document) for document in first] == [content(document) for document in second]


# --- data sets ------------------------------------------------------------------------------------


def test_state_of_an_indexed_source_continues_exactly(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "data", rows(30, bad={3: b"broken"}))
    check_resumption(lambda: build(path, max_bad_fraction=0.2), 100)


@pytest.mark.parametrize("block", [4, 1024])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_state_of_a_stream_continues_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, num_shards: int
) -> None:
    monkeypatch.setattr(datasets_source, "SHUFFLE_BLOCK", block)
    path = write_parquet(tmp_path / "data", rows(50, bad={3: b"broken"}))
    make = lambda: build(path, streaming=True, max_bad_fraction=0.2)  # noqa: E731
    check_resumption(make, 120, num_shards - 1, num_shards)


def check_resumption(make: Any, count: int, shard: int = 0, num_shards: int = 1) -> None:
    whole = [content(document) for document in take(make(), count + 9, shard, num_shards)]
    saved = only_shard(make(), shard, num_shards)
    documents = iter(saved)
    for cut in range(count):
        if cut % 7 == 0:
            resumed = only_shard(make(), shard, num_shards)
            resumed.load_state_dict(json.loads(json.dumps(saved.state_dict())))
            following = list(itertools.islice(resumed, 9))
            assert [content(document) for document in following] == whole[cut : cut + 9]
        next(documents)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_data_set_is_covered_and_reshuffled(
    tmp_path: Path, streaming: bool, num_shards: int
) -> None:
    path = write_parquet(tmp_path / "data", rows(48))
    epochs: list[list[str]] = [[], []]
    for shard in range(num_shards):
        taken = take(build(path, streaming=streaming), 2 * 48 // num_shards, shard, num_shards)
        half = len(taken) // 2
        epochs[0] += map(caption, taken[:half])
        epochs[1] += map(caption, taken[half:])
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"row {i}" for i in range(48))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_pass_is_finite_ordered_and_repeats(tmp_path: Path, streaming: bool) -> None:
    path = write_parquet(tmp_path / "data", rows(20), files=1, split="validation")
    write_parquet(tmp_path / "data", rows(3), files=1)
    passes = [
        take(build(path, "validation", is_endless=False, streaming=streaming), 99) for _ in range(2)
    ]
    assert [caption(document) for document in passes[0]] == [f"row {i}" for i in range(20)]
    assert [content(d) for d in passes[0]] == [content(d) for d in passes[1]]


def test_modalities_come_in_both_orders(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "data", rows(40))
    firsts = Counter(document.segments[0].modality for document in take(build(path), 40))
    assert 8 < firsts["text"] < 32


def open_saved(folder: Path) -> dict[str, Any]:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows(8))}).save_to_disk(folder)
    return {"path": str(folder)}


def open_saved_alone(folder: Path) -> dict[str, Any]:
    datasets.Dataset.from_list(rows(8)).save_to_disk(folder)
    return {"path": str(folder)}


def open_image_folder(folder: Path) -> dict[str, Any]:
    (folder / "train").mkdir(parents=True)
    lines = []
    for number, row in enumerate(rows(8)):
        (folder / "train" / f"{number}.png").write_bytes(row["image"]["bytes"])
        lines.append(json.dumps({"file_name": f"{number}.png", "caption": row["caption"]}))
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))
    return {"path": str(folder)}


def open_json_with_paths(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    lines = []
    for number, row in enumerate(rows(8)):
        (folder / f"{number}.png").write_bytes(row["image"]["bytes"])
        image = str(folder / f"{number}.png")
        lines.append(json.dumps({"image": image, "caption": [row["caption"], row["caption"]]}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return {"path": str(folder / "train.jsonl")}


def open_format(folder: Path) -> dict[str, Any]:
    write_parquet(folder, rows(8), files=2)
    return {"path": "parquet", "data_files": sorted(map(str, folder.glob("*.parquet")))}


def open_tar(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as archive:
        for number, row in enumerate(rows(8)):
            members = {"png": row["image"]["bytes"], "txt": row["caption"].encode()}
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return {"path": str(folder / "a.tar"), "image_column": "png", "caption_column": "txt"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "write",
    [open_saved, open_saved_alone, open_image_folder, open_json_with_paths, open_format, open_tar],
)
def test_every_kind_of_path_opens(tmp_path: Path, write: Any, streaming: bool) -> None:
    options = write(tmp_path / "data")
    make = lambda: build(streaming=streaming, **options)  # noqa: E731
    documents = take(make(), 8)
    assert sorted(map(caption, documents)) == [f"row {i}" for i in range(8)]
    shapes = {s.payload.shape for d in documents for s in d.segments if s.modality == "image"}
    assert shapes == {(8, 8, 3)}
    check_resumption(make, 15)


# --- bad samples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_images_are_skipped_counted_and_logged(
    tmp_path: Path,
    streaming: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad = {5: b"not an image", 17: png(9, size=64)[:100], 30: b""}
    path = write_parquet(tmp_path / "data", rows(60, bad))
    shard = only_shard(build(path, streaming=streaming, max_bad_fraction=0.1))
    with caplog.at_level(logging.WARNING):
        documents = list(itertools.islice(shard, 57))
    captions = set(map(caption, documents))
    assert captions == {f"row {i}" for i in range(60)} - {"row 5", "row 17", "row 30"}
    assert shard.state_dict()["counts"]["bad"] == 3
    for name in ("5.png", "17.png", "30.png"):
        assert any(name in record.message for record in caplog.records), name


def test_addresses_and_pipes_that_rows_name_are_not_opened(tmp_path: Path) -> None:
    """A row may come from anybody: nothing is fetched, and no pipe waited for."""
    (tmp_path / "good.png").write_bytes(png(3))
    os.mkfifo(tmp_path / "pipe.png")
    names = ["good.png", "https://example.com/x.png", str(tmp_path / "pipe.png")]
    lines = ["image,caption", *(f"{name},row {i}" for i, name in enumerate(names))]
    (tmp_path / "data.csv").write_text("\n".join(lines))
    source = build(str(tmp_path / "data.csv"), is_endless=False, max_bad_fraction=1.0)
    shard = only_shard(source)
    assert [caption(document) for document in shard] == ["row 0"]
    assert shard.state_dict()["counts"]["bad"] == 2


def test_too_many_bad_samples_stop_the_run_at_the_limit(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "data", rows(400, {i: b"x" for i in range(0, 400, 10)}))
    with pytest.raises(
        ValueError,
        match=r"of \d+ samples \(.*%\) of split \"train\" are bad; "
        r"multimodal\.max_bad_fraction = 0\.05 allows \d+ of so many\. Among them: .*png",
    ):
        take(build(path, max_bad_fraction=0.05), 10_000)
    taken = take(build(path, max_bad_fraction=0.2), 800)  # below the limit it goes on
    assert len(taken) == 800


@pytest.mark.parametrize("streaming", [False, True])
def test_small_data_is_judged_at_the_end_of_an_epoch(tmp_path: Path, streaming: bool) -> None:
    path = write_parquet(tmp_path / "data", rows(20, {3: b"x", 4: b"x"}))
    with pytest.raises(ValueError, match=r"2 of 20 samples \(10\.00%\)"):
        take(build(path, streaming=streaming, max_bad_fraction=0.05), 100)
    with pytest.raises(ValueError, match=r"2 of 20 samples"):
        take(build(path, is_endless=False, streaming=streaming, max_bad_fraction=0.05), 100)
    assert len(take(build(path, streaming=streaming, max_bad_fraction=0.1), 60)) == 60


@pytest.mark.parametrize("streaming", [False, True])
def test_all_bad_stops_whatever_the_limit(tmp_path: Path, streaming: bool) -> None:
    path = write_parquet(tmp_path / "data", rows(8, {i: b"x" for i in range(8)}))
    with pytest.raises(ValueError, match=r"8 of 8 samples \(100\.00%\)"):
        take(build(path, streaming=streaming, max_bad_fraction=1.0), 1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_readers", [1, 2])
def test_bad_samples_are_judged_over_all_shards_of_a_process(
    tmp_path: Path, streaming: bool, num_readers: int
) -> None:
    # 12 shards of 4 samples; in those that have a bad one it is a quarter
    path = write_parquet(tmp_path / "data", rows(48, {i: b"x" for i in (3, 4)}), files=1)
    # Who reads a part only allows for accidents: 0.5 of 84 samples at the lowest limit.
    for limit, is_allowed in ((0.1, True), (0.02, num_readers > 1), (0.0002, False)):
        source = build(path, streaming=streaming, max_bad_fraction=limit)
        try:
            for reader in range(num_readers):
                shards = [iter(s) for s in source.shards(range(reader, 12, num_readers), 12)]
                for documents in shards * 7:
                    next(documents)
        except ValueError as error:
            assert not is_allowed, (limit, error)
        else:
            assert is_allowed


@pytest.mark.parametrize("streaming", [False, True])
def test_all_bad_stops_however_many_shards(tmp_path: Path, streaming: bool) -> None:
    path = write_parquet(tmp_path / "data", rows(8, {i: b"x" for i in range(8)}), files=1)
    source = build(path, streaming=streaming, max_bad_fraction=1.0)
    with pytest.raises(ValueError, match=r"8 of 8 samples \(100\.00%\)"):
        next(iter(source.shards(range(4), 4)[2]))


@pytest.mark.parametrize("streaming", [False, True])
def test_counts_of_bad_samples_add_up_in_another_layout(tmp_path: Path, streaming: bool) -> None:
    bad = {i: b"x" for i in range(0, 240, 21)}  # some in every shard
    path = write_parquet(tmp_path / "data", rows(240, bad), files=1)
    states: dict[int, Any] = {}
    for rank in range(4):  # of four processes none has seen enough samples to judge
        source = build(path, streaming=streaming, max_bad_fraction=0.03)
        for number, shard in zip(range(rank, 4, 4), source.shards([rank], 4), strict=True):
            list(itertools.islice(shard, 50))
            states[number] = json.loads(json.dumps(shard.state_dict()))
    assert sum(state["counts"]["seen"] for state in states.values()) >= 200
    source = build(path, streaming=streaming, max_bad_fraction=0.03)
    shards = source.shards(range(4), 4)
    for number, shard in enumerate(shards):
        shard.load_state_dict(states[number])
    with pytest.raises(ValueError, match=r"of 2\d\d samples .* of split \"train\" are bad.*png"):
        for documents in [iter(shard) for shard in shards]:
            list(itertools.islice(documents, 12))


def test_orders_of_two_epochs_are_kept() -> None:
    source = RandomSource(10, 0, True)
    for shard in source.shards(range(3), 3):
        list(itertools.islice(shard, 30))
    assert len(source._orders) == 2


def test_bad_captions_count(tmp_path: Path) -> None:
    table = rows(10)
    table[2]["caption"], table[4]["caption"] = None, "  "
    path = write_parquet(tmp_path / "data", table)
    shard = only_shard(build(path, max_bad_fraction=0.5))
    assert len(set(map(caption, itertools.islice(shard, 8)))) == 8
    assert shard.state_dict()["counts"]["bad"] == 2


@pytest.mark.parametrize("value", [None, "", " ", 3, [], [None, ""], {"a": "b"}])
def test_bad_caption_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="the caption is"):
        choose_caption(value, 0.5)


def test_caption_is_drawn_from_a_list() -> None:
    assert choose_caption("one", 0.99) == "one"
    assert [choose_caption(["a", None, "b"], draw) for draw in (0, 0.49, 0.5, 0.99)] == list("aabb")


def test_decompression_bomb_is_a_bad_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = write_parquet(tmp_path / "data", rows(20, {3: png(1, 12), 4: png(1, 64)}))
    shard = only_shard(build(path, max_bad_fraction=0.5))
    assert len(list(itertools.islice(shard, 18))) == 18
    assert shard.state_dict()["counts"]["bad"] == 2


def test_images_are_put_on_white_cropped_and_resized() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (decode_image(clear, 4) == 255).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    assert (decode_image(palette, 4) == 255).all()
    wide = Image.new("RGB", (24, 8), "red")
    wide.paste((0, 0, 255), (8, 0, 16, 8))
    assert (decode_image(wide, 4) == (0, 0, 255)).all()
    deep = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
    assert (decode_image(deep, 4) == 40_000 >> 8).all()
    assert (decode_image(png(77), 4) == 77).all()
    for value in (None, 3, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match="not an image"):
            decode_image(value, 4)
    unknown = "^not an image in a known format .*; convert it to JPEG, PNG or WebP$"
    for value, message in ((b"", "^the file is empty$"), (b"<svg/>", unknown)):
        with pytest.raises(ValueError, match=message):
            decode_image(value, 4)


def tiff(dtype: str, values: list[float]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.array([values, values[::-1]], dtype)).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize("white", [255, 1023, 4095, 65535])
@pytest.mark.parametrize("is_plain", [False, True])
def test_a_pgm_of_any_depth_keeps_its_greys(white: int, is_plain: bool) -> None:
    values = [0, 1, white // 3, white // 2, white - 1, white]
    header = f"P{2 if is_plain else 5} 6 1 {white}\n".encode()
    plain = " ".join(map(str, values)).encode()
    binary = b"".join(v.to_bytes(2 if white > 255 else 1, "big") for v in values)
    picture = np.asarray(open_image(header + (plain if is_plain else binary)))
    expected = [round(v / white * 65535) // 256 for v in values]
    assert picture.tolist() == [[[value] * 3 for value in expected]]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_a_tiff_of_more_than_8_bits_keeps_its_greys(dtype: str) -> None:
    picture = np.asarray(open_image(tiff(dtype, [0, 255, 256, 32_768, 65_535])))
    expected = [[value] * 3 for value in (0, 0, 1, 128, 255)]
    assert picture.tolist() == [expected, expected[::-1]]


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (tiff("int32", [0, 65_536]), "32 bit integers from 0 to 65536"),
        (tiff("int32", [-1, 255]), "32 bit integers from -1 to 255"),
        (tiff("float32", [0, 1]), "floats from 0 to 1"),
        (tiff("float32", [0, np.nan]), "floats from nan to nan"),
        (b"Pf 2 1 -1.0\n" + np.array([0, 0.5], "<f4").tobytes(), "floats from 0 to 0.5"),
    ],
)
def test_greys_of_an_unknown_range_are_refused(content: bytes, kind: str) -> None:
    with pytest.raises(ValueError, match=f"^its values are {kind}, .*; convert it to 8 or 16 bits"):
        open_image(content)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_columns_are_named(tmp_path: Path, streaming: bool) -> None:
    path = write_parquet(tmp_path / "data", rows(4))
    with pytest.raises(
        ValueError, match=r'multimodal\.image_column = "picture".*its columns are image, caption'
    ):
        build(path, streaming=streaming, image_column="picture")
    with pytest.raises(ValueError, match=r'multimodal\.caption_column = "text"'):
        build(path, streaming=streaming, caption_column="text")


def test_unknown_splits_list_the_known(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "data", rows(4))
    with pytest.raises(ValueError, match=r'"dev" \(multimodal\.train_split\).*\[\'train\'\]'):
        build(path, "dev")
    with pytest.raises(ValueError, match=r'"dev" \(multimodal\.validation_splits\)'):
        build(path, "dev", is_endless=False)
    saved = open_saved(tmp_path / "saved")
    with pytest.raises(ValueError, match=r'train_split: ".*" has no split "dev".*are train'):
        build(saved["path"], "dev")


def test_unusable_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"multimodal\.path is empty"):
        build("")
    (tmp_path / "a.xyz").write_text("")
    with pytest.raises(ValueError, match=r"cannot tell the format of a \.xyz file"):
        build(str(tmp_path / "a.xyz"))
    with pytest.raises(ValueError, match=r'multimodal\.path = ".*nothing": there is no such file'):
        build(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r'multimodal\.path = "no-such-format"'):
        build("no-such-format")


def test_stream_with_too_few_samples_for_a_shard(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "data", rows(2), files=1)
    with pytest.raises(
        ValueError, match=r"shard 2 of 3 .*has no samples; use fewer multimodal\.shards"
    ):
        take(build(path, streaming=True), 1, 2, 3)


def test_emoji_documents_interleave_up_to_the_configured_number_of_pairs():
    config = Multimodal(max_pairs=3, scene_fraction=0.0)
    tokenizers = SourceTokenizers(
        build_text_tokenizer("emoji"), build_image_tokenizer("emoji_32px"), None
    )
    source = build_source(config, "train", tokenizers, is_endless=True)
    documents = take(source, 400)
    pairs = Counter(len(document.segments) // 2 for document in documents)
    assert set(pairs) == {1, 2, 3}
    assert pairs[1] > pairs[2] > 50
    for document in documents:
        names = [segment.modality for segment in document.segments]
        in_pairs = zip(names[::2], names[1::2], strict=True)
        assert all(sorted(pair) == ["image", "text"] for pair in in_pairs)
    orders = Counter(tuple(s.modality for s in d.segments) for d in documents)
    assert len(orders) == 2 + 4 + 8


def test_relative_image_paths_are_found_beside_the_data(tmp_path: Path):
    (tmp_path / "images").mkdir()
    lines = []
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i * 10))
        lines.append(json.dumps({"image": f"images/{i}.png", "caption": f"row {i}"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    config = Multimodal(source="datasets", path=str(tmp_path / "rows.jsonl"))
    source = build_source(config, "train", TOKENIZERS, is_endless=False)
    assert len(list(only_shard(source))) == 4


def test_a_broken_data_file_is_named(tmp_path: Path):
    (tmp_path / "broken.jsonl").write_text('{"image": ')
    config = Multimodal(source="datasets", path=str(tmp_path / "broken.jsonl"))
    with pytest.raises(ValueError, match=r"multimodal\.path = .*broken\.jsonl"):
        build_source(config, "train", TOKENIZERS, is_endless=False)
