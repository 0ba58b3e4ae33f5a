"""The loss of classifiers against dense targets, and what it reports."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchtitan.distributed import ParallelDims

from tests.gang import run_ranks
from torchtitan_mixtures.classifier_config import Classification, Nested
from torchtitan_mixtures.models.mone.args import MoNEModelArgs
from torchtitan_mixtures.objectives.capacity import CapacitySchedule
from torchtitan_mixtures.objectives.classification import (
    ClassificationLoss,
    ClassificationTargets,
)
from torchtitan_mixtures.objectives.mixing import draw_mix, mix_images
from torchtitan_mixtures.objectives.outputs import ClassifierOutput, NestedStatistics

CLASSES = 7


def make_loss(seed=1, dims=None, nested=None, args=(), **keys):
    fields = dict(dim=16, n_layers=1, n_heads=2, patch_size=2, image_size=8, num_classes=CLASSES)
    model_args = MoNEModelArgs(**{**fields, **dict(args)})
    schedule = CapacitySchedule(nested or Nested(), 10, seed, model_args.capacity)
    return ClassificationLoss(model_args, Classification(**keys), schedule, seed, dims)


def make_batch(numbers, multi_label=False, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = torch.rand(64, 3, 8, 8, generator=rng) * 2 - 1
    numbers = torch.tensor(list(numbers))
    classes = numbers % CLASSES
    if multi_label:  # one to three of them
        others = torch.stack([(numbers + 2) % CLASSES, (numbers + 3) % CLASSES], 1)
        others[numbers % 3 == 0] = -1
        others[numbers % 3 == 1, 1] = -1
        classes = torch.cat([classes[:, None], others], 1)
    batch = {"input": images[numbers], "class_labels": classes, "sample_index": numbers}
    return batch, torch.zeros(len(numbers), 1, dtype=torch.int64)


def prepare(loss, numbers, capacity=None, multi_label=False):
    batch, labels = make_batch(numbers, multi_label)
    return loss.prepare(None, None, batch, labels, None, None, capacity)


def dense(classes):
    """Targets of all classes, `(batch, classes)`, in a loop."""
    rows = torch.zeros(len(classes), CLASSES)
    for row, own in zip(rows, classes.view(len(classes), -1).tolist(), strict=True):
        for label in own:
            if label != -1:
                row[label] = 1
    return rows


def mixed_targets(targets):
    share = targets.share[:, None]
    return share * dense(targets.classes) + (1 - share) * dense(targets.others)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_cross_entropy_is_that_of_dense_targets(smoothing):
    loss = make_loss(mixup=0.5, cutmix=0.5, label_smoothing=smoothing)
    _, targets, _, _ = prepare(loss, range(8))
    logits = torch.randn(8, CLASSES)
    soft = mixed_targets(targets)
    expected = F.cross_entropy(logits, soft, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(loss(ClassifierOutput(logits), targets), expected)
    loss = make_loss(label_smoothing=smoothing)
    _, targets, _, _ = prepare(loss, range(8))
    expected = F.cross_entropy(
        logits, torch.arange(8) % CLASSES, reduction="sum", label_smoothing=smoothing
    )
    torch.testing.assert_close(loss(ClassifierOutput(logits), targets), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_binary_cross_entropies_are_summed_over_classes(smoothing, mixup):
    loss = make_loss(multi_label=True, mixup=mixup, label_smoothing=smoothing)
    _, targets, _, _ = prepare(loss, range(8), multi_label=True)
    hot = mixed_targets(targets) if mixup else dense(targets.classes)
    assert hot.sum() > 8
    hot = hot * (1 - smoothing) + smoothing / CLASSES
    logits = torch.randn(8, CLASSES, dtype=torch.float64, requires_grad=True)
    expected = 0.0
    for row in range(8):
        for label in range(CLASSES):
            p, t = torch.sigmoid(logits[row, label]), hot[row, label]
            expected = expected - t * p.log() - (1 - t) * (1 - p).log()
    found = loss(ClassifierOutput(logits), targets)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_rows_without_an_image_count_for_nothing():
    loss = make_loss()
    _, targets, _, _ = prepare(loss, range(4))
    targets.labels[3] = -100
    logits = torch.randn(4, CLASSES)
    logits[3] = 1e4
    total = loss(ClassifierOutput(logits), targets)
    _, first, _, _ = prepare(loss, range(3))
    other = make_loss()
    torch.testing.assert_close(total, other(ClassifierOutput(logits[:3]), first))
    assert loss.meter.totals(torch.device("cpu"))[1].tolist() == [3.0]
    assert not loss.score(ClassifierOutput(logits), targets).is_image[3]


def test_logits_of_half_precision_are_scored_in_single():
    loss = make_loss()
    _, targets, _, _ = prepare(loss, range(8))
    logits = torch.randn(8, CLASSES).bfloat16()
    found = loss(ClassifierOutput(logits), targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(ClassifierOutput(logits.float()), targets))


def test_images_and_classes_are_mixed_alike():
    loss = make_loss(mixup=0.4, cutmix=1.0)
    images, targets, extra, _ = prepare(loss, range(8))
    batch, _ = make_batch(range(8))
    mix = draw_mix(1, torch.arange(8), (8, 8), 0.4, 1.0)
    assert torch.equal(images, mix_images(batch["input"], mix))
    assert torch.equal(targets.share, mix.share.repeat_interleave(2))
    assert targets.others[:, 0].tolist() == [(number ^ 1) % CLASSES for number in range(8)]
    assert extra == {}


@pytest.mark.parametrize("routing", ["random", "expert_preferred"])
def test_draws_belong_to_samples_however_they_are_cut_into_batches(routing):
    loss = make_loss(mixup=0.3, args={"routing": routing})
    whole, targets, extra, _ = prepare(loss, range(12))
    parts = [prepare(loss, numbers) for numbers in (range(8), range(8, 12))]
    assert torch.equal(whole, torch.cat([part[0] for part in parts]))
    assert torch.equal(targets.share, torch.cat([part[1].share for part in parts]))
    assert list(extra) == (["scores"] if routing == "random" else [])
    for name, value in extra.items():
        assert value.shape == (12, 1, 16, 4)
        assert value.unique().numel() > 0.99 * value.numel()
        assert torch.equal(value, torch.cat([part[2][name] for part in parts]))


def test_validation_mixes_nothing_and_routes_at_random_the_same_in_every_run():
    found = []
    for seed in (1, 2):
        loss = make_loss(seed, mixup=0.3, args={"routing": "random"})
        images, targets, extra, kwargs = prepare(loss, range(6), capacity=0.25)
        assert torch.equal(images, make_batch(range(6))[0]["input"])
        assert targets.others is None
        assert kwargs["budget"].effective_capacity == pytest.approx(0.25, abs=0.05)
        found.append((extra["scores"], prepare(loss, range(6))[2]["scores"]))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])
    assert not torch.equal(*found[0])


def test_scores_are_without_smoothing_and_say_which_guesses_are_right():
    loss = make_loss(label_smoothing=0.3)
    _, targets, _, _ = prepare(loss, range(9), capacity=0.5)
    logits = torch.randn(9, CLASSES)
    scores = loss.score(ClassifierOutput(logits), targets)
    classes = torch.arange(9) % CLASSES
    torch.testing.assert_close(scores.losses, F.cross_entropy(logits, classes, reduction="none"))
    order = logits.argsort(1, descending=True).tolist()
    for row, label in enumerate(classes.tolist()):
        assert bool(scores.top_1[row]) == (order[row][0] == label)
        assert bool(scores.top_k[row]) == (label in order[row][:5])
    few = make_loss(args={"num_classes": 4})
    narrow = ClassificationTargets(classes[:, None] % 4, targets.labels)
    assert few.score(ClassifierOutput(logits[:, :4]), narrow).top_k is None


def test_a_guess_is_right_if_it_is_any_class_of_an_image():
    loss = make_loss(multi_label=True)
    _, targets, _, _ = prepare(loss, range(9), capacity=0.5, multi_label=True)
    logits = torch.randn(9, CLASSES)
    scores = loss.score(ClassifierOutput(logits), targets)
    hot, guesses = dense(targets.classes), logits.argmax(1).tolist()
    assert scores.top_1.tolist() == [bool(hot[row, guess]) for row, guess in enumerate(guesses)]
    assert scores.top_k is None


def test_images_with_several_classes_need_the_loss_for_them():
    with pytest.raises(ValueError, match=r"classification\.multi_label = false: .* set it to true"):
        prepare(make_loss(), range(4), multi_label=True)


def test_each_step_has_its_capacity_and_reports_under_it():
    nested = Nested(schedule="linear", start_capacity=1.0, schedule_levels=2)
    loss = make_loss(nested=nested)
    assert loss.meter.names == ("1", "0.5")
    losses = {}
    for step, capacity in ((1, 1.0), (6, 0.5)):
        loss.start_step(step)
        _, targets, _, kwargs = prepare(loss, range(4))
        assert kwargs["budget"].effective_capacity == pytest.approx(capacity, abs=0.07)
        losses[step] = float(loss(ClassifierOutput(torch.randn(4, CLASSES)), targets))
        index = 0 if step == 1 else 1
        sums, counts = loss.meter.totals(torch.device("cpu")).tolist()
        assert sums[index] == pytest.approx(losses[step])
        assert (counts[index], counts[1 - index]) == (4.0, 0.0)


def statistics(load, entropy):
    load = torch.tensor(load)
    return NestedStatistics(load, load.flip(1), torch.tensor(entropy))


def test_what_routers_do_is_the_mean_over_microbatches():
    loss = make_loss()
    loss.start_step(1)
    _, targets, _, _ = prepare(loss, range(4))
    logits = F.one_hot(targets.classes[:, 0], CLASSES).float()
    logits[3] = logits[3].roll(1)
    for load, entropy in (([[1.0, 0, 0, 0]], [1.0]), ([[0, 0, 0.5, 0.5]], [2.0])):
        loss(ClassifierOutput(logits, statistics(load, entropy)), targets)
    found = loss.scalars()
    assert found["train/accuracy"] == 0.75
    assert found["nested/capacity"] == pytest.approx((0.125 + 0.75) / 2)
    assert found["router/0/entropy"] == 1.5
    assert [found[f"router/0/load/expert_{i}"] for i in range(4)] == [0.5, 0, 0.25, 0.25]
    assert [found[f"router/0/probability/expert_{i}"] for i in range(4)] == [0.25, 0.25, 0, 0.5]
    loss.start_step(2)
    assert loss.scalars() == {}


def test_there_is_no_accuracy_of_mixed_images_and_no_router_of_a_dense_model():
    loss = make_loss(mixup=0.5, args={"num_experts": 1})
    _, targets, _, _ = prepare(loss, range(4))
    loss(ClassifierOutput(torch.randn(4, CLASSES)), targets)
    assert loss.scalars() == {}


def totals_on_rank(cp):
    """Loss and scalars of two ranks, with other images or with parts of the same ones."""
    rank = torch.distributed.get_rank()
    shard = 2 // cp
    dims = ParallelDims(
        dp_replicate=1, dp_shard=shard, cp=cp, tp=1, pp=1, ep=1, etp=1, world_size=2
    )
    dims.build_mesh()
    loss = make_loss(dims=dims)
    first = 0 if cp > 1 else 4 * rank
    logits = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(0))
    _, targets, _, _ = prepare(loss, range(first, first + 4))
    load = [[0.5, 0.5, 0, 0]] if rank == 0 else [[0, 0, 0.5, 0.5]]  # of this rank's tokens
    router = statistics(load, [float(rank)])
    total = loss(ClassifierOutput(logits[first : first + 4], router), targets)
    count = loss.meter.totals(torch.device("cpu"))[1]
    sums = torch.stack([total.double(), count[0]])
    torch.distributed.all_reduce(sums)
    return sums.tolist(), loss.scalars()


@pytest.mark.parametrize("cp", [1, 2])
def test_sums_over_ranks_count_every_image_once(cp):
    images = 4 if cp > 1 else 8
    loss = make_loss()
    logits = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(0))[:images]
    _, targets, _, _ = prepare(loss, range(images))
    expected = float(loss(ClassifierOutput(logits), targets))
    for sums, scalars in run_ranks(totals_on_rank, 2, cp):
        assert sums == pytest.approx([expected, images], rel=1e-6)
        assert scalars["train/accuracy"] == loss.scalars()["train/accuracy"]
        assert scalars["router/0/entropy"] == 0.5
        assert scalars["router/0/load/expert_0"] == 0.25
        assert scalars["nested/capacity"] == pytest.approx((0.1875 + 0.75) / 2)


def test_the_host_waits_for_the_device_once_and_only_if_something_is_drawn():
    loss = make_loss(mixup=0.5, cutmix=0.5, args={"routing": "random"})
    batch, labels = make_batch(range(4))
    reads = []
    index = batch["sample_index"]
    batch["sample_index"] = SimpleNamespace(cpu=lambda: reads.append(1) or index)
    loss.prepare(None, None, batch, labels, None, None)
    assert len(reads) == 1
    plain = make_loss()
    plain.prepare(None, None, batch, labels, None, None)
    assert len(reads) == 1
