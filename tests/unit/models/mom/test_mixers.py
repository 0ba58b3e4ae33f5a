import math

import pytest
import torch

from tests.unit.models.mom.helpers import build_mixture, gelu, naive_mixture, random_tokens
from torchtitan_mixtures.models.mom.mixers import ChannelMixers, MixtureOfMixers, TokenMixers


def force(mixture: MixtureOfMixers, experts: list[list[int]]) -> None:
    """Let a mixture choose given experts; those of known kind must be where the router has them."""
    mixture.router.choose = lambda logits: torch.tensor(experts)


def worked_layer() -> tuple[MixtureOfMixers, torch.Tensor]:
    mixture = MixtureOfMixers(2, 2, 1, 1, token_hidden_dim=2, channel_hidden_dim=2).double()
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.zero_()
        mixture.router.weight[0, 0] = math.log(3) / 2
        mixture.token_mixers.w1[0] = torch.eye(2)
        mixture.token_mixers.w2[0] = torch.eye(2).flip(0)
        mixture.channel_mixers.w1[0] = torch.eye(2)
        mixture.channel_mixers.w2[0] = 2 * torch.eye(2)
    return mixture, torch.tensor([[[1.0, 2.0], [3.0, -1.0]]], dtype=torch.float64)


def test_worked_layer_of_the_specification():
    mixture, x = worked_layer()
    routing = mixture.router(x)
    statistics = routing.statistics
    assert mixture.router.pool(x).tolist() == [[2.0, 0.5]]
    assert statistics.probabilities.tolist() == pytest.approx([0.75, 0.25])
    assert statistics.load.tolist() == [0.5, 0.5]  # of both choices
    expected = {
        "token": [[2.996363, -0.158808], [0.841192, 1.954598]],
        "channel": [[1.682384, 3.909195], [5.992725, -0.317616]],
        "both": [[2.667868, 0.858193], [2.129075, 1.386544]],
    }
    outputs = {
        "token": mixture.token_mixers(x, routing) / 0.75,
        "channel": mixture.channel_mixers(x, routing) / 0.25,
        "both": mixture(x)[0],
    }
    for name, values in expected.items():
        torch.testing.assert_close(outputs[name][0].float(), torch.tensor(values), msg=name)


CASES = {
    "typed": ((4, 4, 2), (1, 1)),
    "typed and one more": ((3, 2, 3), (1, 1)),
    "at least one token mixer": ((4, 4, 2), (1, 0)),
    "free": ((4, 4, 2), (0, 0)),
    "free, three of three and two": ((3, 2, 3), (0, 0)),
    "one of all": ((3, 3, 1), (0, 0)),
    "token mixers only": ((4, 0, 2), (1, 0)),
    "channel mixers only": ((0, 4, 2), (0, 0)),
    "all": ((2, 2, 4), (1, 2)),
}


def compare(mixture, x, top_k, least, experts=None, tolerance=1e-12):
    """Outputs and all gradients of a mixture and of a naive one."""
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    results = []
    for is_naive in (False, True):
        mixture.zero_grad()
        inputs = x.clone().requires_grad_()
        if is_naive:
            weights = {name: p.double() for name, p in mixture.named_parameters()}
            out, p, _, logs = naive_mixture(weights, inputs.double(), top_k, least, experts=experts)
            p, z = p.mean(0), logs.square().mean()
        else:
            out, statistics = mixture(inputs)
            p, z = statistics.probabilities, statistics.z
        (((out - target.to(out)) ** 2).sum() + (p**2).sum() + z).backward()
        if is_naive:  # a loop does not touch what nobody chose
            for weight in mixture.parameters():
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        grads = {name: w.grad.clone().double() for name, w in mixture.named_parameters()}
        results.append([out.detach().double(), inputs.grad.double(), grads])
    (out, grad, grads), (expected, expected_grad, expected_grads) = results
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad, expected_grad, rtol=10 * tolerance, atol=10 * tolerance)
    for name, value in grads.items():
        scale = expected_grads[name].abs().max().item() + 1
        torch.testing.assert_close(
            value, expected_grads[name], rtol=10 * tolerance, atol=10 * tolerance * scale, msg=name
        )
    return grads


@pytest.mark.parametrize("case", CASES)
def test_equals_a_loop_over_samples_with_every_gradient(case):
    (token, channel, top_k), least = CASES[case]
    fields = {"min_token_experts": least[0], "min_channel_experts": least[1]}
    mixture = build_mixture(32, 16, token, channel, top_k, **fields)
    compare(mixture, random_tokens(12), top_k, least)


@pytest.mark.parametrize(
    ("experts", "empty"),
    [
        ([[0, 4]] * 6, {"token": [1, 2, 3], "channel": [1, 2, 3]}),  # all samples on one expert
        ([[3, 4]] * 3 + [[1, 7]] * 3, {"token": [0, 2], "channel": [1, 2]}),
        ([[0, 5], [1, 6], [2, 7], [3, 4], [0, 6], [2, 5]], {"token": [], "channel": []}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_experts_without_samples_have_gradients_of_exactly_zero(dtype, experts, empty):
    mixture = build_mixture(32, 16, dtype=dtype)
    force(mixture, experts)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    grads = compare(mixture, random_tokens().to(dtype), 2, (1, 1), experts, tolerance)
    for kind, numbers in empty.items():
        for name in ("w1", "b1", "w2", "b2"):
            grad = grads[f"{kind}_mixers.{name}"]
            for expert in range(4):
                assert bool(grad[expert].any()) == (expert not in numbers), f"{kind} {name}"


@pytest.mark.parametrize(
    "experts",
    [
        [[0, 1]] * 6,  # no channel mixer at all
        [[5, 4]] * 6,  # no token mixer at all
        [[0, 1], [4, 5], [7, 0], [3, 6], [2, 1], [6, 7]],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_free_choices_may_leave_out_a_kind(dtype, experts):
    fields = {"min_token_experts": 0, "min_channel_experts": 0}
    mixture = build_mixture(32, 16, dtype=dtype, **fields)
    force(mixture, experts)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    grads = compare(mixture, random_tokens().to(dtype), 2, (0, 0), experts, tolerance)
    chosen = {expert for pair in experts for expert in pair}
    for expert in range(8):
        kind = "token" if expert < 4 else "channel"
        for name in ("w1", "b1", "w2", "b2"):
            assert bool(grads[f"{kind}_mixers.{name}"][expert % 4].any()) == (expert in chosen)


def test_bfloat16_is_close_and_weights_stay_exact_in_the_router():
    mixture, exact = build_mixture(32, 16, dtype=torch.bfloat16), build_mixture(32, 16)
    exact.load_state_dict(mixture.state_dict())
    x = random_tokens().bfloat16()
    (out, statistics), (expected, reference) = mixture(x), exact(x.double())
    assert out.dtype == torch.bfloat16 and statistics.probabilities.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.1)
    torch.testing.assert_close(statistics.probabilities.double(), reference.probabilities)


def test_one_token_mixer_is_a_layer_of_mlp_mixer():
    mixture = build_mixture(
        32, 16, 1, 0, 1, min_token_experts=1, min_channel_experts=0, token_hidden_dim=8
    )
    x = random_tokens()
    weights = mixture.token_mixers
    hidden = gelu(torch.einsum("bnd,hn->bhd", x, weights.w1[0]) + weights.b1[0][:, None])
    expected = torch.einsum("bhd,nh->bnd", hidden, weights.w2[0]) + weights.b2[0][:, None]
    torch.testing.assert_close(mixture(x)[0], expected)


def test_one_channel_mixer_is_a_feed_forward_network():
    mixture = build_mixture(32, 16, 0, 1, 1, min_token_experts=0)
    x, weights = random_tokens(), mixture.channel_mixers
    hidden = gelu(x @ weights.w1[0].t() + weights.b1[0])
    torch.testing.assert_close(mixture(x)[0], hidden @ weights.w2[0].t() + weights.b2[0])


def test_channel_mixers_on_tokens_of_their_own_are_a_mixture_of_experts():
    fields = {"min_token_experts": 0, "min_channel_experts": 0, "channel_hidden_dim": 24}
    mixture = build_mixture(32, 1, 0, 4, 2, **fields)
    x = random_tokens(3, 5)

    def moe(token, gate_input):  # token-choice top-2, one token at a time
        p = (mixture.router.weight @ gate_input).softmax(0)
        best = p.topk(2).indices.tolist()
        out = 0
        for e in best:
            w1, b1, w2, b2 = (
                getattr(mixture.channel_mixers, n)[e] for n in ("w1", "b1", "w2", "b2")
            )
            out = out + p[e] / sum(p[i] for i in best) * (w2 @ gelu(w1 @ token + b1) + b2)
        return out

    per_token = mixture(x.view(15, 1, 32))[0].view(3, 5, 32)
    expected = torch.stack([torch.stack([moe(t, t) for t in sample]) for sample in x])
    torch.testing.assert_close(per_token, expected)
    expected = torch.stack([torch.stack([moe(t, s.mean(0)) for t in s]) for s in x])
    torch.testing.assert_close(mixture(x)[0], expected)


@pytest.mark.parametrize("least", [(1, 1), (0, 0)])
def test_equal_experts_make_routing_irrelevant(least):
    fields = {"min_token_experts": least[0], "min_channel_experts": least[1]}
    mixture = build_mixture(32, 16, **fields)
    with torch.no_grad():
        for mixers in (mixture.token_mixers, mixture.channel_mixers):
            for parameter in mixers.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))
        for name in ("w2", "b2"):  # the kinds differ, unless they are silent
            getattr(mixture.token_mixers, name).zero_()
    x = random_tokens()
    out = []
    for shift in range(4):
        force(mixture, [[shift, 4 + (shift + b) % 4] for b in range(6)])
        mixture.router.weight.data.zero_()
        out.append(mixture(x)[0])
    for other in out[1:]:
        torch.testing.assert_close(other, out[0])


def test_permuting_tokens_and_token_weights_alike_permutes_the_output():
    mixture, x = build_mixture(32, 16), random_tokens()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    expected = mixture(x)[0][:, order]
    with torch.no_grad():
        mixers = mixture.token_mixers
        mixers.w1.copy_(mixers.w1[:, :, order])
        mixers.w2.copy_(mixers.w2[:, order])
        mixers.b2.copy_(mixers.b2[:, order])
    torch.testing.assert_close(mixture(x[:, order])[0], expected)


def test_samples_do_not_depend_on_their_batch():
    mixture, x = build_mixture(32, 16), random_tokens()
    whole = mixture(x)[0]
    for sample, expected in zip(x, whole, strict=True):
        torch.testing.assert_close(mixture(sample[None])[0][0], expected)


def test_mixers_work_on_parts_of_their_rows():
    mixture, x = build_mixture(32, 16), random_tokens()
    routing = mixture.router(x)
    parts = [mixture.token_mixers(part, routing) for part in x.split([8, 24], 2)]
    torch.testing.assert_close(torch.cat(parts, 2), mixture.token_mixers(x, routing))
    parts = [mixture.channel_mixers(part, routing) for part in x.split([3, 13], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), mixture.channel_mixers(x, routing))


def test_parameters_can_be_handed_out_in_parts():
    mixture, x = build_mixture(32, 16), random_tokens()
    routing, whole = mixture.router(x), mixture.channel_mixers
    expected = whole(x, routing)

    class Part(ChannelMixers):
        def parameters_of_experts(self):
            units = slice(64 * self.rank, 64 * self.rank + 64)  # half of the hidden units
            bias = self.b2 if self.rank == 0 else torch.zeros_like(self.b2)
            return self.w1[:, units], self.b1[:, units], self.w2[:, :, units], bias

    parts = []
    for rank in range(2):
        part = Part(4, 32, 128).double()
        part.rank = rank
        part.load_state_dict(whole.state_dict())
        parts.append(part(x, routing))
    torch.testing.assert_close(parts[0] + parts[1], expected)


def test_public_names_are_those_of_the_original():
    mixture = MixtureOfMixers(hidden_size=32, num_tokens=16)
    assert type(mixture.token_mixers) is TokenMixers
    assert type(mixture.channel_mixers) is ChannelMixers
    shapes = {name: tuple(p.shape) for name, p in mixture.named_parameters()}
    assert shapes == {
        "router.weight": (8, 32),
        "token_mixers.w1": (4, 64, 16),
        "token_mixers.b1": (4, 64),
        "token_mixers.w2": (4, 16, 64),
        "token_mixers.b2": (4, 16),
        "channel_mixers.w1": (4, 128, 32),
        "channel_mixers.b1": (4, 128),
        "channel_mixers.w2": (4, 32, 128),
        "channel_mixers.b2": (4, 32),
    }
