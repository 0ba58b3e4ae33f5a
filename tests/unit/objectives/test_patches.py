"""Patches, against loops."""

import pytest
import torch

from torchtitan_mixtures.objectives.patches import patchify, unpatchify


def naive_patches(image: list, patch: int) -> list:
    """Of one picture `[channel][row][column]`, with loops."""
    channels, height, width = len(image), len(image[0]), len(image[0][0])
    return [
        [
            image[channel][top + row][left + column]
            for row in range(patch)
            for column in range(patch)
            for channel in range(channels)
        ]
        for top in range(0, height, patch)
        for left in range(0, width, patch)
    ]


@pytest.mark.parametrize(("height", "width", "patch"), [(4, 4, 2), (6, 4, 2), (3, 6, 3), (2, 3, 1)])
def test_patches_equal_those_of_loops_and_go_back(height, width, patch):
    images = torch.arange(2.0 * 3 * height * width).reshape(2, 3, height, width)
    patches = patchify(images, patch)
    assert patches.tolist() == [naive_patches(image, patch) for image in images.tolist()]
    assert torch.equal(unpatchify(patches, patch, 3, height, width), images)


def test_a_width_that_is_not_given_is_the_height():
    images = torch.randn(2, 4, 8, 8)
    assert torch.equal(unpatchify(patchify(images, 4), 4, 4, 8), images)


@pytest.mark.parametrize(("height", "width"), [(5, 4), (4, 5)])
def test_a_patch_that_does_not_fit_is_named(height, width):
    with pytest.raises(ValueError, match=f"^patch_size = 2: must divide.* {height} and {width}"):
        patchify(torch.zeros(1, 1, height, width), 2)
