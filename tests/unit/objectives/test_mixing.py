"""mixup and CutMix against loops over pairs and pixels."""

import pytest
import torch

from torchtitan_mixtures.classifier_config import Classification
from torchtitan_mixtures.objectives.mixing import (
    check_mixing,
    draw_mix,
    mix_images,
    swap_partners,
)

SIZE = (6, 9)
KINDS = [(0.8, 0.0), (0.0, 1.0), (0.4, 1.0)]


def draw(numbers, mixup=0.4, cutmix=1.0, seed=0, size=SIZE):
    return draw_mix(seed, torch.tensor(list(numbers)), size, mixup, cutmix)


def make_images(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, *SIZE, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize(("mixup", "cutmix"), KINDS)
def test_images_are_those_of_a_loop_over_pixels(mixup, cutmix):
    images, mix = make_images(12), draw(range(12), mixup, cutmix)
    mixed = mix_images(images, mix)
    for row in range(12):
        partner, pair = images[row ^ 1], row // 2
        top, bottom, left, right = mix.box[pair].tolist()
        blend = float(mix.blend[pair])
        pixels = 0
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                is_inside = top <= y < bottom and left <= x < right
                pixels += is_inside
                expected = blend * images[row, :, y, x] + (1 - blend) * partner[:, y, x]
                expected = partner[:, y, x] if is_inside else expected
                torch.testing.assert_close(mixed[row, :, y, x], expected)
        area = pixels / (SIZE[0] * SIZE[1])
        assert float(mix.share[pair]) == pytest.approx(blend - area if pixels else blend, abs=1e-6)


@pytest.mark.parametrize(("mixup", "cutmix"), KINDS)
def test_what_an_image_loses_its_partner_gets(mixup, cutmix):
    images = make_images(8)
    mixed = mix_images(images, draw(range(8), mixup, cutmix))
    torch.testing.assert_close(mixed + swap_partners(mixed), images + swap_partners(images))
    assert not torch.equal(mixed, images)


@pytest.mark.parametrize(("mixup", "cutmix"), KINDS)
def test_draws_belong_to_pairs_however_they_are_cut_into_batches(mixup, cutmix):
    whole = draw(range(12), mixup, cutmix)
    parts = [draw(numbers, mixup, cutmix) for numbers in (range(4), range(4, 6), range(6, 12))]
    for name in whole._fields:
        assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))
    assert not torch.equal(whole.share, draw(range(12, 24), mixup, cutmix).share)
    assert not torch.equal(whole.share, draw(range(12), mixup, cutmix, seed=1).share)


def test_a_pair_does_one_of_both_by_a_fair_coin():
    mix = draw(range(2000))
    cuts = mix.blend == 1
    assert 0.45 < cuts.double().mean() < 0.55
    areas = (mix.box[:, 1] - mix.box[:, 0]) * (mix.box[:, 3] - mix.box[:, 2])
    assert (areas[~cuts] == 0).all()
    assert areas[cuts].double().mean() > 5


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (3.0, 0.0)])
def test_shares_are_those_of_a_beta_distribution(mixup, cutmix):
    share = draw(range(8000), mixup, cutmix).share.double()
    # The variance of a symmetric beta distribution of parameter a is 1 / (8 a + 4).
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(share.var()) == pytest.approx(1 / (8 * mixup + 4), rel=0.06)


def test_rectangles_lie_anywhere_and_have_the_area_that_is_drawn():
    mix = draw(range(8000), 0.0, 1.0, size=(64, 64))
    centre = (mix.box[:, :2].double().mean(1) + mix.box[:, 2:].double().mean(1)) / 2
    assert float(centre.mean()) == pytest.approx(32, abs=1)
    assert int(mix.box.min()) == 0
    assert int(mix.box.max()) == 64
    # Evenly drawn areas, less what lies outside: with r the side of the whole rectangle, what is
    # left of it is r (1 - r / 4) on average, and E[r^2 (1 - r / 4)^2] = 77 / 240 for even r^2.
    assert float(1 - mix.share.double().mean()) == pytest.approx(77 / 240, abs=0.01)


def test_an_odd_batch_size_is_refused_where_images_are_mixed():
    check_mixing(Classification(), 3)
    check_mixing(Classification(mixup=0.2), 4)
    message = r"training\.local_batch_size = 3: must be even with classification\.{} = 0\.2"
    with pytest.raises(ValueError, match=message.format("mixup")):
        check_mixing(Classification(mixup=0.2), 3)
    with pytest.raises(ValueError, match=message.format("cutmix")):
        check_mixing(Classification(cutmix=0.2), 3)
