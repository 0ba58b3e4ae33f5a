from functools import cache

import pytest
import torch
import torch.nn.functional as F

from tests.unit.models.mone.helpers import (
    build,
    gradients,
    naive_forward,
    randn,
    random_images,
    tiny_args,
    width,
)
from torchtitan_mixtures.models.mone.capacity import Budget
from torchtitan_mixtures.models.mone.model import MoNE

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def dense_vit(w, images, args):
    """A plain ViT on whole tensors, from the parameters of a model."""
    p, batch = args.patch_size, len(images)
    x = images.unfold(2, p, p).unfold(3, p, p)  # (batch, channels, rows, columns, p, p)
    x = x.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    x = F.linear(x, w["embedder.proj.weight"], w["embedder.proj.bias"])
    if args.pool == "class_token":
        x = torch.cat([w["embedder.class_token"].expand(batch, 1, -1), x], dim=1)
    x = x + w["embedder.positions"]

    def norm(name, x):
        return F.layer_norm(x, (args.dim,), w[f"{name}.weight"], w[f"{name}.bias"], args.norm_eps)

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    for layer in range(args.n_layers):
        name = f"layers.{layer}"
        qkv = linear(f"{name}.attention.wqkv", norm(f"{name}.attention_norm", x))
        heads = qkv.view(batch, -1, args.n_heads, 3, args.dim // args.n_heads)
        q, k, v = heads.permute(3, 0, 2, 1, 4)
        weights = (q @ k.mT / q.shape[3] ** 0.5).softmax(3)
        attended = (weights @ v).transpose(1, 2).flatten(2)
        x = x + linear(f"{name}.attention.wo", attended)
        hidden = F.gelu(linear(f"{name}.feed_forward.w1", norm(f"{name}.ffn_norm", x)))
        x = x + linear(f"{name}.feed_forward.w2", hidden)
    x = norm("norm", x)
    x = x[:, 0] if args.pool == "class_token" else x.mean(1)
    return linear("head", x)


def with_alpha(model, value):
    with torch.no_grad():
        model.router_scale.alpha.fill_(value)
    return model


@pytest.mark.parametrize("pool", ["mean", "class_token"])
def test_one_expert_is_a_plain_vit(pool):
    args = tiny_args(num_experts=1, pool=pool, norm_eps=1e-4)
    model, images = build(args), random_images(args)
    w = dict(model.named_parameters())
    expected, found = dense_vit(w, images, args), model(images)
    assert found.router is None
    torch.testing.assert_close(found.logits, expected, rtol=1e-12, atol=1e-12)
    grads = gradients(found.logits, [*w.values()])
    torch.testing.assert_close(grads, gradients(expected, [*w.values()]), **CLOSE)
    assert not any(name.startswith("router") for name in w)


@pytest.mark.parametrize("pool", ["mean", "class_token"])
def test_one_expert_is_the_naive_model(pool):
    args = tiny_args(num_experts=1, pool=pool)
    model, images = build(args), random_images(args, batch=2)
    expected, _ = naive_forward(model, images)
    torch.testing.assert_close(model(images).logits, expected, **CLOSE)


@pytest.mark.parametrize("pool", ["mean", "class_token"])
def test_at_full_capacity_a_nested_model_is_the_plain_vit_of_its_weights(pool):
    args = tiny_args(capacity=1.0, pool=pool)
    model = with_alpha(build(args), 0)
    assert args.budget().tokens == (0, 0, 16)
    images = random_images(args)
    dense = MoNE(tiny_args(num_experts=1, pool=pool)).double()
    missing = dense.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    torch.testing.assert_close(model(images).logits, dense(images).logits, **CLOSE)
    w = dict(model.named_parameters())
    torch.testing.assert_close(model(images).logits, dense_vit(w, images, args), **CLOSE)


@pytest.mark.parametrize("expert", [0, 1, 2])
def test_all_tokens_at_one_expert_is_the_plain_vit_of_its_slices(expert):
    args = tiny_args()
    model, images = with_alpha(build(args), 0), random_images(args)
    budget = Budget(tuple(16 * (number == expert) for number in range(3)))
    d = width(expert, args.dim, 3)
    w = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in w.items():
        if name.endswith(("wqkv.weight", "w1.weight")):
            parameter[:, d:] = 0
        elif name.endswith(("wo.weight", "wo.bias", "w2.weight", "w2.bias")):
            parameter[d:] = 0
    expected = dense_vit(w, images, args)
    torch.testing.assert_close(model(images, budget).logits, expected, **CLOSE)
    if expert < 2:
        assert not torch.allclose(model(images, Budget((0, 0, 16))).logits, expected)


NESTED = {
    "one router": {},
    "four experts": {"num_experts": 4, "capacity": 0.4},
    "two experts": {"num_experts": 2},
    "class token": {"pool": "class_token"},
    "router after a block": {"n_layers": 3, "router_layer": 1},
    "two routers": {"n_layers": 3, "num_routers": 2},
    "shared router": {"n_layers": 3, "num_routers": 2, "shared_router": True},
    "router in each block": {"n_layers": 3, "num_routers": 3, "pool": "class_token"},
    "late routers": {"n_layers": 4, "router_layer": 1, "num_routers": 2, "alpha_per_layer": True},
    "alpha of each layer": {"alpha_per_layer": True},
    "argmax": {"routing": "argmax"},
    "argmax, two routers": {"routing": "argmax", "num_routers": 2, "pool": "class_token"},
    "skipping": {"allocation": "skip"},
    "skipping, class token": {"allocation": "skip", "pool": "class_token", "num_routers": 2},
    "skipping, few": {"allocation": "skip", "capacity": 0.07, "pool": "class_token"},
    "greedy": {"allocation": "greedy"},
    "multiple": {"tokens_multiple": 4},
}


@pytest.mark.parametrize("fields", NESTED.values(), ids=NESTED)
def test_permuting_once_is_gathering_in_each_layer(fields):
    args = tiny_args(**fields)
    model, images = build(args), random_images(args, batch=2)
    output = model(images)
    expected, choices = naive_forward(model, images, args.budget().tokens)
    torch.testing.assert_close(output.logits, expected, **CLOSE)
    parameters = [*model.parameters()]
    torch.testing.assert_close(
        gradients(output.logits, parameters), gradients(expected, parameters), rtol=1e-8, atol=1e-9
    )
    seq = args.seq_len
    loads = [
        [sum(row.count(expert) for row in rows) / (2 * seq) for expert in range(args.num_experts)]
        for rows in zip(*choices, strict=True)
    ]
    torch.testing.assert_close(output.router.load, torch.tensor(loads))
    assert output.router.probabilities.shape == (args.num_routers, args.num_experts)
    assert output.router.entropy.shape == (args.num_routers,)
    assert not any(value.requires_grad for value in output.router)
    # The test tells routers apart, and tokens of an image.
    assert all(len(set(row)) > 1 for rows in choices for row in rows)


def test_routers_see_tokens_as_they_are_by_then():
    args = tiny_args(n_layers=3, num_routers=3, shared_router=True)
    model, images = build(args), random_images(args, batch=2)
    _, choices = naive_forward(model, images, args.budget().tokens)
    assert all(first != second for first, second, _ in choices)
    assert len([name for name in model.state_dict() if name.startswith("routers.")]) == 2


SCORED = [
    {"routing": "random"},
    {},
    {"pool": "class_token"},
    {"num_routers": 2, "n_layers": 2},
    {"num_routers": 2, "n_layers": 3, "router_layer": 1, "pool": "class_token"},
]


@pytest.mark.parametrize("fields", SCORED, ids=str)
def test_scores_say_who_is_chosen(fields):
    args = tiny_args(**fields)
    model, images = build(args), random_images(args)
    scores = randn(3, args.num_routers, 16, 3, seed=4).float()
    expected, _ = naive_forward(model, images, args.budget().tokens, scores)
    torch.testing.assert_close(model(images, scores=scores).logits, expected, **CLOSE)
    plain, _ = naive_forward(model, images, args.budget().tokens)
    assert not torch.allclose(plain, expected)


def test_random_routing_draws_anew_and_keeps_the_budget():
    args = tiny_args(routing="random")
    model, images = build(args), random_images(args)
    torch.manual_seed(0)
    first, second = model(images), model(images)
    assert not torch.equal(first.logits, second.logits)
    torch.manual_seed(0)
    assert torch.equal(model(images).logits, first.logits)
    expected = torch.tensor([args.budget().tokens]) / 16
    for output in (first, second):
        torch.testing.assert_close(output.router.load, expected)


def test_without_alpha_a_router_changes_nothing_but_who_is_chosen():
    args = tiny_args(num_classes=7)
    model, images = with_alpha(build(args), 0), random_images(args)
    scores = randn(3, 1, 16, 3)
    logits = model(images, scores=scores).logits
    router = [*model.routers["0"].parameters()]
    grads = gradients(logits, [*router, model.router_scale.alpha])
    assert not grads[0].any() and not grads[1].any()
    assert grads[2].all()
    with torch.no_grad():
        for parameter in router:
            parameter.add_(randn(*parameter.shape))
    assert torch.equal(model(images, scores=scores).logits, logits)


def test_with_alpha_a_router_learns():
    args = tiny_args()
    model, images = with_alpha(build(args), 0.1), random_images(args)
    for gradient in gradients(model(images).logits, [*model.routers["0"].parameters()]):
        assert gradient.any()
    scores = randn(3, 1, 16, 3)
    before = model(images, scores=scores).logits
    with torch.no_grad():
        model.routers["0"].bias[0] += 1
    assert not torch.allclose(model(images, scores=scores).logits, before)


def test_each_block_has_its_own_alpha():
    args = tiny_args(n_layers=3, alpha_per_layer=True)
    model, images = build(args), random_images(args)
    assert model.router_scale.alpha.shape == (3,)
    (gradient,) = gradients(model(images).logits, [model.router_scale.alpha])
    assert gradient.all()
    # Blocks in front of the first router have one, which nothing uses.
    late = build(tiny_args(n_layers=3, alpha_per_layer=True, router_layer=1))
    (gradient,) = gradients(late(images).logits, [late.router_scale.alpha])
    assert gradient[0] == 0 and gradient[1:].all()


@pytest.mark.parametrize("capacity", [0.25, 0.4, 0.8, 1.0])
def test_the_capacity_may_be_another_than_in_training(capacity):
    args = tiny_args()
    model, images = build(args), random_images(args, batch=2)
    budget = args.budget(capacity)
    expected, _ = naive_forward(model, images, budget.tokens)
    torch.testing.assert_close(model(images, budget).logits, expected, **CLOSE)
    other = MoNE(tiny_args(capacity=capacity)).double()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images).logits, model(images, budget).logits)


def test_any_budget_of_the_images_tokens_will_do():
    args = tiny_args()
    model, images = build(args), random_images(args, batch=2)
    for budget in (Budget((0, 16, 0)), Budget((1, 15, 0)), Budget((3, 2, 4), 7)):
        expected, _ = naive_forward(model, images, budget.tokens)
        torch.testing.assert_close(model(images, budget).logits, expected, **CLOSE)


@pytest.mark.parametrize("budget", [Budget((5, 5, 5)), Budget((8, 8)), Budget((4, 4, 4, 4))])
def test_budgets_of_another_model_are_refused(budget):
    args = tiny_args()
    with pytest.raises(ValueError, match=r"budget = Budget.*3 experts and 16 tokens"):
        build(args)(random_images(args), budget)


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (3, 1, 8, 8), (3, 3, 16, 16), (3, 8, 8)], ids=str)
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        build(tiny_args())(torch.zeros(shape))


@pytest.mark.parametrize("fields", [{}, {"num_routers": 2, "pool": "class_token"}], ids=str)
def test_images_are_classified_one_by_one(fields):
    args = tiny_args(**fields)
    model, images = build(args), random_images(args, batch=5)
    logits = model(images).logits
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(model(images[order]).logits, logits[order], **CLOSE)
    for number in range(5):
        torch.testing.assert_close(model(images[number : number + 1]).logits[0], logits[number])


def test_the_class_token_is_with_the_largest_expert():
    args = tiny_args(pool="class_token", capacity=0.25)
    model, images = build(args), random_images(args)
    assert args.budget().tokens == (16, 0, 0)
    # Of 17 tokens one is large, and it alone has last channels: its logits depend on them.
    (gradient,) = gradients(model(images).logits, [model.layers["1"].feed_forward.w2.bias])
    assert gradient.all()
    torch.testing.assert_close(model(images).router.load, torch.tensor([[16 / 17, 0, 1 / 17]]))


def test_float32_images_enter_a_model_of_float64():
    args = tiny_args()
    images = random_images(args, dtype=torch.float32)
    assert torch.equal(build(args)(images).logits, build(args)(images.double()).logits)


def test_autocast_is_close_to_float32():
    args = tiny_args()
    model, images = build(args, torch.float32), random_images(args, dtype=torch.float32)
    scores = randn(3, 1, 16, 3).float()
    exact = model(images, scores=scores).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images, scores=scores).logits
    assert (found - exact).norm() / exact.norm() < 0.05


@cache
def reference():
    args = tiny_args(n_layers=4)
    return args, build(args)(random_images(args)).logits


@pytest.mark.parametrize(
    "fields",
    [
        {"capacity": 0.4},
        {"allocation": "greedy"},
        {"allocation": "skip"},
        {"delta": 4.0, "beta": 1.0},
        {"incentive": "divisive", "beta": 0.5},
        {"routing": "argmax"},
        {"router_layer": 1},
        {"num_routers": 2},
        {"num_routers": 2, "shared_router": True},
        {"alpha_init": 0.9},
        {"tokens_multiple": 3},
        {"pool": "class_token"},
        {"norm_eps": 1e-2},
        {"head_bias": 1.0},
        {"init_seed": 1},
        {"mlp_ratio": 3.0},
    ],
    ids=str,
)
def test_each_field_changes_something(fields):
    _, expected = reference()
    args = tiny_args(n_layers=4, **fields)
    assert not torch.allclose(build(args)(random_images(args)).logits, expected)


def test_the_state_dict_is_that_of_the_contract():
    args = tiny_args(pool="class_token", num_routers=2, alpha_per_layer=True)
    shapes = {name: tuple(value.shape) for name, value in MoNE(args).state_dict().items()}
    expected = {
        "embedder.proj.weight": (16, 12),
        "embedder.proj.bias": (16,),
        "embedder.positions": (17, 16),
        "embedder.class_token": (16,),
        "router_scale.alpha": (2,),
        "norm.weight": (16,),
        "norm.bias": (16,),
        "head.weight": (5, 16),
        "head.bias": (5,),
    }
    for i in range(2):
        expected |= {f"routers.{i}.weight": (3, 16), f"routers.{i}.bias": (3,)}
        for name in ("attention_norm.weight", "attention_norm.bias"):
            expected |= {f"layers.{i}.{name}": (16,)}
        for name in ("ffn_norm.weight", "ffn_norm.bias", "attention.wo.bias"):
            expected |= {f"layers.{i}.{name}": (16,)}
        expected |= {
            f"layers.{i}.attention.wqkv.weight": (48, 16),
            f"layers.{i}.attention.wqkv.bias": (48,),
            f"layers.{i}.attention.wo.weight": (16, 16),
            f"layers.{i}.feed_forward.w1.weight": (32, 16),
            f"layers.{i}.feed_forward.w1.bias": (32,),
            f"layers.{i}.feed_forward.w2.weight": (16, 32),
            f"layers.{i}.feed_forward.w2.bias": (16,),
        }
    assert shapes == expected
