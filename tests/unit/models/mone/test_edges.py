"""What nested models do at the edges: low precision, extreme numbers, nothing to do."""

import math

import pytest
import torch
from torchtitan.distributed import ParallelDims

from tests.jobs import debug_job
from tests.rows import quick
from tests.unit.models.mone.helpers import build, naive_forward, randn, random_images, tiny_args
from torchtitan_mixtures.checks import CHECKED
from torchtitan_mixtures.models.mone.capacity import Budget, compute_capacity_distribution
from torchtitan_mixtures.models.mone.nested_mm import (
    nested_contract,
    nested_contract_grads,
    nested_expand,
    nested_expand_grads,
)
from torchtitan_mixtures.models.mone.parallelize import parallelize_mone
from torchtitan_mixtures.models.mone.routing import ExpertPreferredRouter, choose_tokens


def test_autocast_does_not_round_probabilities():
    router, x = ExpertPreferredRouter(64, 4), torch.randn(2, 16, 64)
    torch.nn.init.normal_(router.weight)
    budget = Budget((4, 4, 4, 4))
    expected = router(x, budget)
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x, budget)
    assert found.probabilities.dtype == torch.float32
    torch.testing.assert_close(found.probabilities, expected.probabilities)


def test_a_model_of_bfloat16_runs():
    args = tiny_args()
    images, scores = random_images(args, dtype=torch.float32), randn(3, 1, 16, 3).float()
    exact = build(args)(images, scores=scores).logits
    found = build(args, torch.bfloat16)(images, scores=scores).logits
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("router_layer", quick([1], [0, 1]))
def test_parallelize_allows_the_graphs_of_all_capacities(router_layer):
    keys = ["--compile.enable", "--compile.backend=eager", "--nested.schedule=adaptive"]
    job = debug_job("mone", *keys, f"--nested.router_layer={router_layer}")
    sizes = {"n_layers": 3, "image_size": 16, "num_experts": 4}
    args = tiny_args(**sizes, capacity=0.5, router_layer=router_layer)
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    torch._dynamo.reset()
    setattr(job, CHECKED, True)
    with torch._dynamo.config.patch(recompile_limit=8, specialize_int=False):
        model = parallelize_mone(build(args), dims, job)
        for batch, has_grad in ((3, True), (3, False), (2, False)):
            with torch.set_grad_enabled(has_grad):
                for capacity in job.nested.capacities:
                    model(random_images(args, batch=batch), args.budget(capacity))
    torch._dynamo.reset()


def test_argmax_goes_by_no_budget():
    args = tiny_args(routing="argmax")
    model, images = build(args), random_images(args)
    expected, _ = naive_forward(model, images, (4, 4, 8))
    torch.testing.assert_close(model(images, Budget((4, 4, 8))).logits, expected)


def test_a_capacity_of_not_one_token_is_refused():
    with pytest.raises(ValueError, match=r"capacity = 0.01"):
        tiny_args(allocation="skip", capacity=0.01)


@pytest.mark.parametrize("operator", [nested_expand, nested_contract])
def test_no_tokens_at_all_are_none_still(operator):
    x, weight, bias = torch.randn(0, 3, 8), torch.randn(8, 8), torch.randn(8)
    assert operator(x, weight, bias, (0, 0), (4, 8)).shape == (0, 3, 8)


@pytest.mark.parametrize("kind", ["expand", "contract"])
@pytest.mark.parametrize("strided", ["x", "weight"])
def test_fake_gradients_have_the_strides_of_real_ones(kind, strided):
    x, weight = torch.randn(6, 3, 8), torch.randn(8, 8)
    if strided == "x":
        x = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    else:
        weight = weight.t()
    op = nested_expand_grads if kind == "expand" else nested_contract_grads
    torch.library.opcheck(op, (torch.randn(6, 3, 8), x, weight, [6, 4], [4, 8]))


def test_scores_of_minus_infinity_lose_no_token():
    scores = torch.full((1, 6, 3), -torch.inf)
    scores[0, 0] = 0
    assert sorted(choose_tokens(scores, Budget((2, 2, 2)))[0].tolist()) == list(range(6))


@pytest.mark.parametrize(
    ("delta", "beta", "form"),
    [
        (1e6, 10, "multiplicative"),
        (1e3, 1e-3, "multiplicative"),
        (2, 1e-12, "divisive"),
        (2, 1e-12, "multiplicative"),
        (2, 1e-320, "divisive"),
    ],
)
def test_extreme_parameters_still_cost_what_they_should(delta, beta, form):
    found = compute_capacity_distribution(0.5, 4, delta, beta, form)
    cost = sum(c / 2 ** (3 - j) for j, c in enumerate(found))
    assert not math.isnan(cost) and cost == pytest.approx(0.5, abs=1e-6)


def test_what_no_number_can_hold_is_refused():
    with pytest.raises(ValueError, match=r"delta = 1e\+200: too large"):
        compute_capacity_distribution(0.5, 4, 1e200)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens_multiple": 0}, "tokens_multiple = 0"),
        ({"tokens_multiple": -1}, "tokens_multiple = -1"),
        ({"allocation": "even"}, "allocation = 'even'"),
        ({"mlp_ratio": math.nan}, "mlp_ratio = nan"),
        ({"kernels": "cuda"}, "kernels = 'cuda'"),
    ],
    ids=str,
)
def test_more_bad_arguments_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_args(**fields)


def test_scores_of_another_shape_are_refused():
    args = tiny_args(num_routers=2)
    with pytest.raises(ValueError, match=r"scores are \(16, 3\) .* has \(2, 16, 3\)"):
        build(args)(random_images(args), scores=randn(3, 16, 3))
