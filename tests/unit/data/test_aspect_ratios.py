"""Shapes of images: their sizes, which is nearest to a picture, and cropping to it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from torchtitan_mixtures.data.aspect_ratios import (
    find_bucket,
    make_buckets,
    nearest_bucket,
    parse_ratio,
)
from torchtitan_mixtures.data.image_files import crop_centre, crop_to_cover

RATIOS = ["1:1", "4:3", "3:4", "16:9", "9:16", "4:1"]


def test_a_ratio_is_width_to_height():
    assert parse_ratio("4:3") == 4 / 3
    assert parse_ratio("10:40") == 0.25


@pytest.mark.parametrize(
    "text", ["", "4", "4:", "4/3", "4:3:2", "-4:3", "0:1", "3:0", "1.5:1", "5:1", "1:5", "a:b", 1]
)
def test_what_is_no_ratio_or_an_extreme_one_is_refused(text):
    message = r'multimodal.aspect_ratios: .* allowed are .* from "1:4" to "4:1"'
    with pytest.raises(ValueError, match=message):
        make_buckets(["1:1", text], 32, 2)


def test_without_ratios_there_is_one_square():
    (bucket,) = make_buckets([], 30, 2)
    assert (bucket.name, bucket.height, bucket.width) == ("1:1", 30, 30)


@pytest.mark.parametrize(("size", "patch"), [(32, 2), (64, 4), (128, 2)])
def test_shapes_are_whole_patches_of_about_one_area(size, patch):
    for bucket in make_buckets(RATIOS, size, patch):
        assert bucket.height % patch == bucket.width % patch == 0
        assert bucket.height * bucket.width == pytest.approx(size**2, rel=0.1)
        assert bucket.width / bucket.height == pytest.approx(parse_ratio(bucket.name), rel=0.15)
    shapes = {b.name: (b.height, b.width) for b in make_buckets(RATIOS, size, patch)}
    assert shapes["4:3"] == shapes["3:4"][::-1] and shapes["1:1"] == (size, size)


def test_two_ratios_of_one_shape_are_refused():
    with pytest.raises(ValueError, match=r"'4:3' and '8:6' are both 28 x 36 .*remove one"):
        make_buckets(["4:3", "8:6"], 32, 2)


def test_an_unknown_ratio_is_refused_with_those_there_are():
    buckets = make_buckets(["1:1", "4:3"], 32, 2)
    assert find_bucket(buckets, "4:3") is buckets[1]
    message = '--aspect-ratio "3:4": unknown aspect ratio; the model has 1:1, 4:3.'
    with pytest.raises(ValueError, match=message):
        find_bucket(buckets, "3:4")


def test_a_picture_goes_to_the_shape_nearest_by_logarithm():
    buckets = make_buckets(["1:1", "2:1", "1:2"], 32, 2)
    shapes = [b.width / b.height for b in buckets]
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 400, (2, 200))
    found = nearest_bucket(buckets, heights, widths)
    for number, height, width in zip(found, heights, widths, strict=True):
        distances = [abs(np.log(width / height / shape)) for shape in shapes]
        assert distances[number] == pytest.approx(min(distances))
    # Turning a picture turns its shape.
    turned = nearest_bucket(buckets, widths, heights)
    assert np.array_equal(turned, np.array([0, 2, 1])[found])


def make_picture(width, height):
    pixels = np.random.default_rng(width + height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(20, 16), (97, 31), (5, 9), (1, 200), (64, 64)])
def test_to_a_square_it_crops_like_models_of_classes(size):
    picture = make_picture(*size)
    assert np.array_equal(crop_to_cover(picture, 16, 16), crop_centre(picture, 16))


@pytest.mark.parametrize("size", [(20, 16), (97, 31), (5, 9), (300, 2), (2, 300), (63, 48)])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (8, 32)])
def test_any_picture_covers_any_shape(size, shape):
    assert np.asarray(crop_to_cover(make_picture(*size), *shape)).shape == (*shape, 3)


def test_a_picture_of_the_shape_stays_whole_and_the_middle_of_others_does():
    picture = make_picture(36, 28)
    assert np.array_equal(crop_to_cover(picture, 28, 36), np.asarray(picture))
    wide = np.zeros((28, 56, 3), np.uint8)
    wide[:, 10:46] = np.asarray(picture)
    assert np.array_equal(crop_to_cover(Image.fromarray(wide), 28, 36), np.asarray(picture))
