import dataclasses

import pytest
import torch

from tests.unit.models.mom.helpers import build, random_inputs, tiny_args
from torchtitan_mixtures.models.mom.mixers import TokenMixers
from torchtitan_mixtures.models.mom.model import MoM
from torchtitan_mixtures.models.mom.resize import resample_matrix, resize_token_mixers

NAMES = ("w1", "b1", "w2", "b2")
PREFIX = "layers.0.mixer.token_mixers."


def resize(model: MoM, **fields) -> MoM:
    args = dataclasses.replace(model.model_args, **fields)
    resized = MoM(args).to(torch.float64)
    state = resize_token_mixers(dict(model.named_parameters()), model.model_args, args)
    missing = resized.load_state_dict(state, strict=True)
    assert not missing.missing_keys
    return resized


def token_mixer(model: MoM, expert: int = 0):
    """What an expert does to one channel, as a function of its tokens."""
    w1, b1, w2, b2 = (dict(model.named_parameters())[PREFIX + n][expert] for n in NAMES)
    gelu = torch.nn.GELU("tanh")
    return lambda tokens: w2 @ gelu(w1 @ tokens + b1) + b2


def smooth(side: int) -> torch.Tensor:
    """A function of the place in the image, sampled at the middle of each patch."""
    place = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return (torch.sin(3 * place)[:, None] + torch.cos(2 * place)[None] * place[:, None]).flatten()


def smoothed(model: MoM) -> MoM:
    """A model whose token mixers are smooth functions of the place, as trained ones are."""
    side = model.model_args.image_size // model.model_args.patch_size
    waves = smooth(side)
    with torch.no_grad():
        for name in ("w1", "w2", "b2"):
            parameter = model.get_parameter(PREFIX + name)
            if name == "w1":
                parameter.copy_(parameter.mean(2, keepdim=True) + 0.3 * waves / len(waves))
            elif name == "w2":
                parameter.copy_(parameter.mean(1, keepdim=True) + 0.3 * waves[:, None])
            else:
                parameter.copy_(parameter.mean(1, keepdim=True) + 0.3 * waves)
    return model


def test_equal_sizes_change_nothing():
    model = build(tiny_args())
    resized = resize(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(resized.get_parameter(name), parameter), name


@pytest.mark.parametrize(("old", "new"), [(16, 64), (64, 16), (16, 36), (36, 16), (16, 16)])
def test_resampling_keeps_constants(old, new):
    matrix = resample_matrix(old, new)
    assert matrix.shape == (new, old)
    torch.testing.assert_close(matrix.sum(1), torch.ones(new, dtype=torch.float64))
    if old == new:
        torch.testing.assert_close(matrix, torch.eye(old, dtype=torch.float64))


def test_resampling_spreads_input_weights_evenly_over_a_finer_grid():
    # "Bicubic, times the old number of tokens / the new one", away from the border.
    spread, repeated = resample_matrix(1024, 64), resample_matrix(64, 1024)
    inner = [row * 8 + column for row in (3, 4) for column in (3, 4)]
    torch.testing.assert_close(spread[inner], repeated.t()[inner] * 64 / 1024, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("size", [32, 64, 24])
def test_a_constant_image_is_mixed_as_before_on_a_finer_grid(size):
    model = build(tiny_args())
    before, after = token_mixer(model), token_mixer(resize(model, image_size=size))
    side = size // 4
    expected = resample_matrix(16, side * side) @ before(torch.full((16,), 0.7).double())
    torch.testing.assert_close(after(torch.full((side * side,), 0.7).double()), expected)


@pytest.mark.parametrize(("old", "new"), [(32, 64), (64, 32), (32, 48)])
def test_a_smooth_image_is_mixed_nearly_as_before(old, new):
    ratio = 4.0 if new > old else 4.0 * old**2 / new**2  # no unit is lost
    model = smoothed(build(tiny_args(image_size=old, n_layers=1)))
    resized = resize(model, image_size=new, token_ratio=ratio)
    out = token_mixer(model)(smooth(old // 4))
    expected = resample_matrix(out.numel(), (new // 4) ** 2) @ out
    error = token_mixer(resized)(smooth(new // 4)) - expected
    assert error.abs().max() < 0.02 * expected.abs().max()


def test_added_hidden_units_are_silent_but_learn():
    model = build(tiny_args(n_layers=1))
    resized = resize(model, token_ratio=6.0)
    x = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(token_mixer(resized)(x), token_mixer(model)(x))
    parameter = resized.get_parameter(PREFIX + "w2")
    assert not parameter[:, :, 64:].any()
    resized(*random_inputs(resized.model_args))[0].square().sum().backward()
    assert parameter.grad[:, :, 64:].any()


def test_the_least_important_hidden_units_go_first():
    model = build(tiny_args(n_layers=1))
    with torch.no_grad():
        w2 = model.get_parameter(PREFIX + "w2")
        silent = torch.arange(64) % 2 == 0
        w2[0, :, silent] = 0
        w2[1, :, ~silent] = 0
    resized = resize(model, token_ratio=2.0)
    x = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for expert in (0, 1):
        before, after = token_mixer(model, expert), token_mixer(resized, expert)
        torch.testing.assert_close(after(x), before(x))


def test_a_resized_model_runs_and_keeps_all_other_weights():
    model = build(tiny_args())
    resized = resize(model, image_size=32)
    output = resized(*random_inputs(resized.model_args))
    assert output.prediction.shape == (6, 64, 96)
    for name, parameter in model.named_parameters():
        if "token_mixers" not in name:
            assert torch.equal(resized.get_parameter(name), parameter), name
    assert isinstance(resized.layers["0"].mixer.token_mixers, TokenMixers)


def test_a_dit_needs_no_resizing():
    model = build(tiny_args(mixer="attention"))
    resized = resize(model, image_size=32)
    for name, parameter in model.named_parameters():
        assert torch.equal(resized.get_parameter(name), parameter), name


@pytest.mark.parametrize("fields", [{"patch_size": 2}, {"dim": 64}, {"num_token_experts": 2}])
def test_nothing_else_may_differ(fields):
    model = MoM(tiny_args())
    args = dataclasses.replace(model.model_args, **fields)
    (name,) = fields
    with pytest.raises(ValueError, match=f"^{name} is .* only the size of images"):
        MoM.resize_state_dict(model.state_dict(), model.model_args, args)
