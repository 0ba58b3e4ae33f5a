"""What a run logs as its FLOPs is what MMDiT computes, counted while it runs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.models.mmdit import mmdit_args
from torchtitan_mixtures.models.mmdit.args import SD3_PROMPT, MMDiTModelArgs
from torchtitan_mixtures.models.mmdit.model import MMDiTDenoiser

TEXT = PromptSpec("text", "tokens", length=6, vocab_size=20)
SPEECH = PromptSpec("speech", "tokens", length=11, vocab_size=30)
EMBEDDED = PromptSpec("text", "embeddings", length=5, dim=24, pooled_dim=12)
NOT_POOLED = replace(EMBEDDED, pooled_dim=0)
BATCH = 3

SMALL = MMDiTModelArgs(
    dim=32,
    n_layers=2,
    n_heads=2,
    in_channels=3,
    image_size=8,
    num_timestep_features=16,
    prompts=(TEXT,),
    encoder_layers=2,
    encoder_dim=16,
    encoder_heads=2,
)
THREE: dict[str, Any] = {"prompt_names": ("text", "speech"), "prompts": (TEXT, SPEECH)}

CASES: dict[str, dict[str, Any]] = {
    "text and image": {},
    "one layer": {"n_layers": 1},
    "three modalities": THREE,
    "embeddings with a pooled one": {"prompts": (EMBEDDED,)},
    "embeddings alone": {"prompts": (NOT_POOLED,)},
    "embeddings and ids": THREE | {"prompts": (EMBEDDED, SPEECH)},
    "a stream for all": {"single_stream": True},
    "a stream for all of embeddings": {"single_stream": True, "prompts": (EMBEDDED,)},
    "registers": {"num_registers": (2, 3)},
    "registers of a stream for all": {"single_stream": True, "num_registers": (4,)},
    "dynamic streams": {"num_residual_streams": 4},
    "static streams": {"num_residual_streams": 4, "dynamic_streams": False},
    "dynamic streams of three": THREE | {"num_residual_streams": 3, "num_registers": (0, 1, 2)},
    "a stream for all, times 2": {"single_stream": True, "num_residual_streams": 2},
    "adaptive weights": {"num_adaptive_weights": 3},
    "other widths": THREE | {"prompt_dims": (48, 20)},
    "other widths, streams, weights": {
        **THREE,
        "prompt_dims": (48, 20),
        "num_residual_streams": 2,
        "num_adaptive_weights": 2,
    },
    "odd feed-forward network": {"mlp_ratio": 2.7},
    "learned variance": {"learned_variance": True},
    "qk norm of heads, soft clamp": {"qk_norm": "per_head", "softclamp": 30.0},
}


def count(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What comes out, and multiply-adds."""
    counter = FlopCounterMode(display=False)
    with counter:
        output = run()
    return output, counter.get_total_flops() / 2


def draw_prompts(args: MMDiTModelArgs, batch: int) -> dict[str, Tensor]:
    prompts = {}
    for spec in args.prompts:
        shape = (batch, spec.length)
        if spec.kind == "tokens":
            prompts[spec.name] = torch.zeros(shape, dtype=torch.int64)
            continue
        prompts[spec.name] = torch.zeros(*shape, spec.dim)
        if spec.pooled_dim:
            prompts[f"{spec.name}_pooled"] = torch.zeros(batch, spec.pooled_dim)
    return prompts


def count_passes(args: MMDiTModelArgs, height: int, width: int) -> tuple[float, float]:
    """Multiply-adds of an image, forward and backward."""
    # Shapes alone: there attention is made of matrix products, which the counter knows.
    with torch.device("meta"):
        model = MMDiTDenoiser(args)
        latents = torch.zeros(BATCH, args.in_channels, height, width)
        times, prompts = torch.zeros(BATCH), draw_prompts(args, BATCH)
        output, forward = count(lambda: model(latents, times, prompts).prediction)
        _, backward = count(lambda: output.sum().backward())
    return forward / BATCH, backward / BATCH


def first_layers(args: MMDiTModelArgs, num_tokens: int) -> int:
    """Multiply-adds of layers whose inputs are data, which need no gradient of them."""
    total = num_tokens * args.patch_size**2 * args.in_channels * args.dim
    total += args.num_timestep_features * args.dim
    for spec in args.prompts:
        if spec.kind == "embeddings":
            width = args.dim if args.single_stream else args.stream_dims[spec.name]
            total += spec.length * spec.dim * width + spec.pooled_dim * args.dim
    return total


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_formula_says_what_is_counted(changes):
    args = replace(SMALL, **changes)
    forward, backward = count_passes(args, args.image_size, args.image_size)
    assert forward == args.macs_per_image()
    # Two products for each of the forward pass, but for what needs no gradient of its inputs.
    assert backward == 2 * forward - first_layers(args, args.num_tokens)


@pytest.mark.parametrize("changes", [{}, THREE | {"num_registers": (1, 2, 3)}], ids=["two", "3"])
@pytest.mark.parametrize("is_single", [False, True], ids=["streams", "a stream for all"])
def test_the_formula_knows_images_that_are_not_square(changes, is_single):
    args = replace(SMALL, **changes)
    if is_single:
        args = replace(args, single_stream=True, num_registers=args.num_registers[:1])
    assert count_passes(args, 4, 18)[0] == args.macs_per_image(2 * 9)
    assert args.macs_per_image(16) == args.macs_per_image()


def test_a_training_step_is_logged_as_three_passes_forward():
    with torch.device("meta"):
        model = MMDiTDenoiser(SMALL)
    parameters, flops = SMALL.get_nparams_and_flops(model, seq_len=0)
    assert parameters == sum(p.numel() for p in model.parameters())
    forward, _ = count_passes(SMALL, SMALL.image_size, SMALL.image_size)
    assert flops == round(6 * forward / SMALL.num_tokens)


def test_weights_of_its_own_cost_a_modality_modulations_alone():
    # And the last block leaves out what only prompts would get: all after attention, and four
    # vectors of the modulation.
    joint = replace(SMALL, **THREE, n_layers=5)
    single = replace(joint, single_stream=True)
    prompts, length, square = 2, TEXT.length + SPEECH.length, joint.dim**2
    left_out = 9 * length * square + 4 * prompts * square
    modulations = 6 * prompts * square * joint.n_layers
    expected = single.macs_per_image() + modulations - left_out
    assert joint.macs_per_image() == expected


@pytest.mark.parametrize(
    ("joint", "single", "low"),
    [("debugmodel", "debugmodel_dit", 0.94), ("d15", "d15_dit", 0.98), ("d24", "d24_dit", 0.98)],
)
def test_baselines_cost_no_less_than_what_they_are_compared_with(joint, single, low):
    # And little more: of few blocks, what the last one leaves out is the larger part.
    first, second = mmdit_args[joint], mmdit_args[single]
    assert first.num_tokens == second.num_tokens
    assert sum(first.stream_lengths.values()) == sum(second.stream_lengths.values())
    assert replace(first, single_stream=True) == second
    assert low < first.macs_per_image() / second.macs_per_image() <= 1


@pytest.mark.parametrize(
    ("flavor", "gigamacs"),
    [
        ("d15", (73, 236, 1_225)),
        ("d18", (125, 396, 1_968)),
        ("d24", (292, 903, 4_220)),
        ("d30", (565, 1_725, 7_722)),
        ("d38", (1_140, 3_436, 14_804)),
    ],
)
def test_stable_diffusion_3_costs_what_was_computed_for_it(flavor, gigamacs):
    # Computed for the specification from the paper, rounded, with small terms left out.
    for pixels, expected in zip((256, 512, 1024), gigamacs, strict=True):
        args = replace(mmdit_args[flavor], image_size=pixels // 8)
        assert args.prompts == (SD3_PROMPT,)
        assert args.num_tokens == (pixels // 16) ** 2
        assert args.macs_per_image() / 1e9 == pytest.approx(expected, rel=0.015)
