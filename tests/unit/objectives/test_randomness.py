"""Random numbers of samples: independent of each other and of how batches are cut."""

import torch

from torchtitan_mixtures.objectives.randomness import draw_normal, draw_uniform, sample_generator


def test_numbers_do_not_depend_on_how_the_batch_is_cut():
    samples = torch.tensor([3, 0, 2**40, 7])
    normal, uniform = draw_normal(5, samples, (4, 8, 8), "noise"), draw_uniform(5, samples, "time")
    assert normal.shape == (4, 4, 8, 8)
    assert uniform.shape == (4,)
    for i in range(4):
        assert torch.equal(draw_normal(5, samples[i : i + 1], (4, 8, 8), "noise")[0], normal[i])
        assert torch.equal(draw_uniform(5, samples[i : i + 1], "time")[0], uniform[i])


def test_another_seed_sample_or_purpose_gives_other_numbers():
    keys = [(0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b"), (1, 0, "a"), (0, 11, "a")]
    first = [torch.rand(1, generator=sample_generator(*key)).item() for key in keys]
    assert len(set(first)) == len(keys)
    assert first == [torch.rand(1, generator=sample_generator(*key)).item() for key in keys]


def test_samples_and_purposes_are_not_correlated():
    samples = torch.arange(400)
    numbers = torch.cat([draw_normal(0, samples, (50,), purpose) for purpose in ("a", "b")])
    assert abs(numbers.mean()) < 0.02
    assert abs(numbers.var() - 1) < 0.03
    correlation = torch.corrcoef(numbers.T)  # of positions, over samples: 1/sqrt(800) = 0.035
    assert (correlation - torch.eye(50)).abs().max() < 0.2
    for shift in (1, 400):  # the next sample; the same sample for another purpose
        pairs = torch.stack([numbers[:400].flatten(), numbers.roll(-shift, 0)[:400].flatten()])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 0.03


def test_uniform_numbers_are_even():
    uniform = draw_uniform(0, torch.arange(4000), "time")
    assert uniform.min() >= 0
    assert uniform.max() < 1
    counts = (uniform * 10).long().bincount(minlength=10)
    assert (counts - 400).abs().max() < 90


def test_drawing_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    draw_normal(0, torch.tensor([1]), (3,), "noise")
    draw_uniform(0, torch.tensor([1]), "time")
    assert torch.equal(torch.get_rng_state(), state)


def test_numbers_are_drawn_on_the_cpu_whatever_the_default_device():
    samples = torch.tensor([4, 9])
    expected = draw_normal(0, samples, (3,), "noise"), draw_uniform(0, samples, "time")
    with torch.device("meta"):
        found = draw_normal(0, samples, (3,), "noise"), draw_uniform(0, samples, "time")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
