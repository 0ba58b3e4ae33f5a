"""Groups of parameters per tower, their schedule and their state."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer, build_optimizers
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from tests.jobs import debug_job
from torchtitan_mixtures.checks import CHECKED
from torchtitan_mixtures.optimizer import TowerOptimizers, build_tower_optimizers

DIMS = ParallelDims(1, 1, 1, 1, 1, 1, 1, 1)


@pytest.fixture(scope="module")
def base_job():
    job = debug_job("mot", "--optimizer.lr=0.01", "--optimizer.weight_decay=0.1")
    setattr(job, CHECKED, True)
    return job


def build(base_job, **keys):
    """A narrow model of two layers, and its optimizers."""
    job = deepcopy(base_job)
    for key, value in keys.items():
        setattr(job.mixture, key, value)
    spec = get_train_spec("mot")
    args = spec.model_args["debugmodel"]
    args.update_from_config(job)
    args.dim, args.n_layers, args.n_heads, args.multiple_of, args.vocab_size = 32, 2, 2, 32, 64
    torch.manual_seed(0)
    model = spec.parallelize_fn(spec.model_cls(args), DIMS, job)
    model.init_weights(buffer_device=torch.device("cpu"))
    return model, build_tower_optimizers([model], job.optimizer, DIMS), job


def names_of(model, group):
    return {name for name, p in model.named_parameters() if any(p is q for q in group["params"])}


def of_tower(model, tower):
    return {name for name, _ in model.named_parameters() if f".{tower}." in name}


def test_without_keys_the_optimizers_are_torchtitans(base_job):
    model, optimizers, job = build(base_job)
    assert type(optimizers) is OptimizersContainer
    expected = build_optimizers([model], job.optimizer, DIMS)
    assert optimizers.optimizers[0].param_groups == expected.optimizers[0].param_groups
    assert len(optimizers.optimizers[0].param_groups) == 1


def test_named_towers_have_groups_with_their_values(base_job):
    model, optimizers, _ = build(
        base_job, tower_lr={"text": 1e-4, "shared": 0.0}, tower_weight_decay={"text": 0.5}
    )
    rest, shared, text = optimizers.optimizers[0].param_groups
    everything = {name for name, _ in model.named_parameters()}
    assert names_of(model, text) == of_tower(model, "text")
    assert names_of(model, rest) == of_tower(model, "image")
    assert names_of(model, shared) == everything - names_of(model, text) - names_of(model, rest)
    assert (rest["lr"], rest["weight_decay"]) == (0.01, 0.1)
    assert (shared["lr"], shared["weight_decay"]) == (0.0, 0.1)
    assert (text["lr"], text["weight_decay"]) == (1e-4, 0.5)
    assert {k: v for k, v in text.items() if k not in ("params", "lr", "weight_decay")} == {
        k: v for k, v in rest.items() if k not in ("params", "lr", "weight_decay")
    }


def test_the_schedule_scales_every_group_from_its_own_rate(base_job):
    _, optimizers, job = build(base_job, tower_lr={"text": 1e-4, "image": 0.5})
    job.lr_scheduler.warmup_steps, job.lr_scheduler.decay_ratio = 4, 0.5
    schedulers = build_lr_schedulers(optimizers, job.lr_scheduler, 10)
    factors = []
    for _ in range(10):
        rates = [group["lr"] for group in optimizers.optimizers[0].param_groups]
        assert optimizers.learning_rates() == {"image": rates[1], "text": rates[2]}
        assert schedulers.schedulers[0].get_last_lr() == rates
        factors.append(rates[0] / 0.01)
        assert rates == pytest.approx([0.01 * factors[-1], 0.5 * factors[-1], 1e-4 * factors[-1]])
        optimizers.step()
        schedulers.step()
    # Four steps up, constant, five steps down of which TorchTitan leaves out the last.
    expected = [0.25, 0.5, 0.75, 1, 1, 1, *(1 - n / 5 for n in (1, 2, 3, 4))]
    assert factors == pytest.approx(expected)


def step(model, optimizers, seed):
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=rng)
    optimizers.step()
    optimizers.zero_grad()


FROZEN = dict(tower_lr={"text": 1e-4, "image": 0.3}, frozen_towers=["text"])


@pytest.mark.parametrize("keys", [FROZEN, FROZEN | {"tower_weight_decay": {"shared": 0.0}}])
def test_state_is_restored_with_its_groups_the_empty_ones_too(base_job, keys):
    model, optimizers, _ = build(base_job, **keys)
    step(model, optimizers, 1)
    for group in optimizers.optimizers[0].param_groups:
        group["lr"] /= 2  # as a schedule would
    weights, state = deepcopy(model.state_dict()), deepcopy(optimizers.state_dict())
    step(model, optimizers, 2)
    other, loaded, _ = build(base_job, **keys)
    other.load_state_dict(weights)
    loaded.load_state_dict(state)
    for found, group in zip(
        loaded.optimizers[0].param_groups, optimizers.optimizers[0].param_groups, strict=True
    ):
        assert names_of(other, found) == names_of(model, group)
        if group["params"]:
            assert found["lr"] == group["lr"]
            assert found["weight_decay"] == group["weight_decay"]
    assert any(not group["params"] for group in loaded.optimizers[0].param_groups)
    step(other, loaded, 2)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_a_checkpoint_serves_a_run_that_freezes_more_but_none_that_thaws(base_job, tmp_path):
    rates = dict(tower_lr={"text": 1e-4})
    model, optimizers, _ = build(base_job, **rates)
    step(model, optimizers, 1)
    dcp.save({"optimizer": optimizers}, checkpoint_id=tmp_path / "all", no_dist=True)
    _, frozen, _ = build(base_job, **rates, frozen_towers=["text"])
    dcp.load({"optimizer": frozen}, checkpoint_id=tmp_path / "all", no_dist=True)
    expected = optimizers.state_dict()
    for name, value in frozen.state_dict().items():
        assert ".text." not in name and torch.equal(
            torch.as_tensor(value), torch.as_tensor(expected[name])
        )
    # Why `check_resume` refuses it.
    dcp.save({"optimizer": frozen}, checkpoint_id=tmp_path / "fewer", no_dist=True)
    with pytest.raises(CheckpointException, match=r"Missing key .*text"):
        dcp.load({"optimizer": optimizers}, checkpoint_id=tmp_path / "fewer", no_dist=True)


def test_a_frozen_tower_has_neither_gradient_nor_state(base_job):
    model, optimizers, _ = build(base_job, **FROZEN)
    assert isinstance(optimizers, TowerOptimizers)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(64, (2, 16))
    masks = (torch.arange(16) < 8).expand(2, 16)
    model(tokens, torch.stack([masks, ~masks], 1)).square().mean().backward()
    optimizers.step()
    for name, parameter in model.named_parameters():
        is_frozen = name in of_tower(model, "text")
        assert (parameter.grad is None) == is_frozen
        assert (parameter in optimizers.optimizers[0].state) != is_frozen
        assert torch.equal(parameter, before[name]) == is_frozen, name
    assert optimizers.learning_rates() == {"image": 0.3}
    assert math.isclose(optimizers.optimizers[0].param_groups[2]["lr"], 1e-4)
