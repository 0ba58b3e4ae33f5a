"""What routers learn of domains and what is reported, against loops over samples."""

from __future__ import annotations

import math

import pytest
import torch

from tests.jobs import debug_job
from torchtitan_mixtures.objectives.conditions import ClassCondition, RoutedCondition
from torchtitan_mixtures.objectives.denoising import DenoisingTargets, build_denoising_loss
from torchtitan_mixtures.objectives.domain_meter import DomainMeter
from torchtitan_mixtures.objectives.outputs import DenoiserOutput

BATCH, TOKENS, VALUES = 5, 64, 48


def make_loss(training, *overrides):
    job = debug_job("mixdiff", "--objective.kind=flow", f"--diffusers.training={training}",
                    *overrides)  # fmt: skip
    return build_denoising_loss(job)


def make_output(seed=0, prediction=True):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(BATCH, 3, generator=rng)
    gates = logits.softmax(1)
    values = VALUES if prediction else 0
    tokens = TOKENS if prediction else 0
    output = torch.randn(BATCH, tokens, values, generator=rng)
    return DenoiserOutput(output, None, gates, logits.requires_grad_())


def make_targets(seed=1, padding=1):
    rng = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, BATCH, TOKENS, VALUES, generator=rng)
    labels = torch.zeros(BATCH, TOKENS, dtype=torch.int64)
    labels[BATCH - padding :] = -100
    domains = torch.tensor([0, 2, 2, 1, 0])
    return DenoisingTargets(clean, noise, torch.rand(BATCH, generator=rng), labels, domains)


def cross_entropies(output, targets):
    probabilities = output.router_logits.detach().softmax(1).tolist()
    return [
        -math.log(row[d]) for row, d in zip(probabilities, targets.domains.tolist(), strict=True)
    ]


def squared_errors(output, targets):
    """Of each sample, mean over positions."""
    errors = (output.prediction - (targets.noise - targets.clean)).square()
    return errors.mean((1, 2)).tolist()


def test_decentralised_training_adds_the_cross_entropy_of_domains():
    loss_fn = make_loss("decentralised", "--diffusers.router_weight=0.3")
    output, targets = make_output(), make_targets()
    pairs = zip(squared_errors(output, targets), cross_entropies(output, targets), strict=True)
    expected = [TOKENS * (error + 0.3 * entropy) for error, entropy in pairs][: BATCH - 1]
    assert float(loss_fn(output, targets)) == pytest.approx(sum(expected), rel=1e-5)
    loss_fn(output, targets).backward()
    assert output.router_logits.grad[:-1].any(1).all() and not output.router_logits.grad[-1].any()


def test_a_router_alone_learns_the_cross_entropy():
    loss_fn = make_loss("router")
    output, targets = make_output(prediction=False), make_targets()
    expected = TOKENS * sum(cross_entropies(output, targets)[: BATCH - 1])
    assert float(loss_fn(output, targets)) == pytest.approx(expected, rel=1e-5)
    # What is reported by noise is the same: TorchTitan's meter of bands.
    assert float(loss_fn.meter.totals(torch.device("cpu"))[0].sum()) == pytest.approx(expected)


def test_joint_training_does_not_look_at_domains():
    loss_fn = make_loss("joint")
    output, targets = make_output(), make_targets()
    found = loss_fn(output, targets)
    expected = TOKENS * sum(squared_errors(output, targets)[: BATCH - 1])
    assert float(found) == pytest.approx(expected, rel=1e-5) and not found.requires_grad


def test_what_is_reported_of_domains_and_the_router():
    loss_fn = make_loss("decentralised")
    output, targets = make_output(), make_targets()
    loss_fn(output, targets)
    scalars = loss_fn.scalars()
    errors, entropies = squared_errors(output, targets), cross_entropies(output, targets)
    real, domains = range(BATCH - 1), targets.domains.tolist()
    right = [int(output.router_logits[i].argmax()) == domains[i] for i in real]
    for number, name in enumerate(("noto", "noto_v1", "fluent")):
        own = [i for i in real if domains[i] == number]
        loss = sum(errors[i] for i in own) / len(own)
        assert scalars[f"domain/{name}/loss"] == pytest.approx(loss, rel=1e-5)
        share = sum(right[i] for i in own) / len(own)
        assert scalars[f"domain/{name}/router_accuracy"] == pytest.approx(share)
        weight = sum(float(output.gates[i, number]) for i in real) / len(real)
        assert scalars[f"router/weight/{name}"] == pytest.approx(weight, rel=1e-5)
    assert scalars["router/accuracy"] == pytest.approx(sum(right) / len(real))
    mean = sum(entropies[: BATCH - 1]) / len(real)
    assert scalars["router/cross_entropy"] == pytest.approx(mean, rel=1e-5)
    rows = output.router_logits.detach().softmax(1)[: BATCH - 1].tolist()
    entropy = -sum(p * math.log(p) for row in rows for p in row) / len(rows) / math.log(3)
    assert scalars["router/entropy"] == pytest.approx(entropy, rel=1e-5)
    loss_fn.reset()
    assert loss_fn.scalars() == {}


def test_batches_add_up():
    whole, parts = (DomainMeter("abc", "xyz") for _ in range(2))
    output, targets = make_output(), make_targets(padding=0)
    losses, supervised = torch.rand(BATCH, TOKENS), targets.labels != -100
    rows = (losses, supervised, targets.domains, output.router_logits, output.gates)
    whole.add(*rows)
    for part in (slice(0, 2), slice(2, BATCH)):
        parts.add(*(row[part] for row in rows))
    assert parts.scalars() == pytest.approx(whole.scalars())


def test_a_domain_without_samples_is_not_reported_and_no_domains_are_fine():
    meter = DomainMeter("abc", "xyz")
    supervised = torch.ones(2, TOKENS, dtype=torch.bool)
    gates = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    meter.add(torch.ones(2, TOKENS), supervised, torch.tensor([0, 0]), None, gates)
    assert set(meter.scalars()) == {
        "router/weight/a", "router/weight/b", "router/weight/c", "domain/x/loss"
    }  # fmt: skip
    meter.reset()
    meter.add(torch.ones(2, TOKENS), supervised, None, None, gates)
    assert set(meter.scalars()) == {"router/weight/a", "router/weight/b", "router/weight/c"}


def test_what_the_model_is_told_beside_the_condition():
    batch = {
        "input": torch.zeros(3, 1, 2, 2),
        "class_labels": torch.tensor([1, 2, 3]),
        "domain_labels": torch.tensor([0, 1, 1]),
        "sample_index": torch.tensor([7, 8, 9]),
    }
    inner = ClassCondition(num_classes=5, dropout=0.0)
    noisy = RoutedCondition(inner, (4,), by_domain=False)
    found = noisy.inputs(batch, 0, "training", is_training=True)
    assert found["router_noise"].shape == (3, 4) and "domain_labels" not in found
    alone = {key: value[1:2] for key, value in batch.items()}
    again = noisy.inputs(alone, 0, "training", is_training=True)
    assert torch.equal(again["router_noise"], found["router_noise"][1:2])
    hard = RoutedCondition(inner, None, by_domain=True)
    found = hard.inputs(batch, 0, "training", is_training=True)
    assert found["domain_labels"].tolist() == [0, 1, 1] and "router_noise" not in found
    for condition in (noisy, hard):
        assert set(condition.inputs(batch, 0, "level", is_training=False)) == {"class_labels"}
        assert condition.encode(batch) is batch
