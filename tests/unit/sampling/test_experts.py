"""The seed's loop over experts, corrected, against the package's own sampling."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints import save_tiny_mixdiff, save_tiny_mot
from torchtitan_mixtures.checkpoint_loading import load_model
from torchtitan_mixtures.objectives.denoising import build_process
from torchtitan_mixtures.sampling.conditions import class_condition
from torchtitan_mixtures.sampling.experts import Step, get_top_k, load_experts
from torchtitan_mixtures.sampling.images import ImageSettings, draw_images
from torchtitan_mixtures.sampling.prompt_encoding import PromptEncoder

STEPS = 4


def generate_image(mixture, prompt, experts, router, k=2):
    """The seed's `generate_image`, its three faults mended."""
    weights = router.predict_weights(prompt)
    weights, active_experts = get_top_k(experts, weights, k=k)
    latent = mixture.initialize_noise()
    for step in mixture.diffusion_steps(STEPS):
        noise_pred = sum(
            w * expert.denoise(latent, prompt, step)
            for w, expert in zip(weights, active_experts, strict=True)
        )
        latent = mixture.update_latent(latent, noise_pred, step)
    return mixture.decode(latent)


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_the_loop_draws_what_the_sampler_draws(kind, tmp_path):
    by_prompt = ("--diffusers.router_inputs=prompt", f"--objective.kind={kind}")
    save_tiny_mixdiff(tmp_path, *by_prompt)
    mixture = load_experts(tmp_path)
    found = generate_image(mixture, 3, mixture.experts, mixture.router)
    loaded = load_model(tmp_path)
    args, sampler = loaded.model_args, {"ddpm": "ddim", "flow": "euler"}[kind]
    settings = ImageSettings(sampler, STEPS, 0.0, 1.0, 0, 0, float(kind == "flow"))
    process = build_process(loaded.job_config.objective, args.in_channels)
    condition = class_condition([3], args.num_classes, "cpu")
    expected = draw_images(loaded.model, args, process, condition, [0], settings, "cpu")
    torch.testing.assert_close(found, expected[0].clamp(-1, 1))
    assert [expert.name for expert in mixture.experts] == ["noto", "noto_v1", "fluent"]


def test_texts_are_prompts_of_experts_that_read(tmp_path):
    save_tiny_mixdiff(tmp_path, "--diffusers.router_inputs=prompt", flavor="debugmodel_mmdit")
    mixture = load_experts(tmp_path)
    weights = mixture.router.predict_weights("a dog face")
    loaded = load_model(tmp_path)
    encoder = PromptEncoder(loaded.job_config, loaded.model_args.prompts, "cpu")
    inputs = encoder.encode(["a dog face"]).condition([0], "cpu").given
    latent = mixture.initialize_noise()
    logits = loaded.model.router(latent, torch.tensor([1000.0]), **inputs)
    torch.testing.assert_close(weights, logits[0].softmax(0))
    image = generate_image(mixture, "a dog face", mixture.experts, mixture.router, k=1)
    other = generate_image(mixture, "two apples", mixture.experts, mixture.router, k=1)
    assert image.shape == (3, 32, 32) and not torch.equal(image, other)


def test_a_router_that_reads_more_is_asked_at_each_step(tmp_path):
    model = save_tiny_mixdiff(tmp_path)
    mixture = load_experts(tmp_path)
    latent, step = torch.randn(1, 3, 32, 32), Step(1, 500.0, 250.0)
    found = mixture.router.predict_weights(3, latent, step)
    labels = torch.tensor([3])
    with torch.no_grad():
        logits = model.router(latent, torch.tensor([500.0]), class_labels=labels)
    torch.testing.assert_close(found, logits[0].softmax(0))
    assert not torch.allclose(found, mixture.router.predict_weights(3))


@pytest.mark.parametrize(("k", "message"), [(0, "k = 0: must be from 1 to 3"), (4, "k = 4")])
def test_more_experts_than_there_are_cannot_be_active(k, message, tmp_path):
    save_tiny_mixdiff(tmp_path)
    mixture = load_experts(tmp_path)
    with pytest.raises(ValueError, match=message):
        get_top_k(mixture.experts, torch.ones(3) / 3, k)


@pytest.mark.parametrize(
    ("prompt", "message"), [("a fox", "draws images of classes, 0 to"), (99, "prompt = 99")]
)
def test_prompts_that_the_model_does_not_know_are_refused(prompt, message, tmp_path):
    save_tiny_mixdiff(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_experts(tmp_path).router.predict_weights(prompt)


def test_other_models_have_no_experts(tmp_path):
    save_tiny_mot(tmp_path)
    with pytest.raises(ValueError, match="is no mixture of diffusers"):
        load_experts(tmp_path)
