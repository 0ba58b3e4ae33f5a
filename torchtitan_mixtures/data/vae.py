"""The VAE that makes latents of pictures and pictures of latents, from a local folder.

Any `AutoencoderKL` that `diffusers` saved will do, such as the "ft-ema" one of Stable Diffusion.
Nothing is downloaded and only safetensors are read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

_REMEDY = 'a folder that has the config.json and *.safetensors of a "diffusers" AutoencoderKL'


@dataclass(frozen=True)
class VaeConfig:
    """What a VAE's `config.json` says about its latents."""

    channels: int
    """Of latents."""

    factor: int
    """By which latents are smaller than pictures."""

    scaling: float
    """Latents are multiplied by it; it gives them unit variance."""

    shift: float
    """Subtracted from latents before."""


def read_vae_config(folder: str) -> VaeConfig:
    """Read `config.json` of a VAE, not its weights.

    Args:
        folder: Where `diffusers` saved the VAE.

    Raises:
        ValueError: There is no such folder, or what is in it is no VAE that can be used.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        inner = path / "vae"  # of a whole pipeline
        hint = f'"{inner}"' if (inner / "config.json").is_file() else _REMEDY
        what = "has no config.json" if path.is_dir() else "is not a local folder"
        raise ValueError(f'VAE "{folder}" {what}; name {hint}. Nothing is downloaded.')
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind = config.get("_class_name")
        if kind != "AutoencoderKL" or config.get("latents_mean") or config.get("latents_std"):
            raise ValueError(f"it describes a {kind}, whose latents are not scaled by one number")
        return VaeConfig(
            channels=int(config["latent_channels"]),
            factor=2 ** (len(config["block_out_channels"]) - 1),
            scaling=float(config.get("scaling_factor") or 0.18215),  # of the first ones, unsaid
            shift=float(config.get("shift_factor") or 0.0),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path / 'config.json'}: cannot be used ({error!r}); name {_REMEDY}."
        ) from None


class Vae:
    """A frozen VAE in float32.

    Args:
        model: An `AutoencoderKL`.
        config: What its configuration says.
    """

    def __init__(self, model: Any, config: VaeConfig) -> None:
        self._model = model
        self.config = config

    @property
    def channels(self) -> int:
        """Of latents."""
        return self.config.channels

    @property
    def factor(self) -> int:
        """By which latents are smaller than pictures."""
        return self.config.factor

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of pictures, scaled.

        Args:
            pixels: `(batch, 3, height, width)` in [-1, 1].

        Returns:
            Two `(batch, channels, height / factor, width / factor)` float32.
        """
        posterior = self._model.encode(pixels.float()).latent_dist
        mean = (posterior.mean - self.config.shift) * self.config.scaling
        return mean, posterior.std * self.config.scaling

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Make scaled latents of pictures.

        Args:
            pixels: `(batch, 3, height, width)` in [-1, 1].
            noise: Standard normal, of the shape of the result; draws latents. None: their mean.

        Returns:
            `(batch, channels, height / factor, width / factor)` float32.
        """
        mean, std = self.moments(pixels)
        return mean if noise is None else mean + std * noise

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Make pictures of scaled latents.

        Args:
            latents: `(batch, channels, height, width)`.

        Returns:
            `(batch, 3, height * factor, width * factor)` float32, about in [-1, 1]; not clamped.
        """
        return self._model.decode(latents.float() / self.config.scaling + self.config.shift).sample


def load_vae(folder: str, device: torch.device | str) -> Vae:
    """Load a VAE from a local folder.

    Args:
        folder: Where `diffusers` saved it.
        device: Where it computes.

    Raises:
        ValueError: The folder is missing or broken, or `diffusers` is not installed.
    """
    config = read_vae_config(folder)
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError(
            f'VAE "{folder}" needs diffusers ({error}): pip install "torchtitan_mixtures[vae]"'
        ) from None
    try:
        loaded: Any = AutoencoderKL.from_pretrained(
            str(Path(folder).expanduser()),
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,  # the other way needs a further package
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f'VAE "{folder}" cannot be loaded ({error}); name {_REMEDY}.') from error
    model, loading = loaded
    if loading["missing_keys"]:  # `diffusers` would leave them at random
        name = loading["missing_keys"][0]
        raise ValueError(f'VAE "{folder}": its weights lack {name}; name {_REMEDY}.')
    return Vae(model.requires_grad_(False).eval().to(device), config)
