"""Image data: what a model sees of emoji, folders and latents, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.data.image_jobs import make_job, save_tiny_vae, write_folder, write_picture
from torchtitan_mixtures.data.emoji import EmojiCorpus
from torchtitan_mixtures.data.image_data import (
    check_splits,
    image_spec,
    open_images,
    warn_of_thumbnails,
)
from torchtitan_mixtures.data.image_files import BrokenImageError, crop_centre, read_picture
from torchtitan_mixtures.data.image_sets import ClassFolders, FolderImages, ImageSet


def folder_job(path: Path, **multimodal):
    values = {"source": "folder", "path": str(path), "image_size": 8, "validation_splits": ["val"]}
    return make_job(**{**values, **multimodal})


def open_split(job, split: str) -> ImageSet:
    return open_images(job, "multimodal.train_split", split)


def names_of(images: ImageSet) -> list[str]:
    return [Path(images.key(index)).name for index in range(len(images))]


# --- emoji ----------------------------------------------------------------------------------------


def test_emoji_groups_are_the_classes_of_every_split():
    job = make_job(image_size=16)
    spec = image_spec(job)
    corpus = EmojiCorpus.load()
    assert (spec.channels, spec.size, spec.num_classes) == (3, 16, 8)
    assert spec.class_names == corpus.groups
    for split in ("train", "unseen_concept", "unseen_style"):
        drawings, images = corpus.drawings(split), open_split(job, split)
        assert len(images) == len(drawings)
        for index in (0, len(drawings) // 2, len(drawings) - 1):
            item = images.read(index)
            assert item.std is None and item.image.dtype == torch.float32
            assert spec.class_names[item.label] == drawings[index].concept.group
            pixels = corpus.image(drawings[index], 16).astype(np.float32) / 127.5 - 1
            np.testing.assert_allclose(item.image.numpy(), pixels.transpose(2, 0, 1), atol=1e-6)


def test_emoji_concepts_are_classes_that_an_unseen_style_shares():
    job = make_job(class_of="concept", validation_splits=["unseen_style"])
    spec = image_spec(job)
    assert spec.num_classes == len(set(spec.class_names)) == 1479
    images = open_split(job, "unseen_style")
    drawings = EmojiCorpus.load().drawings("unseen_style")
    for index in range(len(images)):
        assert spec.class_names[images.read(index).label] == drawings[index].concept.name
    check_splits(job)


def test_concepts_that_were_not_trained_are_refused_as_classes():
    job = make_job(class_of="concept", validation_splits=["unseen_style", "unseen_concept"])
    with pytest.raises(ValueError, match=r"validation_splits.*no classes of training.*\"group\""):
        check_splits(job)
    job.validation.enable = False
    check_splits(job)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 24}, r"multimodal.image_size = 24: .* set it to 16, 32, 64"),
        ({"random_flip": True}, r"multimodal.random_flip = true"),
        ({"source": "datasets"}, r"multimodal.path is empty: .*must be a hub name"),
        ({"source": "folder"}, r'multimodal.path = "": .* one folder of images per class'),
        ({"source": "folder", "path": "no/such"}, r"multimodal.path = \"no/such\": .* no such"),
        ({"train_split": "unseen_voice"}, r"multimodal.train_split: .*unseen_voice.*are train"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(values, message):
    with pytest.raises(ValueError, match=message):
        check_splits(make_job(**values))


def test_emoji_with_a_vae_are_read_at_the_size_of_pictures(tmp_path):
    vae = str(save_tiny_vae(tmp_path))
    job = make_job(vae=vae, image_size=16)
    assert (image_spec(job).channels, image_spec(job).size) == (4, 16)
    assert open_split(job, "unseen_style").shape == (3, 32, 32)
    with pytest.raises(ValueError, match=r"image_size = 64: .* set it to 8, 16, 32 with a VAE"):
        image_spec(make_job(vae=vae, image_size=64))


# --- folders --------------------------------------------------------------------------------------


def test_folders_are_classes_in_the_order_of_their_names(tmp_path):
    job = folder_job(write_folder(tmp_path, count=40, classes=("dog", "cat", "ant")))
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    assert image_spec(job).class_names == ("ant", "cat", "dog")
    seen = []
    for split in ("train", "val"):
        images = open_split(job, split)
        for index in range(len(images)):
            path = Path(images.key(index))
            item = images.read(index)
            assert path.relative_to(tmp_path).parts[0] == ("ant", "cat", "dog")[item.label]
            expected = read_picture(str(path), 8).astype(np.float32) / 127.5 - 1
            np.testing.assert_allclose(item.image.numpy(), expected.transpose(2, 0, 1), atol=1e-6)
            assert torch.equal(images.read(index, True).image, item.image.flip(-1))
            seen.append(path)
    assert len(seen) == len(set(seen)) == 120


def test_one_image_in_twenty_is_held_out_whatever_lies_beside_it(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(500):
            (tmp_path / name / f"{number}.jpg").touch()
    held_out = names_of(FolderImages(ClassFolders(str(tmp_path)), "val", 8))
    assert 30 <= len(held_out) <= 70
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(tmp_path / "a", moved / "a")
    (moved / "a" / "new.jpg").touch()
    left = [n for n in names_of(FolderImages(ClassFolders(str(moved)), "val", 8)) if n != "new.jpg"]
    assert left and left == held_out[: len(left)]


def test_a_divided_folder_is_split_as_it_says(tmp_path):
    write_folder(tmp_path / "train", count=3)
    write_folder(tmp_path / "test", count=2, classes=("dog",))
    job = folder_job(tmp_path, validation_splits=["test"])
    check_splits(job)
    assert len(open_split(job, "train")) == 6
    test = open_split(job, "test")
    assert [test.read(i).label for i in range(2)] == [1, 1]
    with pytest.raises(ValueError, match=r'validation_splits: .*no split "val".*are test, train'):
        check_splits(folder_job(tmp_path))
    write_folder(tmp_path / "test", count=1, classes=("owl",))
    with pytest.raises(ValueError, match=r'class "owl", which the training split does not have'):
        check_splits(job)


def test_the_default_splits_are_refused_with_those_of_the_folder(tmp_path):
    job = make_job(source="folder", path=str(write_folder(tmp_path)))
    with pytest.raises(ValueError, match=r'no split "unseen_concept"; its splits are train, val'):
        check_splits(job)


def test_a_folder_without_classes_or_with_an_empty_one_is_refused(tmp_path):
    write_picture(tmp_path / "0.png", 0)
    with pytest.raises(ValueError, match=r"has no folders in it"):
        image_spec(folder_job(tmp_path))
    write_folder(tmp_path)
    (tmp_path / "owl").mkdir()
    with pytest.raises(ValueError, match=r"owl has no images .*remove the folder"):
        open_split(folder_job(tmp_path), "train")


def test_too_few_images_to_hold_any_out_are_refused(tmp_path):
    write_picture(tmp_path / "a" / "0.png", 0)
    with pytest.raises(ValueError, match=r'split "val" is empty. Divide them'):
        open_split(folder_job(tmp_path), "val")


# --- cropping -------------------------------------------------------------------------------------


def test_a_crop_halves_by_means_and_then_resizes_once():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (70, 90, 3), np.uint8)
    narrow, middle = np.zeros((70, 45, 3), int), np.zeros((35, 45, 3), int)
    for column in range(45):  # first along rows, each time rounded half up
        narrow[:, column] = (pixels[:, 2 * column].astype(int) + pixels[:, 2 * column + 1] + 1) // 2
    for row in range(35):
        middle[row] = (narrow[2 * row] + narrow[2 * row + 1] + 1) // 2
    halved = Image.fromarray(middle.astype(np.uint8))
    resized = np.asarray(halved.resize((26, 20), Image.Resampling.BICUBIC))  # 45 * 20 / 35 = 25.7
    assert np.array_equal(np.asarray(crop_centre(Image.fromarray(pixels), 20)), resized[:, 3:23])


def test_a_crop_of_its_own_size_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    assert np.array_equal(np.asarray(crop_centre(Image.fromarray(pixels), 9)), pixels)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (7, 5), (100, 33)])
def test_a_crop_of_any_picture_has_the_size_asked_for(size):
    assert crop_centre(Image.new("RGB", size, "red"), 64).size == (64, 64)


def test_pictures_of_other_kinds_become_rgb_on_white(tmp_path):
    grey, clear = tmp_path / "grey.png", tmp_path / "clear.webp"
    Image.new("L", (8, 8), 100).save(grey)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(clear, lossless=True)
    assert (read_picture(str(grey), 4) == 100).all()
    assert (read_picture(str(clear), 4) == 255).all()


def test_a_broken_file_says_what_is_wrong_with_it(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"\x89PNG nothing more")
    with pytest.raises(BrokenImageError, match="UnidentifiedImageError"):
        read_picture(str(path), 4)


def test_pictures_that_are_shrunk_to_the_size_of_latents_are_warned_of(tmp_path, caplog):
    warn_of_thumbnails(make_job(source="emoji"))
    assert caplog.text == ""
    warn_of_thumbnails(folder_job(write_folder(tmp_path)))
    assert "holds pictures: the model sees" in caplog.text
