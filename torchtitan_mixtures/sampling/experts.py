"""Diffusion experts and their router as objects, for generation that is written out by hand.

    mixture = load_experts("outputs/mixdiff/debugmodel")

    def generate_image(prompt, experts, router):
        weights = router.predict_weights(prompt)
        weights, active_experts = get_top_k(experts, weights, k=2)
        latent = mixture.initialize_noise()
        for step in mixture.diffusion_steps(50):
            noise_pred = sum(
                w * expert.denoise(latent, prompt, step)
                for w, expert in zip(weights, active_experts)
            )
            latent = mixture.update_latent(latent, noise_pred, step)
        return mixture.decode(latent)

    image = generate_image("a dog face", mixture.experts, mixture.router)

`scripts/sample.py` does the same for many images at once, with the router at each step, and guides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchtitan_mixtures.checkpoint_loading import LoadedModel, load_model
from torchtitan_mixtures.data.vae import Vae, load_vae
from torchtitan_mixtures.objectives.ddpm import DDPM, spaced_steps
from torchtitan_mixtures.objectives.denoising import build_process, is_mixture_of_diffusers
from torchtitan_mixtures.objectives.flow import RectifiedFlow, shift_times
from torchtitan_mixtures.objectives.patches import unpatchify
from torchtitan_mixtures.objectives.randomness import draw_normal
from torchtitan_mixtures.sampling.conditions import class_condition
from torchtitan_mixtures.sampling.denoise import ddim_step
from torchtitan_mixtures.sampling.prompt_encoding import PromptEncoder, choose_text_encoders

Prompt = str | int
"""What an image is to be of: a text, or of models of classes the number of one."""


@dataclass(frozen=True)
class Step:
    """One step from noise to image.

    Attributes:
        number: From 0 on.
        time: What models are fed, from about 1000 (noise) down.
        following: That of the next step; None of the last, behind which is the image.
    """

    number: int
    time: float
    following: float | None


class Prompts:
    """Makes inputs of models out of prompts, and remembers them."""

    def __init__(self, loaded: LoadedModel, device: torch.device | str) -> None:
        self._loaded = loaded
        self._device = device
        self._encoder: PromptEncoder | None = None
        self._known: dict[Prompt, Any] = {}

    def inputs(self, prompt: Prompt) -> Any:
        """Keyword arguments of a model, for one image.

        Raises:
            ValueError: A text for a model of classes, a class it does not have, or the other way
                round.
        """
        if prompt not in self._known:
            self._known[prompt] = self._encode(prompt)
        return self._known[prompt]

    def _encode(self, prompt: Prompt) -> Any:
        args = self._loaded.model_args
        if isinstance(prompt, str) != args.is_prompted:
            kind = "texts" if args.is_prompted else f"classes, 0 to {args.num_classes - 1}"
            raise ValueError(f"prompt = {prompt!r}: the model draws images of {kind}.")
        if isinstance(prompt, int):
            if not 0 <= prompt < args.num_classes:
                raise ValueError(f"prompt = {prompt}: must be from 0 to {args.num_classes - 1}.")
            return class_condition([prompt], args.num_classes, self._device).given
        if self._encoder is None:
            config, specs = self._loaded.job_config, args.prompts
            folders = choose_text_encoders(config, specs, (), "multimodal.text_encoders")
            self._encoder = PromptEncoder(config, specs, self._device, folders)
        return self._encoder.encode([prompt]).condition([0], self._device).given


class PromptRouter:
    """The router of a mixture, asked about one image."""

    def __init__(self, router: nn.Module, prompts: Prompts, noise: Tensor) -> None:
        self._router, self._prompts, self._noise = router, prompts, noise

    @torch.no_grad()
    def predict_weights(
        self, prompt: Prompt, latent: Tensor | None = None, step: Step | None = None
    ) -> Tensor:
        """The probability of each expert, `(experts,)` float32.

        Args:
            prompt: What the image is to be of.
            latent: The image so far, `(1, channels, height, width)`, for a router that reads it.
                None: noise, of which a router can only go by the prompt.
            step: What is about to be done; None: the first.
        """
        latent = self._noise if latent is None else latent
        time = torch.tensor([1000.0 if step is None else step.time], device=latent.device)
        logits = self._router(latent, time, **self._prompts.inputs(prompt))
        return logits[0].softmax(0)


class DiffusionExpert:
    """One expert of a mixture."""

    def __init__(self, name: str, model: nn.Module, args: Any, prompts: Prompts) -> None:
        self.name = name
        self.model = model
        self._args = args
        self._prompts = prompts

    @torch.no_grad()
    def denoise(self, latent: Tensor, prompt: Prompt, step: Step) -> Tensor:
        """Predict the noise (of a flow the velocity) in a latent.

        Args:
            latent: `(1, channels, height, width)`.
            prompt: What the image is to be of.
            step: Where the latent is.

        Returns:
            Like `latent`; a learned variance, if the model has one, is left out.
        """
        time = torch.tensor([step.time], device=latent.device)
        prediction = self.model(latent, time, **self._prompts.inputs(prompt)).prediction
        args, size = self._args, latent.shape[2:]
        images = unpatchify(prediction, args.patch_size, args.out_channels, *size)
        return images[:, : args.in_channels].float()


def get_top_k(
    experts: Sequence[DiffusionExpert], weights: Tensor, k: int
) -> tuple[Tensor, list[DiffusionExpert]]:
    """The experts with the largest weights, and these weights divided by their sum.

    Args:
        experts: All of them.
        weights: That of each, `(experts,)`.
        k: How many.

    Raises:
        ValueError: There are not so many.
    """
    if not 1 <= k <= len(experts):
        raise ValueError(f"k = {k}: must be from 1 to {len(experts)}, the experts there are.")
    values, numbers = weights.topk(k)
    return values / values.sum(), [experts[number] for number in numbers.tolist()]


class Experts:
    """A mixture of diffusers, taken apart.

    Args:
        loaded: The checkpoint.
        device: Where it is.

    Attributes:
        experts: All experts, in order.
        router: Their router.
    """

    def __init__(self, loaded: LoadedModel, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._args = args = loaded.model_args
        self._process = build_process(loaded.job_config.objective, args.in_channels)
        folder = loaded.job_config.multimodal.vae or loaded.job_config.sampling.vae
        self._vae: Vae | None = load_vae(folder, device) if folder else None
        prompts = Prompts(loaded, device)
        model: Any = loaded.model
        self.router = PromptRouter(model.router, prompts, self.initialize_noise())
        self.experts = [
            DiffusionExpert(name, model.experts[name], expert_args, prompts)
            for name, expert_args in zip(args.names, args.expert_args, strict=True)
        ]

    def initialize_noise(self, seed: int = 0) -> Tensor:
        """Noise that an image begins as, `(1, channels, height, width)` float32."""
        size = self._args.image_size
        shape = (self._args.in_channels, size, size)
        return draw_normal(seed, torch.zeros(1, dtype=torch.int64), shape, "sampling/0").to(
            self._device
        )

    def diffusion_steps(self, num_steps: int) -> Iterator[Step]:
        """The steps from noise to image: DDIM's, or of a flow Euler's."""
        if isinstance(self._process, DDPM):
            times = [float(t) for t in reversed(spaced_steps(self._process.num_steps, num_steps))]
        else:
            assert isinstance(self._process, RectifiedFlow)
            grid = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64, device="cpu")
            times = (1000 * shift_times(grid, self._process.shift)).tolist()[:-1]
        for number, (time, following) in enumerate(zip(times, [*times[1:], None], strict=True)):
            yield Step(number, time, following)

    def update_latent(self, latent: Tensor, noise_pred: Tensor, step: Step) -> Tensor:
        """Take a step; arguments and result `(1, channels, height, width)`."""
        following = step.following
        if isinstance(self._process, RectifiedFlow):
            return latent + ((following or 0.0) - step.time) / 1000 * noise_pred
        assert isinstance(self._process, DDPM)
        visited = [] if following is None else [round(following)]
        tables = self._process.tables.respaced([*visited, round(step.time)])
        return ddim_step(tables, len(visited), latent, noise_pred, eta=0.0)[0]

    def decode(self, latent: Tensor) -> Tensor:
        """The picture, `(3, height, width)` float32 in [-1, 1]."""
        images = latent if self._vae is None else self._vae.decode(latent)
        return images[0].clamp(-1, 1)


def load_experts(folder: str | Path, device: torch.device | str = "cpu") -> Experts:
    """Load a mixture of diffusers from a run, one of its checkpoints, or a folder of experts.

    Raises:
        ValueError: It is none, or a model of another kind.
    """
    loaded = load_model(folder, device)
    if not is_mixture_of_diffusers(loaded.model_args) or loaded.model_args.router_only:
        raise ValueError(f"{loaded.path}: is no mixture of diffusers with experts.")
    return Experts(loaded, device)
