"""The mixture against its experts run by hand, and the equalities that must hold."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.models.mixdiff.helpers import make_batch, make_model
from torchtitan_mixtures.models.mixdiff import MixtureOfDiffusers
from torchtitan_mixtures.models.mixdiff.args import flavor_args
from torchtitan_mixtures.objectives.patches import patchify, unpatchify

FLAVORS = ("debugmodel", "debugmodel_mmdit")


def run_by_hand(model, latents, times, condition, gates):
    """Every expert on every sample, and a weighted sum."""
    args, total = model.model_args, 0
    for number, expert in enumerate(model.experts.values()):
        prediction = expert(latents, times, **condition).prediction
        own = args.expert_args[number].patch_size
        images = unpatchify(prediction, own, args.out_channels, args.image_size)
        total = total + gates[:, number, None, None, None] * images
    return patchify(total, args.patch_size)


def reference_gates(model, latents, times, condition):
    """Probabilities, without those of experts that are not among the `top_k` largest."""
    args = model.model_args
    probabilities = model.router(latents, times, **condition).softmax(1)
    smallest = probabilities.topk(args.top_k, 1).values[:, -1:]
    kept = probabilities * (probabilities >= smallest)
    return kept / kept.sum(1, keepdim=True) if args.renormalize else kept


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("flavor", FLAVORS)
def test_outputs_and_all_gradients_are_those_of_the_sum_by_hand(flavor, top_k, renormalize):
    model = make_model(flavor, top_k=top_k, renormalize=renormalize)
    latents, times, condition = make_batch(model.model_args)
    other = copy.deepcopy(model)
    output = model(latents, times, **condition)
    gates = reference_gates(other, latents, times, condition)
    expected = run_by_hand(other, latents, times, condition, gates)
    torch.testing.assert_close(output.gates, gates)
    torch.testing.assert_close(output.prediction, expected)
    for prediction in (output.prediction, expected):
        prediction.square().sum().backward()
    for (name, found), wanted in zip(model.named_parameters(), other.parameters(), strict=True):
        assert found.grad is not None, name
        gradient = torch.zeros_like(found) if wanted.grad is None else wanted.grad
        torch.testing.assert_close(found.grad, gradient, msg=name)


@pytest.mark.parametrize("inputs", [("prompt",), ("latent",), ("time",), ("latent", "time"), None])
@pytest.mark.parametrize("kind", ["linear", "mlp", "transformer"])
@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_router_reads_its_inputs_and_no_others(flavor, kind, inputs):
    inputs = inputs or ("prompt", "latent", "time")
    model = make_model(flavor, router=kind, router_inputs=inputs)
    latents, times, condition = make_batch(model.model_args)
    if flavor == "debugmodel":
        changed = {"class_labels": (condition["class_labels"] + 1) % 24}
    else:
        ids = condition["prompts"]["text"].flip(0)
        changed = {"prompts": {"text": ids}, "kept": torch.ones_like(condition["kept"])}
    before = model.router(latents, times, **condition)
    others = {
        "prompt": model.router(latents, times, **changed),
        "latent": model.router(latents.flip(0), times, **condition),
        "time": model.router(latents, times.flip(0), **condition),
    }
    for name, logits in others.items():
        assert torch.equal(logits, before) == (name not in inputs), name


@pytest.mark.parametrize("flavor", FLAVORS)
def test_one_expert_is_the_plain_model_bit_for_bit(flavor):
    experts = {"debugmodel": "mom/debugmodel_dit", "debugmodel_mmdit": "mmdit/debugmodel"}[flavor]
    model = make_model(flavor, experts=(experts,), top_k=1, dtype=torch.float32)
    latents, times, condition = make_batch(model.model_args, dtype=torch.float32)
    (expert,) = model.experts.values()
    plain, output = (m(latents, times, **condition).prediction for m in (expert, model))
    assert torch.equal(output, plain)


def test_the_only_chosen_expert_is_run_alone_bit_for_bit():
    model = make_model(top_k=1, dtype=torch.float32)
    latents, times, condition = make_batch(model.model_args, batch=1, dtype=torch.float32)
    output = model(latents, times, **condition)
    expert = model.experts[str(int(output.gates.argmax()))]
    assert torch.equal(output.prediction, expert(latents, times, **condition).prediction)


def test_experts_that_are_alike_make_weights_irrelevant():
    model = make_model(top_k=2)
    first, *others = model.experts.values()
    for other in others:
        other.load_state_dict(first.state_dict())
    latents, times, condition = make_batch(model.model_args)
    torch.testing.assert_close(
        model(latents, times, **condition).prediction, first(latents, times, **condition).prediction
    )


def test_the_order_of_experts_does_not_matter():
    model = make_model(dtype=torch.float32)
    latents, times, condition = make_batch(model.model_args, dtype=torch.float32)
    other = copy.deepcopy(model)
    order = [2, 0, 1]
    for place, source in enumerate(order):
        other.experts[str(place)] = model.experts[str(source)]
    for name in ("weight", "bias"):
        getattr(other.router.head, name).data = getattr(model.router.head, name).data[order]
    found, expected = (m(latents, times, **condition) for m in (other, model))
    torch.testing.assert_close(found.gates, expected.gates[:, order])
    torch.testing.assert_close(found.prediction, expected.prediction)


def test_all_experts_chosen_is_the_dense_mixture():
    model = make_model(top_k=3)
    latents, times, condition = make_batch(model.model_args)
    probabilities = model.router(latents, times, **condition).softmax(1)
    expected = run_by_hand(model, latents, times, condition, probabilities)
    torch.testing.assert_close(model(latents, times, **condition).prediction, expected)


def test_an_expert_more_that_is_never_likely_changes_nothing():
    model = make_model(dtype=torch.float32)
    larger = make_model(experts=("mom/debugmodel_dit",) * 4, dtype=torch.float32)
    state = model.state_dict()
    for name in ("weight", "bias"):
        row = torch.full_like(state[f"router.head.{name}"][:1], 0.0 if name == "weight" else -1e4)
        state[f"router.head.{name}"] = torch.cat([state[f"router.head.{name}"], row])
    assert larger.load_state_dict(state, strict=False).unexpected_keys == []
    latents, times, condition = make_batch(model.model_args, dtype=torch.float32)
    found, expected = (m(latents, times, **condition) for m in (larger, model))
    assert not found.gates[:, 3].any()
    # The product that makes four logits instead of three may round in another way.
    torch.testing.assert_close(found.gates[:, :3], expected.gates)
    torch.testing.assert_close(found.prediction, expected.prediction)
    gates = F.pad(expected.gates, (0, 1))
    same = larger(latents, times, **condition, gates=gates).prediction
    assert torch.equal(same, expected.prediction)


def test_a_domain_is_the_business_of_its_expert_alone():
    model = make_model()
    latents, times, condition = make_batch(model.model_args)
    domains = torch.tensor([0, 0, 2, 0, 2, 2])
    output = model(latents, times, **condition, domain_labels=domains)
    output.prediction.square().sum().backward()
    for sample, domain in enumerate(domains.tolist()):
        own = {"class_labels": condition["class_labels"][sample : sample + 1]}
        alone = model.experts[str(domain)](latents[[sample]], times[[sample]], **own)
        torch.testing.assert_close(output.prediction[[sample]], alone.prediction)
    assert all(not p.grad.any() for p in model.experts["1"].parameters())
    assert output.router is None and output.router_logits is not None
    assert all(p.grad is None for p in model.router.parameters())


def test_guidance_commutes_with_mixing_when_weights_are_shared_and_not_otherwise():
    model = make_model()
    args = model.model_args
    latents, times, condition = make_batch(args)
    labels = condition["class_labels"]
    null = torch.full_like(labels, args.num_classes)
    twice = latents.repeat(2, 1, 1, 1), times.repeat(2)
    both = model(*twice, class_labels=torch.cat([labels, null]), copies=2)
    given, without = both.prediction.chunk(2)
    mixed_then_guided = without + 3.0 * (given - without)
    gates = both.gates[: len(labels)]
    assert torch.equal(both.gates[len(labels) :], gates)

    def guided(expert):
        told, untold = (expert(latents, times, class_labels=c).prediction for c in (labels, null))
        return untold + 3.0 * (told - untold)

    guided_then_mixed = sum(
        gates[:, number, None, None] * guided(expert)
        for number, expert in enumerate(model.experts.values())
    )
    torch.testing.assert_close(mixed_then_guided, guided_then_mixed)
    own = model(*twice, class_labels=torch.cat([labels, null]))
    given, without = own.prediction.chunk(2)
    assert not torch.allclose(without + 3.0 * (given - without), guided_then_mixed)


def test_weights_that_are_given_take_the_place_of_the_routers():
    model = make_model()
    latents, times, condition = make_batch(model.model_args)
    first = model(latents, times, **condition)
    model.router = None
    again = model(latents, times, **condition, gates=first.gates)
    torch.testing.assert_close(again.prediction, first.prediction)
    assert again.router_logits is None


def test_experts_with_other_widths_and_patches_are_summed_as_images():
    experts = ("mom/debugmodel_dit", "mom/DiT-S/8", "mom/DiT-S/2")
    model = make_model(experts=experts, top_k=2)
    for expert in list(model.experts.values())[1:]:
        for layer in list(expert.layers)[2:]:
            del expert.layers[layer]  # deep enough
    latents, times, condition = make_batch(model.model_args, batch=3)
    output = model(latents, times, **condition)
    expected = run_by_hand(model, latents, times, condition, output.gates)
    torch.testing.assert_close(output.prediction, expected)
    assert output.prediction.shape == (3, 64, 16 * 6)


def test_experts_begin_differently_and_the_router_undecided():
    args = make_model().model_args
    model = MixtureOfDiffusers(args)
    model.init_weights()
    first, second, _ = (expert.x_embedder.weight for expert in model.experts.values())
    assert not torch.equal(first, second)
    again = MixtureOfDiffusers(args)
    again.init_weights()
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    latents, times, condition = make_batch(args, batch=200, dtype=torch.float32)
    probabilities = model.router(latents, times, **condition).softmax(1)
    assert (probabilities - 1 / 3).abs().max() < 0.2


def test_the_router_stays_in_float32():
    model = make_model(dtype=torch.float32)
    model.experts.to(torch.bfloat16)
    latents, times, condition = make_batch(model.model_args, dtype=torch.float32)
    expected = model.router(latents, times, **condition)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(latents, times, **condition)
    assert output.router_logits.dtype == output.prediction.dtype == torch.float32
    assert torch.equal(output.router_logits, expected)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        built = MixtureOfDiffusers(model.model_args)
    finally:
        torch.set_default_dtype(before)
    assert {p.dtype for p in built.router.parameters()} == {torch.float32}
    assert {p.dtype for p in built.experts.parameters()} == {torch.bfloat16}


def count_flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_that_are_not_chosen_cost_nothing(top_k):
    model = make_model(top_k=top_k, dtype=torch.float32, router_inputs=("prompt",))
    args, batch = model.model_args, 4
    latents, times, condition = make_batch(args, batch=batch, dtype=torch.float32)
    condition["class_labels"][:] = 5  # all have the same experts
    with torch.no_grad():
        used = model(latents, times, **condition).gates.bool().any(0).tolist()
        assert sum(used) == top_k
        ran = []
        for number, expert in enumerate(model.experts.values()):
            expert.register_forward_hook(lambda *_, number=number: ran.append(number))
        total = count_flops(lambda: model(latents, times, **condition))
        assert ran == [number for number, is_used in enumerate(used) if is_used]
        router = count_flops(lambda: model.router(latents, times, **condition))
        one = count_flops(lambda: model.experts["0"](latents, times, **condition))
    assert total - router == top_k * one
    # The counter does not know attention's fused kernel of CPUs.
    attention = top_k * 4 * 2 * 64**2 * 128  # layers, two products, tokens, width
    attention += 2 * 2 * 2**2 * 64  # and of the router
    assert total / 2 == batch * (args.macs_per_image() - attention)


def test_in_training_an_expert_without_samples_gets_one():
    model = make_model(top_k=1, router_inputs=("prompt",))
    latents, times, condition = make_batch(model.model_args)
    condition["class_labels"][:] = 5
    rows = []
    for expert in model.experts.values():
        expert.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    model(latents, times, **condition)
    assert sorted(rows) == [1, 1, 6]
    rows.clear()
    model.least_rows = 2
    model(latents, times, **condition)
    assert sorted(rows) == [2, 2, 6]


def test_a_router_alone_has_no_experts():
    model = make_model(router_only=True)
    assert all(name.startswith("router.") for name in model.state_dict())
    latents, times, condition = make_batch(model.model_args)
    output = model(latents, times, **condition)
    assert output.prediction.numel() == 0 and output.router_logits.shape == (6, 3)


def test_flavours_have_experts_of_their_families():
    args = make_model().model_args
    assert flavor_args("mom/DiT-XL/2").dim == 1152
    assert [family for family, _ in args.parts] == ["mom"] * 3
