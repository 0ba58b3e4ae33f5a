"""From batches of images to noised ones, targets and the loss."""

from types import SimpleNamespace

import pytest
import torch

from torchtitan_mixtures.job_config import Objective
from torchtitan_mixtures.objectives.conditions import ClassCondition
from torchtitan_mixtures.objectives.denoising import DenoisingLoss, build_process
from torchtitan_mixtures.objectives.outputs import DenoiserOutput, RouterStatistics
from torchtitan_mixtures.objectives.patches import patchify

ONE_PROCESS = SimpleNamespace(cp_enabled=False)


def make_loss(router_noise=0.0, seed=1, **keys):
    config = Objective(**keys)
    args = SimpleNamespace(
        patch_size=4,
        in_channels=3,
        image_size=8,
        num_classes=10,
        dim=6,
        n_layers=2,
        num_token_experts=1,
        router_noise=router_noise,
    )
    noise = (args.n_layers, args.dim) if router_noise else None
    condition = ClassCondition(args.num_classes, config.class_dropout, noise)
    return DenoisingLoss(build_process(config, 3), args, config, condition, seed)


def make_batch(numbers, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = torch.rand(64, 3, 8, 8, generator=rng) * 2 - 1
    numbers = torch.tensor(list(numbers))
    batch = {
        "input": images[numbers],
        "class_labels": numbers % 10,
        "sample_index": numbers,
    }
    return batch, torch.zeros(len(numbers), 4, dtype=torch.int64)


def prepare(loss, numbers, level=None, dims=ONE_PROCESS):
    return loss.prepare(None, None, *make_batch(numbers), dims, None, level=level)


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
@pytest.mark.parametrize("level", [None, 3])
def test_draws_belong_to_samples_however_they_are_cut_into_batches(kind, level):
    loss = make_loss(kind=kind, router_noise=0.5)
    whole, targets, extra, _ = prepare(loss, range(8), level)
    parts = [prepare(loss, numbers, level) for numbers in (range(3), range(3, 8))]
    assert torch.equal(whole, torch.cat([part[0] for part in parts]))
    for name in ("clean", "noise", "times"):
        cut = torch.cat([getattr(part[1], name) for part in parts])
        assert torch.equal(getattr(targets, name), cut)
    for name, value in extra.items():
        assert torch.equal(value, torch.cat([part[2][name] for part in parts])), name
    assert ("router_noise" in extra) == (level is None)


def test_samples_have_noise_of_their_own_and_the_same_each_time():
    loss = make_loss()
    first, again = prepare(loss, range(8)), prepare(loss, range(8))
    other = prepare(loss, range(8, 16))  # as another rank, or the next step, has
    assert torch.equal(first[1].noise, again[1].noise)
    noise = torch.cat([first[1].noise, other[1].noise]).flatten(1)
    assert torch.unique(noise[:, 0]).numel() == 16
    assert not torch.equal(first[1].times, other[1].times)


@pytest.mark.parametrize("level", [None, 2])
def test_the_seed_decides_about_training_and_validation_is_the_same_in_every_run(level):
    noises = [prepare(make_loss(seed=seed), range(4), level)[1].noise for seed in (1, 2)]
    assert torch.equal(*noises) == (level is not None)


def test_a_share_of_the_samples_loses_its_class():
    loss = make_loss(class_dropout=0.3)
    labels = [prepare(loss, range(64))[2]["class_labels"]]
    for epoch in range(1, 20):  # other numbers, same images
        batch, slots = make_batch(range(64))
        batch["sample_index"] = batch["sample_index"] + 64 * epoch
        labels.append(loss.prepare(None, None, batch, slots, ONE_PROCESS, None)[2]["class_labels"])
    labels = torch.stack(labels)
    dropped = labels == 10
    assert 0.24 < dropped.float().mean() < 0.36
    assert torch.equal(labels[~dropped], (torch.arange(64) % 10).expand(20, 64)[~dropped])
    kept = prepare(loss, range(64), level=0)[2]["class_labels"]
    assert torch.equal(kept, torch.arange(64) % 10)


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_levels_are_evenly_spread_times(kind):
    loss = make_loss(kind=kind, validation_levels=4)
    times = [prepare(loss, range(3), level)[2]["times"] for level in range(4)]
    expected = torch.tensor([0.125, 0.375, 0.625, 0.875]) * 1000
    assert torch.allclose(torch.stack(times), expected[:, None].expand(4, 3), atol=0.5)


def test_the_noised_image_is_what_the_targets_say():
    loss = make_loss(kind="flow")
    noised, targets, _, _ = prepare(loss, range(5))
    t = targets.times[:, None, None]
    expected = (1 - t) * targets.clean + t * targets.noise
    torch.testing.assert_close(patchify(noised, 4), expected)


def test_a_rank_of_context_parallelism_has_its_part_of_the_targets_and_the_whole_image():
    mesh = SimpleNamespace(size=lambda: 2, get_local_rank=lambda: 1)
    dims = SimpleNamespace(cp_enabled=True, get_mesh=lambda name: mesh)
    loss = make_loss()
    whole, part = prepare(loss, range(4)), prepare(loss, range(4), dims=dims)
    assert torch.equal(whole[0], part[0])
    for name in ("clean", "noise", "labels"):
        assert torch.equal(getattr(part[1], name), getattr(whole[1], name)[:, 2:])


def test_the_loss_is_the_sum_over_positions_with_labels():
    loss = make_loss(kind="flow", balance_weight=0.0)
    _, targets, _, _ = prepare(loss, range(4))
    targets.labels[3] = -100
    prediction = torch.randn(4, 4, 48)
    total = loss(DenoiserOutput(prediction), targets)
    expected = 0.0
    for row in range(3):
        for token in range(4):
            error = prediction[row, token] - (targets.noise - targets.clean)[row, token]
            expected += float(error.square().mean())
    assert float(total) == pytest.approx(expected, rel=1e-5)
    sums, counts = loss.meter.totals(torch.device("cpu"))
    assert float(sums.sum()) == pytest.approx(expected, rel=1e-5)
    assert float(counts.sum()) == 12
    bands = (targets.times[:3] * 4).long()
    assert counts.tolist() == [4.0 * int((bands == band).sum()) for band in range(4)]


def test_losses_of_routers_count_once_for_each_position():
    loss = make_loss(kind="flow", balance_weight=0.5, z_weight=0.25)
    _, targets, _, _ = prepare(loss, range(4))
    prediction = targets.noise - targets.clean  # without error
    router = RouterStatistics(
        torch.tensor([[0.75, 0.25]]), torch.tensor([[1.0, 0.0]]), torch.tensor([2.0])
    )
    total = loss(DenoiserOutput(prediction, router), targets)
    assert float(total) == pytest.approx(16 * (0.5 * 1.5 + 0.25 * 2.0), rel=1e-5)
    assert loss.scalars()["router/balance_loss"] == pytest.approx(1.5)
    loss.reset()
    assert loss.scalars() == {}


def test_latents_are_drawn_from_their_mean_and_deviation():
    loss = make_loss()
    batch, labels = make_batch(range(4))
    batch["latent_std"] = torch.full_like(batch["input"], 0.5)
    _, targets, _, _ = loss.prepare(None, None, batch, labels, ONE_PROCESS, None)
    moved = (targets.clean - patchify(batch["input"], 4)) / 0.5
    assert moved.std() == pytest.approx(1.0, abs=0.1)
    _, again, _, _ = loss.prepare(None, None, batch, labels, ONE_PROCESS, None)
    assert torch.equal(targets.clean, again.clean)
