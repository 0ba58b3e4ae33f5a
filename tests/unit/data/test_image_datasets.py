"""Images with classes from `datasets`: formats, classes, several labels, and what is refused."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.data.image_jobs import make_job, needs_fork, use_fake_model, write_picture
from torchtitan_mixtures.data import image_datasets
from torchtitan_mixtures.data.image_data import (
    check_splits,
    image_spec,
    list_splits,
    open_images,
    warn_of_thumbnails,
)
from torchtitan_mixtures.data.image_files import BrokenImageError
from torchtitan_mixtures.data.image_loader import (
    build_image_dataloader,
    build_image_validation_dataloader,
)

NAMES = datasets.ClassLabel(names=["ant", "bee", "cat"])
NUMBERS = datasets.Value("int64")
STRINGS = datasets.Value("string")
MULTI_LABEL = {"multi_label": True}


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep what `datasets` caches in the test's folder, and its progress bars off."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    image_datasets._class_dataset.cache_clear()
    yield
    datasets.enable_progress_bars()


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_split(labels: list[Any], feature: Any, first: int = 0) -> datasets.Dataset:
    numbers = range(len(labels))
    columns = {
        "image": [{"bytes": png(picture(first + i)), "path": f"{i}.png"} for i in numbers],
        "label": labels,
        "more": list(numbers),
    }
    features = {"image": datasets.Image(), "label": feature, "more": NUMBERS}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def save(path: Path, feature: Any, **labels: list[Any]) -> Path:
    """Write splits with these labels as `save_to_disk` does."""
    splits = {
        split: make_split(of, feature, 100 * n) for n, (split, of) in enumerate(labels.items())
    }
    datasets.DatasetDict(splits).save_to_disk(str(path))
    return path


def dataset_job(path: Path | str, classification=None, **values: Any) -> Any:
    defaults = {"source": "datasets", "path": str(path), "image_size": 8}
    defaults["validation_splits"] = ["val"]
    return make_job(classification=classification, **{**defaults, **values})


def open_split(job: Any, split: str = "train") -> Any:
    return open_images(job, "multimodal.train_split", split)


def labels_of(job: Any, split: str = "train") -> list[Any]:
    images = open_split(job, split)
    return [images.read(i).label for i in range(len(images))]


# --- classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("feature", "train", "val", "names"),
    [
        (NAMES, [2, 0, 0], [1, 2], ("ant", "bee", "cat")),
        (NUMBERS, [1, 3, 1], [0, 2], ("0", "1", "2", "3")),
        (datasets.Value("uint8"), [1, 0], [1], ("0", "1")),
        (STRINGS, ["owl", "ant", "owl"], ["ant"], ("ant", "owl")),
        (datasets.Value("large_string"), ["b", "a"], ["a"], ("a", "b")),
    ],
)
def test_classes_are_those_of_the_training_split(tmp_path, feature, train, val, names):
    job = dataset_job(save(tmp_path / "data", feature, train=train, val=val))
    check_splits(job)
    spec = image_spec(job)
    assert (spec.channels, spec.size, spec.num_classes) == (3, 8, len(names))
    assert spec.class_names == names
    for split, labels in (("train", train), ("val", val)):
        numbers = [names.index(x) if isinstance(x, str) else x for x in labels]
        assert labels_of(job, split) == numbers
    assert list_splits(job) == ["train", "val"]


def test_pixels_are_those_of_the_files_in_rgb(tmp_path):
    job = dataset_job(save(tmp_path / "data", NAMES, train=[0, 1]))
    images = open_split(job)
    assert images.shape == (3, 8, 8) and not images.has_std and len(images) == 2
    for index in range(2):
        item = images.read(index)
        expected = np.asarray(picture(index), np.float32).transpose(2, 0, 1) / 127.5 - 1
        np.testing.assert_allclose(item.image.numpy(), expected, atol=1e-6)
        assert torch.equal(images.read(index, True).image, item.image.flip(-1))


@pytest.mark.parametrize("kind", ["imagefolder", "parquet", "one parquet file", "arrow"])
def test_local_formats_are_read(tmp_path, kind):
    data, options = tmp_path / "data", {}
    labels = [0, 1, 1, 0]
    if kind == "imagefolder":
        for split in ("train", "val"):
            for number in range(4):
                name = "bee" if number in (1, 2) else "ant"
                write_picture(data / split / name / f"{number}.png", number)
        labels = [0, 0, 1, 1]  # in the order of paths
        options = {"validation_splits": ["validation"]}
    elif kind == "arrow":
        make_split(labels, NAMES).save_to_disk(str(data))
        options = {"validation_splits": ["train"]}
    else:
        data.mkdir()
        make_split(labels, NAMES).to_parquet(data / "train-00000-of-00001.parquet")
        if kind == "parquet":
            make_split(labels, NAMES).to_parquet(data / "val-00000-of-00001.parquet")
            options = {"validation_splits": ["validation"]}
        else:
            data = data / "train-00000-of-00001.parquet"
            options = {"train_split": "train[:100%]", "validation_splits": ["train[50%:]"]}
    job = dataset_job(data, **options)
    check_splits(job)
    assert image_spec(job).class_names[:2] == ("ant", "bee")
    assert labels_of(job, options.get("train_split", "train")) == labels
    if kind == "one parquet file":
        assert labels_of(job, "train[50%:]") == labels[2:]


def test_columns_of_bytes_and_of_paths_beside_the_data_are_read(tmp_path):
    (tmp_path / "data").mkdir()
    contents = [png(picture(i)) for i in range(2)]
    (tmp_path / "data" / "0.png").write_bytes(contents[0])
    for name, column in {"raw": contents, "paths": ["0.png", "1.png"]}.items():
        rows = datasets.Dataset.from_dict({"pixels": column, "kind": ["a", "b"]})
        rows.to_parquet(tmp_path / "data" / f"{name}.parquet")
        path = tmp_path / "data" / f"{name}.parquet"
        job = dataset_job(path, image_column="pixels", label_column="kind")
        images = open_split(job)
        expected = np.asarray(picture(0), np.float32).transpose(2, 0, 1) / 127.5 - 1
        np.testing.assert_allclose(images.read(0).image.numpy(), expected, atol=1e-6)
    with pytest.raises(BrokenImageError):
        images.read(1)
    assert images.key(1).endswith("paths.parquet:train[1] (1.png)")


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGBA", "I;16", "one pixel"])
def test_pictures_of_other_kinds_become_rgb(tmp_path, mode):
    image = Image.new("RGB", (1, 1), "red") if mode == "one pixel" else Image.new(mode, (12, 9))
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    rows = {"image": [{"bytes": buffer.getvalue(), "path": None}], "label": [0]}
    features = datasets.Features({"image": datasets.Image(), "label": NUMBERS})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "data"))
    item = open_split(dataset_job(tmp_path / "data")).read(0)
    assert item.image.shape == (3, 8, 8) and item.image.abs().max() == 1


def test_opening_decodes_no_image(tmp_path, monkeypatch):
    path = save(tmp_path / "data", STRINGS, train=["a", "b"], val=["a"])

    def refuse(*_: Any) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(datasets.Image, "decode_example", refuse)
    job = dataset_job(path)
    check_splits(job)
    for split in ("train", "val"):
        assert len(open_split(job, split))
    with pytest.raises(BrokenImageError, match="was decoded"):
        open_split(job).read(0)


def test_a_data_set_is_opened_once(tmp_path, monkeypatch):
    path = save(tmp_path / "data", NAMES, train=[0, 1], val=[2])
    opened: list[str] = []
    original = image_datasets.open_split
    monkeypatch.setattr(
        image_datasets,
        "open_split",
        lambda config, split, key: opened.append(split) or original(config, split, key),
    )
    for _ in range(3):
        job = dataset_job(path)
        check_splits(job)
        open_split(job)
    assert opened == ["train", "val"]


# --- several labels -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("feature", "labels", "expected"),
    [
        (datasets.List(NAMES), [[2, 0], [], [1]], [(0, 2), (), (1,)]),
        (datasets.List(NUMBERS), [[1, 1, 0], [3]], [(0, 1), (3,)]),
        (datasets.LargeList(STRINGS), [["b", "a"], ["c"]], [(0, 1), (2,)]),
        (datasets.List(NAMES, length=2), [[2, 0], [1, 2]], [(0, 2), (1, 2)]),
    ],
)
def test_lists_are_several_classes(tmp_path, feature, labels, expected):
    job = dataset_job(save(tmp_path / "data", feature, train=labels), MULTI_LABEL)
    assert labels_of(job) == expected
    assert open_split(job).max_labels == max(map(len, labels))


def test_batches_of_several_classes_are_padded(tmp_path, monkeypatch):
    use_fake_model(monkeypatch, is_classifier=True)
    labels = [[2, 0, 1], [], [1]]
    path = save(tmp_path / "data", datasets.List(NAMES), train=labels, val=[[1], [0]])
    job = dataset_job(path, MULTI_LABEL)
    inputs, targets = next(iter(build_image_dataloader(1, 0, None, job)))
    assert inputs["class_labels"].dtype == torch.int64 and targets.tolist() == [[0]] * 3
    assert sorted(inputs["class_labels"].tolist()) == [[-1, -1, -1], [0, 1, 2], [1, -1, -1]]
    # One class at most is still a list: not the same as one class exactly.
    ((inputs, targets),) = build_image_validation_dataloader(1, 0, job, "val")
    assert sorted(inputs["class_labels"].tolist()) == [[-1, -1], [0, -1], [1, -1]]
    assert sorted(targets.flatten().tolist()) == [-100, 0, 0]


def test_several_classes_need_the_loss_for_them(tmp_path):
    path = save(tmp_path / "data", datasets.List(NAMES), train=[[0]])
    message = r'multi_label = false: multimodal.label_column = "label" holds lists'
    with pytest.raises(ValueError, match=message):
        image_spec(dataset_job(path))
    # One class each may be scored by that loss too.
    single = dataset_job(save(tmp_path / "single", NAMES, train=[0, 1]), MULTI_LABEL)
    assert labels_of(single) == [0, 1]


# --- loaders --------------------------------------------------------------------------------------


def by_number(batches: list[Any]) -> dict[int, tuple[bytes, int]]:
    return {
        int(number): (inputs["input"][row].numpy().tobytes(), int(inputs["class_labels"][row]))
        for inputs, _ in batches
        for row, number in enumerate(inputs["sample_index"])
    }


@needs_fork
@pytest.mark.parametrize("is_classifier", [True, False])
def test_ranks_workers_and_a_resumed_run_have_the_same_samples(
    tmp_path, monkeypatch, is_classifier
):
    use_fake_model(monkeypatch, is_classifier)
    path = save(tmp_path / "data", NAMES, train=[0, 1, 2] * 4, val=[0])
    loader = build_image_dataloader(1, 0, None, dataset_job(path, random_flip=True))
    whole = list(itertools.islice(loader, 4))
    state = loader.state_dict()
    whole += list(itertools.islice(loader, 6))
    expected = by_number(whole)
    assert len(expected) == 30
    assert {label for _, label in expected.values()} == {0, 1, 2}
    resumed = dataset_job(path, random_flip=True, num_workers=2)
    found = {}
    for rank in range(2):
        loader = build_image_dataloader(2, rank, None, resumed)
        loader.load_state_dict(state)
        found |= by_number(list(itertools.islice(loader, 3)))
    assert found == {number: expected[number] for number in range(12, 30)}


def test_images_can_be_sent_to_another_process(tmp_path):
    images = open_split(dataset_job(save(tmp_path / "data", STRINGS, train=["a", "b"])))
    copy = pickle.loads(pickle.dumps(images))
    assert torch.equal(copy.read(1).image, images.read(1).image) and copy.read(1).label == 1


@pytest.mark.parametrize("key", ["label_column", "image_column"])
def test_a_state_of_another_column_is_refused(tmp_path, monkeypatch, key):
    use_fake_model(monkeypatch, is_classifier=True)
    renamed = {"image": "image2", "label": "label2", "more": "more2"}
    others = make_split([0, 1], NAMES).rename_columns(renamed)
    both = datasets.concatenate_datasets([make_split([0, 1], NAMES), others], axis=1)
    both.save_to_disk(str(tmp_path / "data"))
    state = build_image_dataloader(1, 0, None, dataset_job(tmp_path / "data")).state_dict()
    changed = dataset_job(tmp_path / "data", **{key: key.removesuffix("_column") + "2"})
    with pytest.raises(ValueError, match=rf"multimodal.{key} is '\w+2', but"):
        build_image_dataloader(1, 0, None, changed).load_state_dict(state)


def test_broken_images_are_replaced_counted_and_named(tmp_path, monkeypatch, caplog):
    use_fake_model(monkeypatch, is_classifier=True)
    values = [png(picture(0)), b"\x89PNG nothing more", None, png(picture(3))]
    rows = {"image": values, "label": [0, 1, 0, 1]}
    features = datasets.Features({"image": datasets.Value("binary"), "label": NUMBERS})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "data"))
    job = dataset_job(tmp_path / "data", max_bad_fraction=0.6)
    labels = [label for _, label in by_number(_take(job, 4)).values()]
    assert sorted(set(labels)) == [0, 1]
    for row, reason in ((1, "UnidentifiedImageError"), (2, "NoneType")):
        assert f"data:train[{row}]: " in caplog.text and reason in caplog.text
    job = dataset_job(tmp_path / "data", max_bad_fraction=0.3)
    with pytest.raises(ValueError, match=r"2 of 4 samples .*max_bad_fraction = 0.3"):
        _take(job, 4)


def _take(job: Any, count: int) -> list[Any]:
    return list(itertools.islice(build_image_dataloader(1, 0, None, job), count))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("feature", "train", "val", "message"),
    [
        (NUMBERS, [0, None, 1, None], [0], r'train_split: column "label" .*null .* 2 rows.* row 1'),
        (NUMBERS, [0, -1], [0], r"train_split: .* has the label -1, but classes are 0 to 10485"),
        (NUMBERS, [0, 2**20], [0], r"train_split: .* has the label 1048576, but"),
        (NUMBERS, [0, 1], [2], r"validation_splits: .*\"val\".* label 2, but classes are 0 to 1"),
        (NAMES, [0, 1], [-1], r"validation_splits: .* label -1, but classes are 0 to 2.*secret"),
        (NAMES, [None], [0], r"train_split: .* null for a label in 1 rows"),
        (STRINGS, ["a"], ["a", "owl"], r'validation_splits: .* class "owl", which the training'),
        (STRINGS, ["a", None], ["a"], r"train_split: .* null for a label"),
        (STRINGS, ["a"], [None], r"validation_splits: .* null for a label"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, feature, train, val, message):
    job = dataset_job(save(tmp_path / "data", feature, train=train, val=val))
    with pytest.raises(ValueError, match=message):
        check_splits(job)


@pytest.mark.parametrize(
    ("feature", "labels", "message"),
    [
        (datasets.List(NUMBERS), [[0], None], r"null for a label in 1 rows.*row 1.*empty list"),
        (datasets.List(NUMBERS), [[0, None]], r"lists with null in them"),
        (datasets.List(NUMBERS), [[0, -2]], r"label -2, but classes"),
        (datasets.List(NUMBERS), [[], []], r"has no classes at all"),
        (datasets.Value("float32"), [0.5], r'label_column = "label": holds float32; it must hold'),
        (datasets.Value("bool"), [True], r'label_column = "label": holds bool; it must hold'),
        (datasets.List(datasets.List(NUMBERS)), [[[0]]], r'label_column = "label": holds List'),
    ],
)
def test_columns_of_labels_that_hold_others_are_refused(tmp_path, feature, labels, message):
    with pytest.raises(ValueError, match=message):
        image_spec(dataset_job(save(tmp_path / "data", feature, train=labels), MULTI_LABEL))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"label_column": "kind"}, r'label_column = "kind": .* its columns are image, label, more'),
        ({"image_column": "jpg"}, r'image_column = "jpg": .* its columns are image, label, more'),
        ({"image_column": "more"}, r'image_column = "more": holds int64; it must hold images'),
        ({"streaming": True}, r"streaming = true: .*set it to false"),
        ({"train_split": "test"}, r'train_split: .* no split "test"; its splits are train, val'),
        ({"validation_splits": ["test"]}, r'validation_splits: .* no split "test"'),
        ({"path": "./no/such"}, r'multimodal.path = "./no/such": there is no such'),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(tmp_path, values, message):
    path = save(tmp_path / "data", NAMES, train=[0, 1], val=[2])
    with pytest.raises(ValueError, match=message):
        check_splits(dataset_job(**{"path": path, **values}))


def test_splits_of_other_classes_are_refused(tmp_path):
    splits = {
        "train": make_split([0], NAMES),
        "val": make_split([0], datasets.ClassLabel(names=["bee", "ant", "cat"])),
    }
    for split, data in splits.items():
        data.save_to_disk(str(tmp_path / "data" / split))
    (tmp_path / "data" / "dataset_dict.json").write_text('{"splits": ["train", "val"]}')
    with pytest.raises(ValueError, match=r"validation_splits: .*other classes than in training"):
        check_splits(dataset_job(tmp_path / "data"))


def test_an_empty_split_is_refused(tmp_path):
    for split, row in {"train": "0.png,owl\n", "validation": ""}.items():
        file = tmp_path / "data" / f"{split}-00000-of-00001.csv"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"image,label\n{row}")
    job = dataset_job(tmp_path / "data", validation_splits=["validation"])
    with pytest.raises(ValueError, match=r'"validation" \(multimodal.validation_splits\).*no data'):
        check_splits(job)


def test_pictures_that_are_shrunk_to_the_size_of_latents_are_warned_of(tmp_path, caplog):
    warn_of_thumbnails(dataset_job(tmp_path))
    assert "holds pictures: the model sees 8 x 8" in caplog.text
