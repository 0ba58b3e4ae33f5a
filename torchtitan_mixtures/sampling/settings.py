"""How samples are drawn; the values that a command line and a TOML have in common."""

# `[sampling]` of job_config.py inherits the fields: nothing here may import the rest of the
# package, and no `from __future__ import annotations`: TorchTitan wants their real types.

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class SamplingSettings:
    """How tokens are chosen, and how many at most."""

    temperature: float = 1.0
    """Divides the logits. 0 = always the likeliest token."""

    top_k: int = 0
    """Choose among this many likeliest tokens. 0 = all."""

    top_p: float = 1.0
    """Choose among the fewest likeliest tokens that have this probability together."""

    guidance: float = 1.0
    """Classifier-free guidance of images: logits are those without what precedes the image, plus
    this many times the difference that it makes. 1 = none; 0 = as if nothing preceded."""

    seed: int = 0
    """With the number of a sample, decides everything that is drawn for it."""

    max_text_tokens: int = 64
    """Longest text."""

    max_speech_seconds: float = 4.0
    """Longest speech."""

    def __post_init__(self) -> None:
        check_values(self, "")


def setting_name(prefix: str, key: str) -> str:
    """What the user calls a setting; after the prefix `--` as an option is typed."""
    return prefix + (key.replace("_", "-") if prefix == "--" else key)


def check_values(values: Any, prefix: str) -> None:
    """Check the values of settings, or of a section with the same names.

    Args:
        values: Has the attributes of `SamplingSettings`.
        prefix: Goes before the names in messages, see `setting_name`.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    rules = {
        "temperature": (0 <= values.temperature < math.inf, "a finite number >= 0 (0 = greedy)"),
        "top_k": (values.top_k >= 0, "0 (all) or more"),
        "top_p": (0 < values.top_p <= 1, "above 0 and at most 1 (all)"),
        "guidance": (0 <= values.guidance <= 1000, "from 0 to 1000 (1 = none)"),
        "seed": (values.seed >= 0, "0 or more"),
        "max_text_tokens": (values.max_text_tokens >= 1, "1 or more"),
        "max_speech_seconds": (0 < values.max_speech_seconds < math.inf, "a finite number > 0"),
    }
    for key, (holds, allowed) in rules.items():
        if not holds:
            name = setting_name(prefix, key)
            raise ValueError(f"{name} = {getattr(values, key)}: must be {allowed}.")


@dataclass
class DenoisingSettings:
    """How images are drawn out of noise; guidance and seed are those of `SamplingSettings`."""

    sampler: Literal["", "ddpm", "ddim", "euler"] = ""
    """`ddpm`: ancestral steps, `ddim`: steps with `eta`, both for models of kind ddpm; `euler`:
    for models of kind flow. Empty = ddpm or euler."""

    num_steps: int = 50
    """Steps from noise to image."""

    eta: float = 0.0
    """Noise that `ddim` adds: 0 = none, 1 = as much as `ddpm`."""

    guided_channels: int = 0
    """Guide the first so many channels only. 0 = all."""

    shift: float = 0.0
    """For models of kind flow: shift of the times towards noise. 0 = as trained."""

    routing: Literal["step", "once"] = "step"
    """Of mixtures of diffusers: the router weighs the experts at every `step`, or `once` for all of
    them, by the first one's noise and the prompt."""

    negative_prompt: str = ""
    """For models of prompted images: guide away from this prompt instead of from none. Empty =
    from none."""


def check_denoising(values: Any, prefix: str) -> None:
    """Check the values of `DenoisingSettings`, as `check_values`."""
    rules = {
        "num_steps": (values.num_steps >= 1, "1 or more"),
        "eta": (0 <= values.eta <= 1, "from 0 to 1"),
        "guided_channels": (values.guided_channels >= 0, "0 (all) or more"),
        "shift": (0 <= values.shift < math.inf, "a finite number > 0 (0 = as trained)"),
    }
    for key, (holds, allowed) in rules.items():
        if not holds:
            name = setting_name(prefix, key)
            raise ValueError(f"{name} = {getattr(values, key)}: must be {allowed}.")
