"""Augmentation of training images, against Pillow where it has the same operation."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from tests.unit.data.image_jobs import make_job, use_fake_model, write_folder
from torchtitan_mixtures.classifier_config import Classification
from torchtitan_mixtures.data.augment import (
    AUGMENTATION_KEYS,
    Augmentation,
    random_erasing,
)
from torchtitan_mixtures.data.image_files import crop_picture
from torchtitan_mixtures.data.image_loader import (
    build_image_dataloader,
    build_image_validation_dataloader,
)
from torchtitan_mixtures.data.rand_augment import OPERATIONS, rand_augment

WIDTH, HEIGHT = 24, 20
EVERYTHING = {
    "random_crop": 0.3,
    "rand_augment_ops": 2,
    "rand_augment_share": 0.5,
    "random_erasing": 0.25,
}


def picture(kind: str = "noise") -> Image.Image:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3))
    if kind == "smooth":
        rows, columns = np.mgrid[:HEIGHT, :WIDTH]
        waves = [np.sin(rows / 5 + c) * np.cos(columns / (4 + c)) for c in range(3)]
        pixels = np.stack(waves, -1) * 60 + 120
    elif kind == "dull":
        pixels = pixels // 4 + 70
        pixels[..., 1] = 90
    return Image.fromarray(pixels.astype(np.uint8))


def levels_of(image: Image.Image) -> Tensor:
    return torch.tensor(np.asarray(image)).permute(2, 0, 1).float()


def assert_like(found: Tensor, expected: Image.Image, tolerance: int = 1) -> None:
    assert found.dtype == torch.float32
    assert torch.equal(found, found.round())
    torch.testing.assert_close(found, levels_of(expected), rtol=0, atol=tolerance)


# --- RandAugment ----------------------------------------------------------------------------------


def test_the_operations_are_the_fourteen_of_the_paper():
    assert list(OPERATIONS) == [
        *("identity", "autocontrast", "equalize", "rotate", "solarize", "color", "posterize"),
        *("contrast", "brightness", "sharpness", "shear-x", "shear-y", "translate-x"),
        "translate-y",
    ]


@pytest.mark.parametrize("kind", ["noise", "smooth", "dull"])
def test_histogram_operations_are_those_of_pillow(kind):
    image = picture(kind)
    levels = levels_of(image)
    assert torch.equal(OPERATIONS["identity"](levels, 1.0), levels)
    assert_like(OPERATIONS["autocontrast"](levels, 1.0), ImageOps.autocontrast(image))
    large = image.resize((80, 70))  # more than 255 pixels are needed to change anything
    for part in (image, large):
        assert_like(OPERATIONS["equalize"](levels_of(part), 1.0), ImageOps.equalize(part), 0)
    assert not torch.equal(OPERATIONS["equalize"](levels_of(large), 1.0), levels_of(large))


@pytest.mark.parametrize("magnitude", [0, 1, 2.5, 5, 9, 10])
@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_operations_on_single_levels_are_those_of_pillow(kind, magnitude):
    image, share = picture(kind), magnitude / 10
    for sign in (-1, 1):
        solarized = OPERATIONS["solarize"](levels_of(image), sign * share)
        # Above its threshold Pillow inverts; a threshold between levels is the next level.
        assert_like(solarized, ImageOps.solarize(image, math.ceil(256 * (1 - share))), 0)
        posterized = OPERATIONS["posterize"](levels_of(image), sign * share)
        assert_like(posterized, ImageOps.posterize(image, 8 - round(share * 4)), 0)


@pytest.mark.parametrize("share", [-1.0, -0.9, -0.3, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", ["noise", "smooth", "dull"])
def test_enhancements_are_those_of_pillow(kind, share):
    image = picture(kind)
    enhancers = {
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "brightness": ImageEnhance.Brightness,
        "sharpness": ImageEnhance.Sharpness,
    }
    for name, enhancer in enhancers.items():
        expected = enhancer(image).enhance(1 + 0.9 * share)
        # What Pillow rounds within, up to a level, is doubled by a factor of almost 2.
        assert_like(OPERATIONS[name](levels_of(image), share), expected, 2)


@pytest.mark.parametrize("share", [-1.0, -0.45, 0.0, 0.2, 0.9])
@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_geometric_operations_are_those_of_pillow(kind, share):
    image = picture(kind)
    shear, shift = 0.3 * share, 150 / 331 * share
    matrices = {  # rows for x and y, from the upper left corner
        "shear-x": (1, shear, -shear * HEIGHT / 2, 0, 1, 0),
        "shear-y": (1, 0, 0, shear, 1, -shear * WIDTH / 2),
        "translate-x": (1, 0, shift * WIDTH, 0, 1, 0),
        "translate-y": (1, 0, 0, 0, 1, shift * HEIGHT),
    }
    grey, smooth = (128, 128, 128), Image.Resampling.BILINEAR
    expected = {
        name: image.transform(
            image.size, Image.Transform.AFFINE, matrix, resample=smooth, fillcolor=grey
        )
        for name, matrix in matrices.items()
    }
    expected["rotate"] = image.rotate(30 * share, resample=smooth, fillcolor=grey)
    for name, image_of_pillow in expected.items():
        assert_like(OPERATIONS[name](levels_of(image), share), image_of_pillow)


def test_no_magnitude_changes_nothing_but_where_there_is_no_magnitude():
    for kind, name in itertools.product(["noise", "smooth", "dull"], OPERATIONS):
        levels = levels_of(picture(kind))
        if name not in ("autocontrast", "equalize"):
            assert torch.equal(OPERATIONS[name](levels, 0.0), levels), name
            assert name == "identity" or not torch.equal(OPERATIONS[name](levels, 0.9), levels)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (16, 16)])
def test_every_operation_takes_pictures_of_any_size_and_of_one_color(size):
    noise = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0)).float()
    for name, levels in itertools.product(OPERATIONS, [noise, torch.full((3, *size), 77.0)]):
        for share in (-1.0, 0.5, 1.0):
            before = levels.clone()
            changed = OPERATIONS[name](levels, share)
            assert changed.shape == levels.shape and torch.equal(levels, before)
            assert changed.min() >= 0 and changed.max() <= 255


def test_operations_are_drawn_alike_with_both_signs(monkeypatch):
    drawn: dict[str, list[float]] = {name: [] for name in OPERATIONS}
    for name in OPERATIONS:
        monkeypatch.setitem(
            OPERATIONS, name, lambda levels, share, name=name: drawn[name].append(share) or levels
        )
    image = torch.zeros(3, 4, 4)
    for seed in range(700):
        rand_augment(image, random.Random(seed), 2, 4.0)
    for shares in drawn.values():
        assert 60 <= len(shares) <= 140  # 100 expected
        assert set(shares) == {-0.4, 0.4}
        assert 25 <= shares.count(0.4) <= 85


def test_operations_without_strength_leave_the_pixels_of_a_file():
    image = levels_of(picture()) / 127.5 - 1
    mapped = rand_augment(image, random.Random(0), 0, 9.0)
    torch.testing.assert_close(mapped, image, rtol=0, atol=1e-6)


# --- crops and erasing ----------------------------------------------------------------------------


def test_a_crop_is_a_rectangle_of_the_picture_scaled_to_the_size_of_the_model():
    image = picture("smooth").resize((60, 40), Image.Resampling.BICUBIC)
    augmentation = Augmentation.of(Classification(random_crop=0.2))
    shares = []
    for number in range(40):
        cropped = crop_picture(image, 32, augmentation.crop(0, number))
        top, left, height, width = augmentation.crop(0, number)(40, 60)
        assert 0 <= top <= 40 - height and 0 <= left <= 60 - width
        assert 0.7 < width / height < 1.45
        shares.append(height * width / (40 * 60))
        part = image.crop((left, top, left + width, top + height))
        expected = part.resize((32, 32), Image.Resampling.BICUBIC)
        # Pillow reads a little beyond a box, where a cut picture ends.
        difference = np.abs(np.asarray(expected, int) - cropped)
        assert difference[4:-4, 4:-4].max() <= 2
    assert 0.15 < min(shares) < 0.4 and 0.7 < max(shares) <= 1


def test_a_picture_of_which_no_rectangle_fits_is_cropped_as_always():
    image = picture().resize((8, 400))
    crop = Augmentation.of(Classification(random_crop=0.99)).crop(0, 0)
    assert crop(400, 8) is None
    assert np.array_equal(crop_picture(image, 16, crop), crop_picture(image, 16))


def test_erasing_replaces_a_rectangle_by_noise_and_nothing_else():
    image = torch.full((3, 32, 32), 2.0)  # no noise has it
    areas, aspects = [], []
    for seed in range(300):
        erased = random_erasing(image, random.Random(seed))
        changed = (erased != 2).all(0)
        rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
        assert changed.sum() == len(rows) * len(columns) > 0  # a full rectangle
        noise = erased[:, changed]
        assert (noise.abs() <= 1).all() and noise.unique().numel() > 0.9 * noise.numel()
        areas.append(float(changed.float().mean()))
        aspects.append(len(columns) / len(rows))
    assert 0.01 < min(areas) < 0.05 and 0.28 < max(areas) < 0.36
    assert 0.2 < min(aspects) < 0.4 and 2.5 < max(aspects) < 4
    assert (image == 2).all()


@pytest.mark.parametrize("size", [1, 2])
def test_pictures_of_few_pixels_can_be_cropped_and_erased(size):
    image = torch.zeros(3, size, size)
    small = Image.new("RGB", (size, size))
    augmentation = Augmentation.of(Classification(random_crop=0.05))
    for seed in range(50):
        assert crop_picture(small, 4, augmentation.crop(0, seed)).shape == (4, 4, 3)
        assert random_erasing(image, random.Random(seed)).shape == image.shape


# --- augmentation of samples ----------------------------------------------------------------------


def test_the_defaults_change_nothing():
    image = torch.rand(3, 8, 8)
    assert Augmentation.of(Classification()).apply(image, 0, 0) is image


def test_draws_follow_from_the_seed_and_the_number_of_the_sample():
    image = levels_of(picture()) / 127.5 - 1
    augmentation = Augmentation.of(Classification(**EVERYTHING))
    torch.manual_seed(0)
    first = [augmentation.apply(image, 0, number) for number in range(40)]
    torch.manual_seed(1)
    again = [augmentation.apply(image, 0, number) for number in reversed(range(40))]
    assert all(map(torch.equal, first, reversed(again)))
    assert len({item.numpy().tobytes() for item in first}) > 20
    assert not all(map(torch.equal, first, [augmentation.apply(image, 1, n) for n in range(40)]))
    assert all(item.shape == image.shape and item.abs().max() <= 1 for item in first)
    crops = [augmentation.crop(0, number)(40, 60) for number in range(40)]
    assert crops == [augmentation.crop(0, number)(40, 60) for number in range(40)]
    assert len(set(crops)) > 35 and crops[0] != augmentation.crop(1, 0)(40, 60)


@pytest.mark.parametrize("key", ["rand_augment_share", "random_erasing"])
def test_a_share_is_that_of_the_images_that_are_changed(key):
    image = levels_of(picture()) / 127.5 - 1
    ops = 3 if key == "rand_augment_share" else 0
    augmentation = Augmentation.of(Classification(rand_augment_ops=ops, **{key: 0.3}))
    changed = [not torch.equal(augmentation.apply(image, 0, n), image) for n in range(400)]
    assert 85 <= sum(changed) <= 155  # 120 expected


def test_one_kind_of_draw_does_not_depend_on_another():
    image = levels_of(picture()) / 127.5 - 1
    erasing = {"random_erasing": 1.0}
    erased = Augmentation.of(Classification(**erasing))
    weak = {"rand_augment_ops": 1, "rand_augment_magnitude": 0.0}
    both = Augmentation.of(Classification(**erasing, **weak))
    for number in range(20):
        left, right = erased.apply(image, 0, number), both.apply(image, 0, number)
        noise = left != image
        torch.testing.assert_close(left[noise], right[noise])


# --- the loader -----------------------------------------------------------------------------------


def classifier_job(path, classification=None, **values):
    defaults = {"source": "folder", "path": str(path), "image_size": 8}
    return make_job(classification=classification, **{**defaults, **values})


def batches(job, count: int = 6, rank: int = 0, ranks: int = 1):
    return list(itertools.islice(build_image_dataloader(ranks, rank, None, job), count))


def samples(job, **share):
    return {
        int(number): image
        for inputs, _ in batches(job, **share)
        for number, image in zip(inputs["sample_index"], inputs["input"], strict=True)
    }


def test_a_loader_changes_training_images_by_their_number_whoever_reads_them(tmp_path, monkeypatch):
    use_fake_model(monkeypatch, is_classifier=True)
    path = write_folder(tmp_path / "train", count=4).parent
    # A crop is of the file, which the plain loader does not show.
    everything = {**EVERYTHING, "random_crop": 1.0}
    plain, job = classifier_job(path), classifier_job(path, everything)
    augmentation = Augmentation.of(Classification(**EVERYTHING))
    found, expected = samples(job), samples(plain)
    for number, image in expected.items():
        assert torch.equal(found[number], augmentation.apply(image, 0, number))
    of_ranks = [samples(job, count=3, rank=rank, ranks=2) for rank in range(2)]
    assert all(
        torch.equal(image, found[number]) for part in of_ranks for number, image in part.items()
    )


def test_a_classifier_is_supervised_once_per_image(tmp_path, monkeypatch):
    use_fake_model(monkeypatch, is_classifier=True)
    path = write_folder(tmp_path / "train", count=4).parent
    write_folder(tmp_path / "val", count=2)
    ((_, labels),) = batches(classifier_job(path), 1)
    assert labels.shape == (3, 1) and labels.dtype == torch.int64 and not labels.any()
    job = classifier_job(path, EVERYTHING)
    validation = list(build_image_validation_dataloader(1, 0, job, "val"))
    assert [labels.tolist() for _, labels in validation] == [[[0]] * 3, [[0], [-100], [-100]]]
    plain = list(build_image_validation_dataloader(1, 0, classifier_job(path), "val"))
    for (inputs, _), (others, _) in zip(validation, plain, strict=True):
        assert torch.equal(inputs["input"], others["input"])  # validation changes nothing


def test_a_denoising_model_sees_images_as_they_are(tmp_path, monkeypatch):
    use_fake_model(monkeypatch)
    path = write_folder(tmp_path / "train", count=4).parent
    loader = build_image_dataloader(1, 0, None, classifier_job(path))
    assert not any(key.startswith("classification") for key in loader.fingerprint)
    found = samples(classifier_job(path, EVERYTHING))  # which start-up checks refuse
    expected = samples(classifier_job(path))
    assert all(torch.equal(found[number], expected[number]) for number in expected)


@pytest.mark.parametrize("key", AUGMENTATION_KEYS)
def test_a_state_of_another_augmentation_is_refused(tmp_path, monkeypatch, key):
    use_fake_model(monkeypatch, is_classifier=True)
    path = write_folder(tmp_path / "train", count=2).parent
    state = build_image_dataloader(1, 0, None, classifier_job(path)).state_dict()
    value = 2 if key == "rand_augment_ops" else 0.25
    other = build_image_dataloader(1, 0, None, classifier_job(path, {key: value}))
    with pytest.raises(ValueError, match=rf"classification.{key} is {value}, but"):
        other.load_state_dict(state)
