"""The VAE: loaded from a local folder by the code that users run, and refused where it is not."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from diffusers import AutoencoderKL

from tests.unit.data.image_jobs import save_tiny_vae
from torchtitan_mixtures.data.vae import load_vae, read_vae_config

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_vae(tmp_path_factory.mktemp("vae"))


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_latents_are_scaled_and_drawn_from_the_posterior(folder):
    vae = load_vae(str(folder), "cpu")
    oracle = AutoencoderKL.from_pretrained(folder)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    noise = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        posterior = oracle.encode(pixels).latent_dist
    torch.testing.assert_close(vae.encode(pixels), (posterior.mean - 0.1) * 0.5)
    drawn = posterior.mean + posterior.std * noise
    torch.testing.assert_close(vae.encode(pixels, noise), (drawn - 0.1) * 0.5)
    mean, std = vae.moments(pixels)
    torch.testing.assert_close(vae.encode(pixels, noise), mean + std * noise)
    assert (vae.factor, vae.channels) == (2, 4)


def test_decoding_undoes_the_scale(folder):
    vae = load_vae(str(folder), "cpu")
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(folder).decode(latents / 0.5 + 0.1).sample
    torch.testing.assert_close(vae.decode(latents), expected)
    assert not vae.decode(latents).requires_grad


def test_the_configuration_is_read_without_weights(tmp_path):
    save_tiny_vae(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    config = read_vae_config(str(tmp_path))
    assert (config.channels, config.factor, config.scaling, config.shift) == (4, 2, 0.5, 0.1)


def test_a_configuration_that_names_no_scale_has_the_first_ones(tmp_path):
    save_tiny_vae(tmp_path)
    change_config(tmp_path, scaling_factor=None, shift_factor=None)
    config = read_vae_config(str(tmp_path))
    assert (config.scaling, config.shift) == (0.18215, 0.0)


def test_a_name_that_is_no_folder_is_not_looked_up(tmp_path):
    with pytest.raises(ValueError, match=r"is not a local folder.*Nothing is downloaded"):
        load_vae("stabilityai/sd-vae-ft-ema", "cpu")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_vae(str(tmp_path), "cpu")
    save_tiny_vae(tmp_path / "vae")
    with pytest.raises(ValueError, match=f'name "{tmp_path / "vae"}"'):
        load_vae(str(tmp_path), "cpu")


def test_a_missing_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r'pip install "torchtitan_mixtures\[vae\]"'):
        load_vae(str(folder), "cpu")


def test_a_broken_vae_is_refused(tmp_path):
    save_tiny_vae(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:5000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_vae(str(tmp_path), "cpu")
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_vae(str(tmp_path), "cpu")
    (tmp_path / WEIGHTS).write_bytes(whole)
    change_config(tmp_path, layers_per_block=2)
    with pytest.raises(ValueError, match="its weights lack"):
        load_vae(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    "values",
    [{"_class_name": "VQModel"}, {"latents_mean": [0.0] * 4}, {"latent_channels": "four"}],
)
def test_a_configuration_that_cannot_be_used_is_refused(tmp_path, values):
    save_tiny_vae(tmp_path)
    change_config(tmp_path, **values)
    with pytest.raises(ValueError, match=r"config.json: cannot be used"):
        read_vae_config(str(tmp_path))


def test_a_configuration_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: cannot be used"):
        read_vae_config(str(tmp_path))
