"""Kernels, weights, sizes and seams of canvases, against published numbers and loops."""

import math
from itertools import pairwise

import pytest
import torch

from torchtitan_mixtures.sampling.canvas import (
    KERNELS,
    Canvas,
    Rectangle,
    Region,
    blending_weights,
    count_imposed_steps,
    covered_cells,
    grid_side,
    kernel_weights,
    mix_noise,
    seam_energy,
    spread_tiles,
)

GAUSSIAN = [0.000278, 0.030223, 0.687863, 3.281610]
QUARTIC = [0.000093, 0.229604, 0.627547, 0.899999]


def region(left, top, width, height, kernel="gaussian", weight=1.0):
    return Region("r", Rectangle(left, top, width, height), "x", 1.0, kernel, weight)


@pytest.mark.parametrize(("kernel", "half"), [("gaussian", GAUSSIAN), ("quartic", QUARTIC)])
def test_kernels_are_the_published_ones_and_symmetric(kernel, half):
    row = KERNELS[kernel](8)
    expected = torch.tensor(half + half[::-1], dtype=torch.float64)
    torch.testing.assert_close(row, expected, atol=1e-6, rtol=0)
    assert torch.equal(row, row.flip(0))


@pytest.mark.parametrize(
    ("kernel", "centre", "edge"),
    [("gaussian", 3.977267, 2.1905e-5), ("quartic", 0.937032, 9.328e-5), ("constant", 1.0, 1.0)],
)
def test_kernels_of_large_regions_are_the_published_ones(kernel, centre, edge):
    row = KERNELS[kernel](64)
    assert row.max().item() == pytest.approx(centre, abs=1e-6)
    assert row[0].item() == row[-1].item() == pytest.approx(edge, rel=1e-4)


def test_kernels_are_products_of_both_sides():
    found = kernel_weights("gaussian", 4, 8)
    for y in range(4):
        for x in range(8):
            down, right = ((y - 1.5) / 4) ** 2, ((x - 3.5) / 8) ** 2
            expected = math.exp(-(down + right) / 0.02) / (2 * math.pi * 0.01)
            assert found[y, x].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kernel", "shares"),
    [
        ("gaussian", [0.999915, 0.957912, 0.042088, 0.000085]),
        ("quartic", [0.999896, 0.732131, 0.267869, 0.000104]),
    ],
)
def test_overlapping_tiles_share_as_published(kernel, shares):
    canvas = Canvas(12, 8, (region(0, 0, 8, 8, kernel), region(4, 0, 8, 8, kernel)))
    first, second = blending_weights(canvas, 1)
    expected = torch.tensor([1.0] * 4 + shares, dtype=torch.float64).expand(8, 8)
    torch.testing.assert_close(first, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(second, expected.flip(1), atol=1e-6, rtol=0)


def test_weights_sum_to_one_whatever_they_are():
    canvas = Canvas(
        32,
        24,
        (
            region(0, 0, 32, 24, "constant", 1e-3),
            region(0, 0, 16, 16, "gaussian", 7.0),
            region(8, 4, 16, 12, "quartic", 1e9),
            region(8, 4, 24, 20, "gaussian", 0.0),
        ),
    )
    weights = blending_weights(canvas, 4)
    assert [tuple(weight.shape) for weight in weights] == [(6, 8), (4, 4), (3, 4), (5, 6)]
    total = torch.zeros(6, 8, dtype=torch.float64)
    for one, weight in zip(canvas.regions, weights, strict=True):
        one.rectangle.in_cells(4).crop(total).add_(weight)
    torch.testing.assert_close(total, torch.ones(6, 8, dtype=torch.float64))
    assert not weights[3].any() and covered_cells(canvas, 4).all()


def test_a_single_region_has_all_the_weight_to_the_bit():
    for kernel in ("gaussian", "quartic", "constant"):
        (weight,) = blending_weights(Canvas(64, 64, (region(0, 0, 64, 64, kernel, 3e-320),)), 1)
        assert torch.equal(weight, torch.ones(64, 64, dtype=torch.float64))


def test_what_only_weightless_regions_cover_is_not_covered():
    canvas = Canvas(12, 4, (region(0, 0, 8, 4, weight=0.0), region(0, 0, 4, 4)))
    assert covered_cells(canvas, 2).tolist() == [[True, True, False, False, False, False]] * 2


def test_grids_have_the_published_sizes():
    assert (grid_side(640, 1, 256), grid_side(640, 3, 256)) == (640, 1408)
    assert (grid_side(768, 1, 256), grid_side(512, 10, 256)) == (768, 2816)


@pytest.mark.parametrize(
    ("side", "expected"), [(32, [0]), (40, [0, 8]), (48, [0, 16]), (56, [0, 8, 24]), (64, None)]
)
def test_tiles_are_few_and_cover_with_the_overlap(side, expected):
    starts = spread_tiles(side, 32, 16, 8)
    assert starts == (expected or [0, 16, 32])
    assert starts[0] == 0 and starts[-1] + 32 == side
    assert all(b - a <= 16 for a, b in pairwise(starts))


def test_references_are_imposed_for_the_published_number_of_steps():
    found = {(n, s): count_imposed_steps(n, s) for n in (50, 57) for s in (0, 0.5, 0.8, 1)}
    # 40 where floating-point arithmetic gave the source 41.
    assert (found[50, 0.8], found[50, 0.5], found[50, 0], found[50, 1]) == (40, 25, 0, 49)
    assert found[57, 0.8] == 46
    assert count_imposed_steps(1, 1.0) == 0


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
def test_mixed_noise_keeps_its_variance(epsilon):
    generator = torch.Generator().manual_seed(0)
    noise, other = torch.randn(2, 100_000, generator=generator)
    mixed = mix_noise(noise, other, epsilon)
    assert mixed.var().item() == pytest.approx(1, abs=0.02)
    correlation = (mixed * noise).mean().item()
    assert correlation == pytest.approx(1 / math.sqrt(1 + epsilon**2), abs=0.02)


def test_seam_energy_is_a_loop_over_neighbours():
    picture = torch.randn(3, 10, 12, generator=torch.Generator().manual_seed(1))
    places = [Rectangle(0, 0, 8, 6), Rectangle(4, 2, 8, 8)]
    pairs = {True: [], False: []}
    for y in range(10):
        for x in range(12):
            if x:
                is_border = any(
                    p.top <= y < p.top + p.height and x in (p.left, p.left + p.width)
                    for p in places
                )
                pairs[is_border].append((picture[:, y, x] - picture[:, y, x - 1]).square().mean())
            if y:
                is_border = any(
                    p.left <= x < p.left + p.width and y in (p.top, p.top + p.height)
                    for p in places
                )
                pairs[is_border].append((picture[:, y, x] - picture[:, y - 1, x]).square().mean())
    found = seam_energy(picture, places)
    across, inside = (torch.stack(pairs[key]).mean().item() for key in (True, False))
    assert found["across"] == pytest.approx(across) and found["inside"] == pytest.approx(inside)
    assert found["ratio"] == pytest.approx(across / inside)


def test_seam_energy_sees_seams_and_nothing_where_there_are_none():
    smooth = torch.linspace(-1, 1, 16).expand(3, 16, 16)
    places = [Rectangle(0, 0, 8, 16), Rectangle(8, 0, 8, 16)]
    whole = seam_energy(smooth, [Rectangle(0, 0, 16, 16)])
    assert whole["across"] is None and whole["ratio"] is None
    cut = smooth.clone()
    cut[:, :, 8:] += 1
    assert seam_energy(cut, places)["ratio"] > 10 * seam_energy(smooth, places)["ratio"]
    assert seam_energy(torch.zeros(3, 16, 16), places)["ratio"] is None
