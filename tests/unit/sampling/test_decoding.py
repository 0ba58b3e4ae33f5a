"""The choice of a token, against lists and loops."""

import itertools
import re

import pytest
import torch

from tests.unit.sampling.helpers import naive_choice
from torchtitan_mixtures.sampling.decoding import (
    choose_tokens,
    draw_uniforms,
    find_broken,
    guide,
)
from torchtitan_mixtures.sampling.settings import SamplingSettings


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    list(itertools.product([0.0, 0.3, 1.0, 4.0], [0, 1, 3, 50], [1.0, 0.7, 0.05])),
)
def test_choices_equal_those_of_lists_and_loops(temperature, top_k, top_p):
    settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(60, 20, generator=generator, dtype=torch.float64)
    logits[:20] = logits[:20].round()  # ties
    allowed = torch.rand(60, 20, generator=generator) < 0.6
    allowed[:, 7] = True
    uniforms = torch.rand(60, generator=generator, dtype=torch.float64)
    found = choose_tokens(logits, allowed, uniforms, settings).tolist()
    for row in range(60):
        tokens = allowed[row].nonzero().flatten().tolist()
        expected = naive_choice(logits[row].tolist(), tokens, uniforms[row].item(), settings)
        assert found[row] == expected


def test_frequencies_are_the_probabilities():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    draws = 20_000
    uniforms = draw_uniforms(0, [0], draws)[0]
    tokens = choose_tokens(
        logits.expand(draws, -1), torch.ones(draws, 4, dtype=torch.bool), uniforms,
        SamplingSettings(),
    )  # fmt: skip
    frequencies = tokens.bincount(minlength=4) / draws
    torch.testing.assert_close(frequencies, logits.exp(), rtol=0, atol=0.012)


@pytest.mark.parametrize("value", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_choose_a_token_that_may_be_chosen(value):
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(3))
    allowed = torch.zeros(50, 9, dtype=torch.bool)
    allowed[:, 2:5] = True
    tokens = choose_tokens(
        logits, allowed, torch.full((50,), value, dtype=torch.float64), SamplingSettings(top_p=0.9)
    )
    assert set(tokens.tolist()) <= {2, 3, 4}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.5}], ids=str
)
def test_a_model_that_has_diverged_still_gives_tokens_that_may_be_chosen(value, options):
    logits = torch.randn(60, 9, generator=torch.Generator().manual_seed(0))
    logits[::2] = value
    logits[1::4, 4] = value
    allowed = torch.zeros(60, 9, dtype=torch.bool)
    allowed[:, 3:6] = True
    uniforms = torch.rand(60, generator=torch.Generator().manual_seed(1)).double()
    settings = SamplingSettings(**options)
    tokens = choose_tokens(logits, allowed, uniforms, settings)
    assert set(tokens.tolist()) <= {3, 4, 5}
    broken = find_broken(logits, allowed)
    assert broken.tolist() == [row % 4 != 3 for row in range(60)]
    whole = choose_tokens(logits[~broken], allowed[~broken], uniforms[~broken], settings)
    assert torch.equal(tokens[~broken], whole)


def test_what_may_not_be_chosen_need_not_be_finite():
    logits = torch.tensor([[float("nan"), 1.0, 2.0, float("inf")]])
    allowed = torch.tensor([[False, True, True, False]])
    assert not find_broken(logits, allowed).any()
    settings = SamplingSettings(temperature=0)
    assert choose_tokens(logits, allowed, torch.zeros(1).double(), settings).tolist() == [2]


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e300])
def test_extreme_temperatures_choose_as_their_neighbours(temperature):
    logits = torch.tensor([[1.0, 30.0, 3.0, 29.0]]).expand(40, -1)
    allowed = torch.tensor([True, False, True, True]).expand(40, -1)
    uniforms = torch.arange(40).double() / 40
    tokens = choose_tokens(logits, allowed, uniforms, SamplingSettings(temperature=temperature))
    assert set(tokens.tolist()) == ({0, 2, 3} if temperature > 1 else {3})


def test_guidance_goes_on_in_the_direction_from_unconditional_to_conditional():
    conditional, unconditional = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 1.0]])
    expected = {1: conditional, 0: unconditional, 3: torch.tensor([[2.0, -8.0]])}
    for scale, logits in expected.items():
        assert torch.equal(guide(conditional, unconditional, scale), logits.double())


def test_the_strongest_guidance_of_half_precision_is_finite():
    conditional = torch.tensor([[6e4, 0.0, 1.0]], dtype=torch.float16)
    found = guide(conditional, -conditional, 1000)
    assert found.isfinite().all() and found.argmax() == 0


def test_numbers_depend_on_the_seed_and_the_sample_only():
    together = draw_uniforms(5, [3, 0, 7], 20)
    assert torch.equal(together[1], draw_uniforms(5, [0], 20)[0])
    assert torch.equal(together[2], draw_uniforms(5, [7], 20)[0])
    assert len({row[0].item() for row in [*together, *draw_uniforms(6, [3, 0, 7], 20)]}) == 6
    assert ((together >= 0) & (together < 1)).all()


def test_drawing_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    draw_uniforms(0, [1], 4)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("guidance", -1.0),
        ("guidance", float("inf")),
        ("guidance", 1e40),
        ("seed", -1),
        ("max_text_tokens", 0),
        ("max_speech_seconds", 0.0),
    ],
)
def test_a_setting_that_cannot_be_is_named(key, value):
    with pytest.raises(ValueError, match=f"^{key} = {re.escape(str(value))}: must be"):
        SamplingSettings(**{key: value})


def test_roundings_choose_no_other_token():
    # Nearly equal codes, as of a young model, with ten times the noise of another batch size. Mass
    # laid out by probability would give other tokens in one of 200 rows.
    generator = torch.Generator().manual_seed(0)
    logits = 0.3 * torch.randn(5000, 1000, generator=generator)
    noise = 2e-5 * torch.randn(logits.shape, generator=generator)
    uniforms = torch.rand(5000, generator=generator, dtype=torch.float64)
    allowed = torch.ones_like(logits, dtype=torch.bool)
    settings = SamplingSettings()
    first = choose_tokens(logits, allowed, uniforms, settings)
    again = choose_tokens(logits + noise, allowed, uniforms, settings)
    assert torch.equal(first, again)
