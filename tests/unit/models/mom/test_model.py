import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.models.mom.helpers import build, naive_forward, random_inputs, tiny_args
from torchtitan_mixtures.models.common.dit import DiTBlock
from torchtitan_mixtures.models.common.modulation import modulate
from torchtitan_mixtures.models.mom import mom_args
from torchtitan_mixtures.models.mom.model import MoM, MoMBlock
from torchtitan_mixtures.objectives.ddpm import DDPM
from torchtitan_mixtures.objectives.patches import patchify

DIT = {"mixer": "attention"}
FREE = {"min_token_experts": 0, "min_channel_experts": 0}


def gradients(model, *inputs):
    model.zero_grad()
    output = model(*inputs)
    loss = output.prediction.square().mean()
    if output.router is not None:
        loss = loss + output.router.probabilities.square().sum() + output.router.z.sum()
    loss.backward()
    return output.prediction.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_equals_a_naive_model():
    args = tiny_args(image_size=8, patch_size=2, in_channels=2)
    model, inputs = build(args), random_inputs(args, batch=3)
    with torch.no_grad():
        ours, theirs = model(*inputs).prediction, naive_forward(model, *inputs)
    assert ours.shape == (3, 16, 2 * 2 * 4)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # the position table is float32


@pytest.mark.parametrize("fields", [{}, FREE, DIT])
def test_prediction_is_zero_at_first_and_the_loss_about_one(fields):
    args = tiny_args(**fields)
    model = MoM(args)
    model.init_weights()
    clean = torch.full((2, 3, 16, 16), 0.5)
    noise = torch.ones(2, 3, 16, 16)
    process = DDPM(num_steps=1000, schedule="linear", learned_variance=True, channels=3)
    times = torch.tensor([0, 500])
    noised = process.corrupt(clean, noise, times)
    with torch.no_grad():
        output = model(noised, process.model_times(times), torch.tensor([0, 5]))
    assert output.prediction.shape == (2, 16, 16 * 6)
    assert not output.prediction.any()
    parts = patchify(clean, 4), patchify(noise, 4)
    losses = process.losses(output.prediction, *parts, times).mean(1)
    assert losses.tolist() == pytest.approx([3.418681, 1.00795233], rel=1e-5)


EVERY_EXPERT = {  # chosen by sample b
    "typed": ({}, lambda b: [b % 4, 4 + b % 4]),
    "one of three free": ({"top_k": 3}, lambda b: [b % 4, 4 + b % 4, (b + 2) % 8]),
    "free": (FREE, lambda b: [b % 8, (b + 3) % 8]),
    "one free": ({**FREE, "top_k": 1}, lambda b: [b % 8]),
}


@pytest.mark.parametrize("case", EVERY_EXPERT)
def test_gradient_reaches_the_router_and_every_matrix_and_bias_of_every_expert(case):
    fields, chosen = EVERY_EXPERT[case]
    args = tiny_args(**fields)
    model = build(args)
    for block in model.layers.values():
        block.mixer.router.choose = lambda logits: torch.tensor([chosen(b) for b in range(8)])
    _, grads = gradients(model, *random_inputs(args, batch=8))
    for name, grad in grads.items():
        assert torch.isfinite(grad).all(), name
        rows = grad if "mixers" in name else grad[None]  # every expert, or all
        assert (rows.flatten(1).abs().sum(1) > 0).all(), name


def test_gradient_reaches_every_parameter_of_a_dit():
    args = tiny_args(**DIT)
    _, grads = gradients(build(args), *random_inputs(args))
    assert all(grad.any() for grad in grads.values())


@pytest.mark.parametrize("vector", [0, 1])
def test_shift_and_scale_of_the_condition_change_what_the_mixer_does(vector):
    mixer = build(tiny_args(n_layers=1)).layers["0"].mixer
    x = torch.randn(2, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors = torch.zeros(2, 2, 1, 32, dtype=torch.float64)
    vectors[vector] = torch.randn(32, generator=torch.Generator().manual_seed(1))
    before, after = mixer(x)[0], mixer(modulate(x, *vectors))[0]
    assert (after - before).norm() > 0.1 * before.norm()


def test_gradient_of_the_shift_comes_through_the_mixer():
    block = build(tiny_args(n_layers=1)).layers["0"]
    vectors = torch.zeros(6, 2, 1, 32, dtype=torch.float64, requires_grad=True)
    gate = torch.ones(1, dtype=torch.float64)
    block.modulation.forward = lambda condition: (*vectors[:2], gate, *vectors[3:5], 0 * gate)
    x = torch.randn(2, 16, 32, dtype=torch.float64)
    block(x, torch.zeros(2, 32))[0].square().sum().backward()
    assert (vectors.grad[:2].abs() > 1e-6).all()  # every channel's shift and scale
    assert not vectors.grad[3:].any()


def test_router_noise_is_each_layers_own():
    args = tiny_args(router_noise=0.5)
    model, inputs = build(args), random_inputs(args)
    noise = torch.zeros(6, 2, 32, dtype=torch.float64)
    assert torch.equal(model(*inputs, noise).prediction, model(*inputs).prediction)
    noise[:, 1] = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    noisy, quiet = model(*inputs, noise).router, model(*inputs).router
    assert torch.equal(noisy.probabilities[0], quiet.probabilities[0])
    assert not torch.allclose(noisy.probabilities[1], quiet.probabilities[1])


def test_statistics_have_a_row_for_each_layer():
    args = tiny_args(n_layers=3)
    router = build(args)(*random_inputs(args)).router
    assert router.probabilities.shape == router.load.shape == (3, 8)
    assert router.z.shape == (3,)
    torch.testing.assert_close(router.load.sum(1), torch.ones(3, dtype=torch.float64))


def test_a_dit_is_the_same_model_with_attention():
    mom, dit = MoM(tiny_args()), MoM(tiny_args(**DIT))
    assert all(type(block) is MoMBlock for block in mom.layers.values())
    assert all(type(block) is DiTBlock for block in dit.layers.values())
    shared = {n for n, _ in mom.named_parameters()} & {n for n, _ in dit.named_parameters()}
    own = {name for name, _ in dit.named_parameters()} - shared
    assert {name.split(".")[2] for name in own} == {"attention"}
    assert build(tiny_args(**DIT))(*random_inputs(tiny_args())).router is None


@pytest.mark.parametrize("shape", [(3, 16, 20), (3, 20, 20), (4, 16, 16)])
def test_images_of_another_shape_are_refused(shape):
    model = MoM(tiny_args())
    with pytest.raises(ValueError, match=r"model's are \(3, 16, 16\).*multimodal.image_size"):
        model(torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


# --- cost -----------------------------------------------------------------------------------------


def measured_macs(model, args, batch=4):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*random_inputs(args, batch, dtype=torch.float32))
    assert counter.get_total_flops() % (2 * batch) == 0
    return counter.get_total_flops() // (2 * batch)


@pytest.mark.parametrize(
    "fields",
    [{}, {"top_k": 3, "min_token_experts": 2}, {"token_ratio": 2, "channel_ratio": 1.5}],
)
def test_measured_multiply_adds_equal_the_formula(fields):
    args = tiny_args(**fields)
    assert measured_macs(build(args, torch.float32), args) == args.total_macs_per_image()


@pytest.mark.parametrize("flavor", ["DiT-S/4", "MoM-S/4", "MoM-S/4-matched", "MoM-S/8"])
def test_multiply_adds_of_flavours_equal_the_formula(flavor):
    # Without values; the kernel of attention on a CPU does not count.
    args = mom_args[flavor]
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        labels = torch.zeros(2, dtype=torch.int64)
        MoM(args)(torch.zeros(2, 4, 32, 32), torch.zeros(2), labels)
    assert counter.get_total_flops() == 2 * 2 * args.total_macs_per_image()


@pytest.mark.parametrize(("experts", "token_experts"), [([0, 1], 2), ([6, 2], 1), ([4, 7], 0)])
def test_measured_multiply_adds_are_those_of_the_experts_that_were_chosen(experts, token_experts):
    args = tiny_args(**FREE)
    model = build(args, torch.float32)
    for block in model.layers.values():
        block.mixer.router.choose = lambda logits: torch.tensor([experts] * 4)
    assert measured_macs(model, args) == args.total_macs_per_image(token_experts)


def test_backward_costs_twice_the_forward_pass():
    args = tiny_args()
    model, inputs = build(args, torch.float32), random_inputs(args, dtype=torch.float32)
    inputs[0].requires_grad_()  # else the first layer has less to do
    with FlopCounterMode(display=False) as counter:
        gradients(model, *inputs)
    first = args.num_timestep_features * args.dim  # time needs no gradient
    assert counter.get_total_flops() == 2 * 6 * (3 * args.total_macs_per_image() - first)


def test_training_flops_are_six_per_multiply_add_and_token():
    args = mom_args["DiT-S/4"]
    with torch.device("meta"):
        model = MoM(args)
    parameters, flops = args.get_nparams_and_flops(model, 64)
    assert parameters == sum(p.numel() for p in model.parameters())
    assert flops == math.ceil(6 * args.total_macs_per_image() / 64)


# --- execution ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, FREE, DIT])
def test_host_never_waits_for_the_device(monkeypatch, fields):
    args = tiny_args(**fields)
    model, inputs = build(args, torch.float32), random_inputs(args, dtype=torch.float32)
    calls = []

    def spy(name):
        original = getattr(torch.Tensor, name)

        def counted(self, *arguments, **named):
            calls.append(name)
            return original(self, *arguments, **named)

        monkeypatch.setattr(torch.Tensor, name, counted)

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount")
            is_gather = str(func).startswith("aten.index.") or "index_put" in str(func)
            if any(name in str(func) for name in waits) or is_gather:
                calls.append(str(func))
            return func(*args, **(kwargs or {}))

    for name in ("tolist", "item", "cpu", "__bool__", "__int__", "__float__"):
        spy(name)
    with Spy():
        gradients(model, *inputs)
    assert calls == []


@pytest.mark.parametrize("fields", [{}, FREE, DIT])
def test_activation_checkpointing_gives_the_same_gradients(fields):
    args = tiny_args(**fields)
    model, inputs = build(args), random_inputs(args)
    expected = gradients(model, *inputs)
    for layer in model.layers.values():
        forward = layer.forward
        layer.forward = lambda *args, forward=forward: checkpoint(
            forward, *args, use_reentrant=False
        )
    output, grads = gradients(model, *inputs)
    assert torch.equal(output, expected[0])
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[1][name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fields", [{}, FREE, DIT])
def test_lower_precision_agrees(fields):
    args = tiny_args(**fields)
    low, high = build(args, torch.bfloat16), build(args)
    high.load_state_dict(low.state_dict())
    images, times, labels = random_inputs(args)
    with torch.no_grad():
        images = images.bfloat16()
        ours = low(images, times.float(), labels).prediction
        theirs = high(images.double(), times.float(), labels).prediction
    assert ours.dtype == torch.bfloat16
    error = (ours.double() - theirs).norm() / theirs.norm()
    assert error < 0.05


@pytest.mark.parametrize("fields", [{}, FREE, DIT])
def test_shapes_are_estimated_without_values(fields):
    args = tiny_args(**fields)
    with torch.device("meta"):
        labels = torch.zeros(2, dtype=torch.int64)
        output = MoM(args)(torch.zeros(2, 3, 16, 16), torch.zeros(2), labels)
    assert output.prediction.shape == (2, 16, 96)


def test_state_dict_layout():
    state = MoM(tiny_args(n_layers=1)).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    linears = {
        "x_embedder": (32, 48),
        "t_embedder.w1": (32, 16),
        "t_embedder.w2": (32, 32),
        "layers.0.modulation.linear": (192, 32),
        "layers.0.feed_forward.w1": (128, 32),
        "layers.0.feed_forward.w2": (32, 128),
        "final_layer.modulation.linear": (64, 32),
        "final_layer.linear": (96, 32),
    }
    expected = {"y_embedder.weight": (6, 32), "layers.0.mixer.router.weight": (8, 32)}
    for name, shape in linears.items():
        expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for kind, width, hidden in (("token", 16, 64), ("channel", 32, 128)):
        prefix = f"layers.0.mixer.{kind}_mixers"
        expected |= {f"{prefix}.w1": (4, hidden, width), f"{prefix}.b1": (4, hidden)}
        expected |= {f"{prefix}.w2": (4, width, hidden), f"{prefix}.b2": (4, width)}
    assert shapes == expected
