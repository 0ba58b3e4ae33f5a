"""Denoising as a training objective: from images to noised images, targets and a loss.

What is predicted and how it is scored is a `Process` (`ddpm.py`, `flow.py`); this module draws what
a batch needs, in patch space, and adds the losses of routers. Everything that is drawn for a sample
comes from a generator of its own, seeded by the run's seed and the sample's number: draws do not
depend on ranks, microbatches or devices, and a resumed run draws what it would have drawn.

The loss of a position is the mean over its patch, summed over positions; the trainer divides it by
the global number of positions. What is no loss of a position is multiplied by this rank's number of
positions first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures.data.domains import domain_names
from torchtitan_mixtures.data.vae import Vae, load_vae
from torchtitan_mixtures.job_config import MixtureJobConfig, Objective
from torchtitan_mixtures.objectives.balance import RouterMeter, router_losses
from torchtitan_mixtures.objectives.conditions import (
    ClassCondition,
    Condition,
    PromptCondition,
    RoutedCondition,
)
from torchtitan_mixtures.objectives.ddpm import DDPM
from torchtitan_mixtures.objectives.domain_meter import DomainMeter
from torchtitan_mixtures.objectives.flow import RectifiedFlow
from torchtitan_mixtures.objectives.meter import LossMeter
from torchtitan_mixtures.objectives.outputs import DenoiserOutput
from torchtitan_mixtures.objectives.patches import patchify
from torchtitan_mixtures.objectives.process import Process
from torchtitan_mixtures.objectives.randomness import draw_normal, draw_uniform
from torchtitan_mixtures.objectives.routing import RoutingTask

BANDS = 4
"""The training loss is reported in so many bands of noise, from little to much."""

VALIDATION_SEED = 0
"""Validation has the same noise in every run, whatever the run's seed."""


class DenoiserArgs(Protocol):
    """What the arguments of every denoising model say about what it sees.

    Those of a model with `is_prompted` also have `prompts`; of others, `num_classes`.
    """

    patch_size: int
    in_channels: int
    image_size: int

    def update_from_config(self, job_config: JobConfig) -> None:
        """Take over what the TOML decides."""
        ...


class DenoisingTargets(NamedTuple):
    """What a prediction is scored against; all in patch space, `(batch, tokens, values)`.

    Attributes:
        clean: The images.
        noise: What was added.
        times: Time of each sample, `(batch,)`, as the process counts it.
        labels: One slot for each position, `(batch, tokens)` int64; -100 = no loss.
        domains: Domain of each sample, `(batch,)` int64; None: the data has none.
    """

    clean: Tensor
    noise: Tensor
    times: Tensor
    labels: Tensor
    domains: Tensor | None = None


def build_process(config: Objective, channels: int) -> Process:
    """Build the process that `[objective]` describes for images of so many channels."""
    if config.kind == "flow":
        return RectifiedFlow(
            density=config.time_density,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            mode_scale=config.mode_scale,
            shift=config.time_shift,
        )
    return DDPM(
        num_steps=config.noise_steps,
        schedule=config.noise_schedule,
        learned_variance=config.learned_variance,
        channels=channels,
    )


class DenoisingLoss:
    """Draws noise for batches, and scores what a model makes of them.

    Args:
        process: What is predicted.
        args: The model's arguments, complete.
        config: The `[objective]` section.
        condition: What the model is told of an image.
        seed: Of everything that is drawn.
        sample_mesh: The ranks that hold other samples, for the load of routers.
        vae: Folder of the VAE that makes latents of the batch's pictures; empty: none.
        routing: How a mixture of diffusers learns; None: the model is none.
    """

    def __init__(
        self,
        process: Process,
        args: DenoiserArgs,
        config: Objective,
        condition: Condition,
        seed: int,
        sample_mesh: Callable[[], DeviceMesh | None] = lambda: None,
        vae: str = "",
        routing: RoutingTask | None = None,
    ) -> None:
        self.process = process
        self.meter = LossMeter(_band_names(BANDS), group="noise", in_bits=False)
        self.router_meter = RouterMeter(getattr(args, "num_token_experts", 0))
        self._args = args
        self._config = config
        self._condition = condition
        self._seed = seed
        self._sample_mesh = sample_mesh
        self.routing = routing
        self._vae_folder = vae
        self._vae: Vae | None = None

    def prepare(
        self,
        model: Any,
        tokenizer: Any,
        input_dict: dict[str, Tensor],
        labels: Tensor,
        parallel_dims: ParallelDims,
        job_config: MixtureJobConfig,
        level: int | None = None,
    ) -> tuple[Tensor, DenoisingTargets, dict[str, Tensor], dict[str, Any]]:
        """Noise a batch.

        Args:
            model: Not used; other objectives need it, as the next one.
            tokenizer: Not used.
            input_dict: The batch of an image loader, on the model's device: `input` `(batch,
                channels, height, width)`, `sample_index` `(batch,)` int64, and the condition.
            labels: `(batch, tokens)` int64.
            parallel_dims: The job's parallel layout.
            job_config: The job's configuration.
            level: In validation, which of the fixed noise levels; conditions are kept then, and
                `input_dict` is what `encode` returned. None: draw times and drop conditions.

        Returns:
            As TorchTitan's `post_dataloading_process`: inputs, targets, further inputs of `forward`
            and nothing else. Under context parallelism targets are this rank's part.
        """
        samples = input_dict["sample_index"].cpu()  # the one read of a microbatch by the host
        input_dict = {**input_dict, "sample_index": samples}
        device = input_dict["input"].device
        seed = self._seed if level is None else VALIDATION_SEED
        purpose = "training" if level is None else f"validation level {level}"
        if level is None:
            input_dict = self.encode(input_dict, seed)
        clean = input_dict["input"]
        if level is None:
            times = self.process.times(draw_uniform(seed, samples, f"{purpose}, time"))
        else:
            fixed = self.process.level_times(self._config.validation_levels)
            times = fixed[level].expand(len(samples)).clone()
        times = times.to(device)
        shape = tuple(clean.shape[1:])
        noise = draw_normal(seed, samples, shape, f"{purpose}, noise").to(device)
        noised = self.process.corrupt(clean, noise, times)
        extra = self._condition.inputs(input_dict, seed, purpose, level is None)
        extra["times"] = self.process.model_times(times)
        parts = [patchify(image, self._args.patch_size) for image in (clean, noise)]
        parts.append(labels)
        if parallel_dims.cp_enabled:
            mesh = parallel_dims.get_mesh("cp")
            parts = [part.chunk(mesh.size(), 1)[mesh.get_local_rank()] for part in parts]
        domains = input_dict.get("domain_labels")
        targets = DenoisingTargets(parts[0], parts[1], times, parts[2], domains)
        return noised, targets, extra, {}

    def encode(
        self, input_dict: dict[str, Tensor], seed: int = VALIDATION_SEED
    ) -> dict[str, Tensor]:
        """Let frozen encoders see a batch, so that it is what the model is to see.

        Args:
            input_dict: The batch of an image loader, on the model's device.
            seed: Of the latents that are drawn.

        Returns:
            The batch; its `input` is the images, or latents drawn from what a VAE says of them,
            `(batch, channels, height, width)` float32.
        """
        return {
            **self._condition.encode(input_dict),
            "input": self._encode_images(input_dict, seed),
        }

    def _encode_images(self, input_dict: dict[str, Tensor], seed: int) -> Tensor:
        images, samples = input_dict["input"], input_dict["sample_index"].cpu()
        if "latent_std" in input_dict:
            std = input_dict["latent_std"]
            noise = draw_normal(seed, samples, tuple(std.shape[1:]), "latents")
            return images + std * noise.to(std.device)
        if not self._vae_folder:
            return images
        if self._vae is None:
            self._vae = load_vae(self._vae_folder, images.device)
        size = tuple(side // self._vae.factor for side in images.shape[2:])
        noise = draw_normal(seed, samples, (self._args.in_channels, *size), "latents")
        return self._vae.encode(images, noise.to(images.device))

    def __call__(self, output: DenoiserOutput, targets: DenoisingTargets) -> Tensor:
        """Score a prediction; return a scalar sum over this rank's positions."""
        losses = self.score(output, targets)  # (batch, tokens)
        is_supervised = targets.labels != IGNORE_INDEX
        band = (self.process.fraction(targets.times) * BANDS).long().clamp(max=BANDS - 1)
        self._book(losses, is_supervised, band)
        total = losses.sum()
        if self.routing is not None:
            total = total + self.routing.further_loss(output, targets, is_supervised)
        if output.router is not None:
            mesh = self._sample_mesh()
            weights = self._config.balance_weight, self._config.z_weight
            router, means, balance = router_losses(output.router, mesh, *weights)
            self.router_meter.add(means, balance)
            total = total + router * is_supervised.sum()
        return total

    def score(self, output: DenoiserOutput, targets: DenoisingTargets) -> Tensor:
        """Loss of each position, `(batch, tokens)` float32; zero where there is none."""
        is_supervised = targets.labels != IGNORE_INDEX
        if self.routing is not None and self.routing.kind == "router":
            losses = self.routing.losses(output, targets.domains)[:, None]
        else:
            clean, noise = targets.clean, targets.noise
            losses = self.process.losses(output.prediction, clean, noise, targets.times)
        losses = losses * is_supervised
        if self.routing is not None and output.gates is not None:
            logits = output.router_logits
            self.routing.meter.add(losses, is_supervised, targets.domains, logits, output.gates)
        return losses

    def book_level(self, losses: Tensor, targets: DenoisingTargets, level: int) -> None:
        """Add the losses of a validation batch at one noise level to the meter."""
        band = torch.full_like(targets.times, level, dtype=torch.int64)
        self._book(losses, targets.labels != IGNORE_INDEX, band)

    def validation_meter(self) -> LossMeter:
        """Make a meter with one bucket for each fixed noise level."""
        return LossMeter(_band_names(self._config.validation_levels), "noise", in_bits=False)

    def _book(self, losses: Tensor, is_supervised: Tensor, band: Tensor) -> None:
        """Add losses `(batch, tokens)` to the bucket `(batch,)` of each sample."""
        rows = torch.stack([losses.detach().sum(1), is_supervised.sum(1)]).double()
        sums = rows.new_zeros(2, len(self.meter.names)).index_add_(1, band, rows)
        self.meter.add(sums[0], sums[1])

    def scalars(self) -> dict[str, float]:
        """What is reported of routers since `reset`; every rank must call this."""
        of_domains = {} if self.routing is None else self.routing.meter.scalars()
        return self.router_meter.scalars() | of_domains

    def reset(self) -> None:
        """Forget what was added to the meters."""
        self.meter.reset()
        self.router_meter.reset()
        if self.routing is not None:
            self.routing.meter.reset()


def _band_names(count: int) -> list[str]:
    """Name bands of noise by their middle, from 0 (none) to 1."""
    return [f"{(band + 0.5) / count:.4g}" for band in range(count)]


def denoiser_args(job_config: JobConfig) -> DenoiserArgs:
    """Look up the arguments of a job's flavour and complete them from its configuration."""
    spec = get_train_spec(job_config.model.name)
    model_args = cast(DenoiserArgs, spec.model_args[job_config.model.flavor])
    model_args.update_from_config(job_config)
    return model_args


def build_condition(job_config: MixtureJobConfig, model_args: Any) -> Condition:
    """Build what says to a job's model what is on its images."""
    config, is_mixture = job_config.objective, is_mixture_of_diffusers(model_args)
    noise = model_args.router_noise_shape if getattr(model_args, "router_noise", 0) > 0 else None
    if getattr(model_args, "is_prompted", False):
        data = job_config.multimodal
        condition: Condition = PromptCondition(
            model_args.prompts, config.prompt_dropout, data.text_encoders, data.text_encoder_dtype
        )
    else:
        own_noise = None if is_mixture else noise
        condition = ClassCondition(model_args.num_classes, config.class_dropout, own_noise)
    if not is_mixture:
        return condition
    training = job_config.diffusers.training
    noise = noise if training == "joint" else None
    return RoutedCondition(condition, noise, by_domain=training == "decentralised")


def is_mixture_of_diffusers(model_args: Any) -> bool:
    """Say whether a model's experts are whole denoising models, by its arguments."""
    return hasattr(model_args, "expert_args")


def build_routing(
    job_config: MixtureJobConfig, model_args: Any, loss_mesh: Callable[[], DeviceMesh | None]
) -> RoutingTask | None:
    """Build what a mixture of diffusers learns of domains; None for other models."""
    if not is_mixture_of_diffusers(model_args):
        return None
    config = job_config.diffusers
    domains, by_domain = domain_names(job_config), config.training != "joint"
    meter = DomainMeter(model_args.names, domains, by_domain, loss_mesh)
    return RoutingTask(config.training, config.router_weight, meter)


def build_denoising_loss(
    job_config: JobConfig, parallel_dims: ParallelDims | None = None, **unused: Any
) -> DenoisingLoss:
    """Build the loss for a TrainSpec (`build_loss_fn`)."""
    config = cast(MixtureJobConfig, job_config)
    args = denoiser_args(config)
    dims = parallel_dims

    def sample_mesh() -> DeviceMesh | None:
        return dims.get_mesh("batch") if dims is not None and dims.dp_enabled else None

    def loss_mesh() -> DeviceMesh | None:
        return dims.get_mesh("loss") if dims is not None and dims.dp_cp_enabled else None

    return DenoisingLoss(
        build_process(config.objective, args.in_channels),
        args,
        config.objective,
        build_condition(config, args),
        config.debug.seed or 0,
        sample_mesh,
        config.multimodal.vae,
        build_routing(config, args, loss_mesh),
    )
