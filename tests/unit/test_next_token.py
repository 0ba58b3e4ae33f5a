from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from torchtitan_mixtures.objectives.next_token import (
    NextTokenLoss,
    Targets,
    prepare_batch,
    split_batch,
)

RANGES = [(0, 5), (5, 9)]
NAMES = ("text", "image")


def example():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 9, dtype=torch.float64).float().requires_grad_()
    labels = torch.tensor([[0, 4, 5, 8], [-100, 7, 2, -100]])
    return logits, labels


def naive(logits, labels, weights=None):
    total, sums, counts = 0.0, [0.0, 0.0], [0, 0]
    for b in range(2):
        for s in range(4):
            label = int(labels[b, s])
            if label == -100:
                continue
            row = logits[b, s].tolist()
            nll = math.log(sum(math.exp(v) for v in row)) - row[label]
            total += nll * (1.0 if weights is None else float(weights[b, s]))
            modality = 0 if label < 5 else 1
            sums[modality] += nll
            counts[modality] += 1
    return total, sums, counts


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_weighted_sum_and_the_meter_the_unweighted_one(weighted):
    logits, labels = example()
    weights = torch.rand(2, 4) if weighted else None
    loss_fn = NextTokenLoss(RANGES, NAMES)
    loss = loss_fn(logits, Targets(labels, weights))
    total, sums, counts = naive(logits, labels, weights)
    assert float(loss) == pytest.approx(total, rel=1e-5)
    measured = loss_fn.meter.totals(torch.device("cpu"))
    assert measured[0].tolist() == pytest.approx(sums, rel=1e-5)
    assert measured[1].tolist() == counts


def test_the_meter_adds_up_over_microbatches_and_forgets_on_reset():
    logits, labels = example()
    loss_fn = NextTokenLoss(RANGES, NAMES)
    loss_fn(logits, labels)
    once = loss_fn.meter.totals(torch.device("cpu")).clone()
    loss_fn(logits, labels)
    torch.testing.assert_close(loss_fn.meter.totals(torch.device("cpu")), 2 * once)
    loss_fn.meter.reset()
    assert loss_fn.meter.totals(torch.device("cpu")).tolist() == [[0, 0], [0, 0]]


def test_the_meter_keeps_no_graph_alive():
    logits, labels = example()
    loss_fn = NextTokenLoss(RANGES, NAMES)
    loss_fn(logits, labels)
    assert not loss_fn.meter.totals(torch.device("cpu")).requires_grad


def test_unsupervised_positions_have_no_gradient():
    logits, labels = example()
    NextTokenLoss(RANGES, NAMES)(logits, labels).backward()
    assert (logits.grad[labels == -100] == 0).all()
    assert (logits.grad[labels != -100] != 0).any(-1).all()


def test_a_compiled_loss_equals_the_eager_one():
    logits, labels = example()
    eager = NextTokenLoss(RANGES, NAMES)(logits, labels)
    compiled = NextTokenLoss(RANGES, NAMES, compile_backend="aot_eager")(logits, labels)
    torch.testing.assert_close(compiled, eager)


def test_a_batch_is_split_into_what_the_model_and_the_loss_take():
    weights = torch.ones(1, 3)
    batch = {"input": torch.zeros(1, 3), "positions": torch.ones(1, 3), "loss_weights": weights}
    inputs, targets, extra = split_batch(batch, torch.ones(1, 3))
    assert inputs is batch["input"]
    assert targets.loss_weights is weights
    assert list(extra) == ["positions"]


def prepare(input_dict, *, cp=False, pp=False, model=None):
    """`prepare_batch` under a layout; the ring stands for context parallelism."""
    dims = SimpleNamespace(cp_enabled=cp, pp_enabled=pp, get_mesh=lambda name: None)
    job = SimpleNamespace(
        mixture=SimpleNamespace(context_parallel="ring"),
        parallelism=SimpleNamespace(context_parallel_load_balancer=None),
    )
    return prepare_batch(model, None, input_dict, torch.ones(1, 3), dims, job)


def test_all_stages_of_a_pipeline_get_what_belongs_to_the_tokens():
    batch = {name: torch.zeros(1, 3) for name in ("input", "positions", "loss_weights")}
    inputs, targets, extra_inputs, extra_kwargs = prepare(batch)
    assert inputs is batch["input"] and targets.loss_weights is batch["loss_weights"]
    assert list(extra_inputs) == ["positions"] and extra_kwargs == {}
    *_, extra_inputs, extra_kwargs = prepare(batch, pp=True)
    assert extra_inputs == {} and list(extra_kwargs) == ["positions"]


def test_a_fault_in_the_making_of_a_mask_is_not_hidden():
    def fail(*arguments):
        raise TypeError("fault")

    model = SimpleNamespace(model_args=SimpleNamespace(attn_type="flex"), get_attention_masks=fail)
    with pytest.raises(TypeError, match="fault"):
        prepare({"input": torch.zeros(1, 3)}, cp=True, model=model)
