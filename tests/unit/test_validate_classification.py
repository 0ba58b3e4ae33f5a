"""Validation of classifiers against a loop over the images of a split."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from tests.gang import run_ranks
from tests.jobs import debug_job
from torchtitan_mixtures.data.image_data import open_images
from torchtitan_mixtures.models.mone.model import MoNE
from torchtitan_mixtures.objectives.classification import build_classification_loss
from torchtitan_mixtures.validate_classification import build_classification_validator

SPLIT = "unseen_style"
SMALL = (
    "--validation.local_batch_size=64",
    "--validation.steps=-1",
    f"--multimodal.validation_splits={SPLIT}",
)


def make_job(*overrides, capacities=()):
    chosen = map(str, capacities)
    return debug_job("mone", *SMALL, "--nested.validation_capacities", *chosen, *overrides)


def make_model(job):
    args = get_train_spec("mone").model_args[job.model.flavor]
    args.dim, args.n_layers = 32, 1
    args.update_from_config(job)
    torch.manual_seed(0)
    model = MoNE(args)
    with torch.no_grad():
        model.init_weights()
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # the head begins at zero
    return model


def one_process():
    return SimpleNamespace(
        cp=1,
        dp_cp_enabled=False,
        pp_enabled=False,
        world_mesh=SimpleNamespace(device_type="cpu"),
    )


def make_validator(job, dims=None, rank=0, world=1):
    logged = {}

    def log_validation(loss, step, split, shares):
        logged[split] = {"loss": loss, **shares}

    validator = build_classification_validator(
        job_config=job,
        dp_world_size=world,
        dp_rank=rank,
        parallel_dims=dims or one_process(),
        loss_fn=build_classification_loss(job),
        validation_context=nullcontext,
        maybe_enable_amp=nullcontext(),
        metrics_processor=SimpleNamespace(
            log_validation=log_validation, restart_clock=lambda step: None
        ),
    )
    return validator, logged


def expected_of(job, model, capacity=None):
    """What is right of a split, image by image."""
    images = open_images(job, "", SPLIT)
    losses, top_1, top_5 = [], [], []
    for index in range(len(images)):
        image = images.read(index)
        with torch.no_grad():
            logits = model(image.image[None], model.model_args.budget(capacity)).logits[0]
        losses.append(float(F.cross_entropy(logits, torch.tensor(image.label))))
        order = logits.argsort(descending=True).tolist()
        top_1.append(order[0] == image.label)
        top_5.append(image.label in order[:5])
    count = len(images)
    return {
        "loss": sum(losses) / count,
        "accuracy": sum(top_1) / count,
        "top_5_accuracy": sum(top_5) / count,
    }


def test_a_split_is_scored_image_by_image_at_every_capacity():
    job = make_job("--classification.label_smoothing=0.2", capacities=(0.3, 1.0))
    model = make_model(job)
    validator, logged = make_validator(job)
    meter = validator.loss_fn.meter
    validator.validate([model.train()], 7)
    assert list(logged) == [f"{SPLIT}/capacity_0.3", f"{SPLIT}/capacity_1"]
    for capacity in (0.3, 1.0):  # the last batch has padding, which is no image
        found = logged[f"{SPLIT}/capacity_{capacity:g}"]
        assert found == pytest.approx(expected_of(job, model, capacity), rel=1e-5)
    assert logged[f"{SPLIT}/capacity_0.3"] != logged[f"{SPLIT}/capacity_1"]
    assert model.training
    assert validator.loss_fn.meter is meter
    assert meter.sums is None


def test_without_a_list_the_capacity_is_that_of_the_run():
    job = make_job("--nested.capacity=0.4")
    model = make_model(job)
    validator, logged = make_validator(job)
    validator.validate([model], 7)
    assert logged == {SPLIT: pytest.approx(expected_of(job, model, 0.4), rel=1e-5)}


def test_images_with_several_classes_have_a_precision():
    job = make_job("--classification.multi_label", "--validation.steps=1")
    validator, logged = make_validator(job)
    validator.validate([make_model(job)], 7)
    assert list(logged[SPLIT]) == ["loss", "precision_at_1"]
    assert 0 <= logged[SPLIT]["precision_at_1"] <= 1


def test_the_average_is_validated_and_the_parameters_come_back():
    job = make_job("--validation.steps=1")
    model = make_model(job)
    validator, logged = make_validator(job)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    @contextmanager
    def swapped():
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.zero_()
        yield
        model.load_state_dict(before)

    validator.ema = SimpleNamespace(swapped=swapped)
    validator.validate([model], 7)
    classes = model.model_args.num_classes
    assert logged[SPLIT]["loss"] == pytest.approx(float(torch.tensor(classes).log()), rel=1e-5)
    assert torch.equal(model.head.weight, before["head.weight"])


def validate_on_rank(cp):
    rank, shard = torch.distributed.get_rank(), 2 // cp
    dims = ParallelDims(
        dp_replicate=1, dp_shard=shard, cp=cp, tp=1, pp=1, ep=1, etp=1, world_size=2
    )
    dims.build_mesh()
    job = make_job()
    validator, logged = make_validator(job, dims, rank if shard > 1 else 0, shard)
    validator.validate([make_model(job)], 7)
    return logged


def test_ranks_count_every_image_once():
    job = make_job()
    expected = {SPLIT: pytest.approx(expected_of(job, make_model(job)), rel=1e-5)}
    for cp in (1, 2):  # other images, or all the same ones
        assert run_ranks(validate_on_rank, 2, cp) == [expected, expected]
