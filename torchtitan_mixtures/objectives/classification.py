"""Classification as a training objective: from images to logits, targets and a loss.

The loss of an image is the cross-entropy of a softmax over all classes. Where images have several
classes (`classification.multi_label`) it is the sum over classes of binary cross-entropies, as in
Big Vision's recipes for ImageNet-21k (Steiner et al. 2021, arXiv 2106.10270, "AugReg"), and not
their mean. Label smoothing by s takes s of a target and spreads it evenly over all K classes: t
becomes (1 - s) t + s / K, in both cases.

The loss is summed over images; the trainer divides it by their global number. Ranks of context
parallelism have parts of the same images but the same logits: each counts 1 / ranks of every image,
so that sums over all ranks are right. Images are what TorchTitan's log calls tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger

from torchtitan_mixtures.classifier_config import Classification
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.objectives.capacity import (
    CapacitySchedule,
    NestedArgs,
    own_capacity,
    same_flops_steps,
)
from torchtitan_mixtures.objectives.classification_meter import ClassificationMeter
from torchtitan_mixtures.objectives.meter import LossMeter
from torchtitan_mixtures.objectives.mixing import (
    Mix,
    draw_mix,
    is_mixed,
    mix_images,
    swap_partners,
)
from torchtitan_mixtures.objectives.outputs import ClassifierOutput
from torchtitan_mixtures.objectives.randomness import sample_generator

NO_LABEL = -1
"""Pads the classes of an image that has fewer than others."""

TOP_K = 5
"""Validation counts images whose class is among so many likeliest ones."""

VALIDATION_SEED = 0
"""Random routing is the same in every validation, whatever the run's seed."""


class ClassifierArgs(NestedArgs, Protocol):
    """What the arguments of a classifier say about what it sees."""

    num_tokens: int
    num_classes: int
    routing: str

    def update_from_config(self, job_config: JobConfig) -> None:
        """Take over what the TOML decides."""
        ...


class ClassificationTargets(NamedTuple):
    """What logits are scored against: numbers of classes, which many classes make no larger.

    Attributes:
        classes: Classes of each image, `(batch, labels)` int64, -1 = none; no class twice.
        labels: `(batch, 1)` int64; -100 = no image.
        others: Classes of the image that was mixed into it, as `classes`; None: no mixing.
        share: How much of the target the image's own classes are, `(batch,)` float32.
    """

    classes: Tensor
    labels: Tensor
    others: Tensor | None = None
    share: Tensor | None = None

    @property
    def is_image(self) -> Tensor:
        """Which rows are images, `(batch,)` bool."""
        return self.labels[:, 0] != IGNORE_INDEX


class ImageScores(NamedTuple):
    """What a model made of each image of a batch; all `(batch,)`.

    Attributes:
        losses: Against plain targets, without smoothing, float32.
        top_1: Whether the likeliest class is one of its classes.
        top_k: Whether its class is among the `TOP_K` likeliest; None if there are fewer, or images
            with several classes.
        is_image: Which rows are images; the others count for nothing.
    """

    losses: Tensor
    top_1: Tensor
    top_k: Tensor | None
    is_image: Tensor


class ClassificationLoss:
    """Mixes training images, says what each step spends on them, and scores logits.

    Args:
        args: The model's arguments, complete.
        config: The `[classification]` section.
        schedule: Capacity of each step.
        seed: Of everything that is drawn.
        parallel_dims: The job's parallel layout; None: one process.

    Attributes:
        meter: Losses of a step, as they are trained on.
        own_capacity: What is spent where nothing else is said.
        validation_seed: Of random routing in validation; another one is another draw.
        has_top_k: Whether `score` says if a class is among the `TOP_K` likeliest.
    """

    def __init__(
        self,
        args: ClassifierArgs,
        config: Classification,
        schedule: CapacitySchedule,
        seed: int,
        parallel_dims: ParallelDims | None = None,
    ) -> None:
        self.schedule = schedule
        # A bucket for each capacity: what is learned at one says little about another's loss.
        self._capacities = list(dict.fromkeys(schedule.levels))
        names = [f"{c:.4g}" for c in self._capacities]
        if args.routing == "argmax":  # has one capacity in name only
            names = ["of each token's choice"]
        self.meter = LossMeter(names, "capacity", in_bits=False)
        self._router_scale: Any = None
        self.details = ClassificationMeter(args.num_experts, parallel_dims)
        self._args = args
        self._config = config
        self._seed = seed
        self._copies = 1 if parallel_dims is None else parallel_dims.cp
        self._capacity = schedule.capacity(1)
        self.own_capacity = own_capacity(args)
        self.validation_seed = VALIDATION_SEED
        self.has_top_k = not config.multi_label and args.num_classes >= TOP_K

    def start_step(self, step: int) -> None:
        """Forget what was added to the meters, and take over the capacity of a step.

        Args:
            step: TorchTitan's number of it, from 1.
        """
        self.meter.reset()
        self.details.reset()
        self._capacity = self.schedule.capacity(step)

    def prepare(
        self,
        model: Any,
        tokenizer: Any,
        input_dict: dict[str, Tensor],
        labels: Tensor,
        parallel_dims: ParallelDims,
        job_config: MixtureJobConfig,
        capacity: float | None = None,
    ) -> tuple[Tensor, ClassificationTargets, dict[str, Tensor], dict[str, Any]]:
        """Mix the images of a batch, and say what is to be spent on them.

        Args:
            model: Whose alpha is reported.
            tokenizer: Not used.
            input_dict: The batch of an image loader, on the model's device: `input` `(batch,
                channels, height, width)`, `class_labels` `(batch,)` or `(batch, labels)` int64,
                `sample_index` `(batch,)` int64.
            labels: `(batch, 1)` int64.
            parallel_dims: Not used: all ranks of context parallelism take whole images.
            job_config: Not used.
            capacity: In validation, what to spend; nothing is mixed then. None: what the step has.

        Returns:
            As TorchTitan's `post_dataloading_process`: images, targets, further inputs of `forward`
            and its budget.

        Raises:
            ValueError: Images have several classes, but the loss is of one.
        """
        self._router_scale = getattr(model, "router_scale", None)
        images, classes = input_dict["input"], input_dict["class_labels"]
        if classes.dim() > 1 and not self._config.multi_label:
            raise ValueError(
                "classification.multi_label = false: the images of multimodal.path have several "
                "classes each; set it to true."
            )
        targets = ClassificationTargets(classes.view(len(classes), -1), labels)
        extra: dict[str, Tensor] = {}
        is_training = capacity is None
        mixes = is_training and is_mixed(self._config)
        is_random = self._args.routing == "random" and self._args.num_experts > 1
        if mixes or is_random:
            samples = input_dict["sample_index"].cpu()  # the one read of a microbatch by the host
            if mixes:
                images, targets = self._mix(images, targets, samples)
            if is_random:
                extra["scores"] = self._draw_scores(samples, is_training).to(images.device)
        budget = self._args.budget(self._capacity if capacity is None else capacity)
        return images, targets, extra, {"budget": budget}

    def _mix(
        self, images: Tensor, targets: ClassificationTargets, samples: Tensor
    ) -> tuple[Tensor, ClassificationTargets]:
        size = (images.shape[2], images.shape[3])
        mix = draw_mix(self._seed, samples, size, self._config.mixup, self._config.cutmix)
        mix = Mix(*(tensor.to(images.device) for tensor in mix))
        others, share = swap_partners(targets.classes), mix.share.repeat_interleave(2)
        return mix_images(images, mix), targets._replace(others=others, share=share)

    def _draw_scores(self, samples: Tensor, is_training: bool) -> Tensor:
        """Draw what experts choose tokens by, `(batch, routers, tokens, experts)` float32."""
        seed = self._seed if is_training else self.validation_seed
        purpose = f"{'training' if is_training else 'validation'}, routing"
        args = self._args
        shape = (len(samples), args.num_routers, args.num_tokens, args.num_experts)
        scores = torch.empty(shape, dtype=torch.float32, device="cpu")
        for row, sample in zip(scores, samples.tolist(), strict=True):
            row.uniform_(generator=sample_generator(seed, sample, purpose))
        return scores

    def __call__(self, output: ClassifierOutput, targets: ClassificationTargets) -> Tensor:
        """Score logits; return a scalar, this rank's share of the sum over images."""
        losses = self._losses(output.logits, targets, self._config.label_smoothing)
        is_image = targets.is_image
        total = (losses * is_image).sum() / self._copies
        count = is_image.sum() / self._copies
        sums = total.new_zeros(2, len(self._capacities), dtype=torch.float64)
        bucket = self._capacities.index(self._capacity)
        sums[0, bucket], sums[1, bucket] = total.detach(), count
        self.meter.add(sums[0], sums[1])
        if targets.others is None:
            hits = _is_among(output.logits.argmax(1, keepdim=True), targets.classes) & is_image
            self.details.add_hits(hits.sum() / self._copies, count)
        if output.router is not None:
            self.details.add_routing(output.router)
        return total

    @torch.no_grad()
    def score(self, output: ClassifierOutput, targets: ClassificationTargets) -> ImageScores:
        """Score each image of a validation batch, without a note in the meters."""
        logits = output.logits
        losses = self._losses(logits, targets, label_smoothing=0.0)
        count = TOP_K if self.has_top_k else 1
        likeliest = logits.topk(count, 1).indices
        top_1 = _is_among(likeliest[:, :1], targets.classes)
        top_k = _is_among(likeliest, targets.classes) if count > 1 else None
        return ImageScores(losses, top_1, top_k, targets.is_image)

    def _losses(
        self, logits: Tensor, targets: ClassificationTargets, label_smoothing: float
    ) -> Tensor:
        """Loss of each row, `(batch,)`, in float32 at least; of rows without image anything."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses_of = multi_label_losses if self._config.multi_label else cross_entropies
        return losses_of(logits, targets, label_smoothing)

    def scalars(self) -> dict[str, float]:
        """What is reported beside the loss, of the microbatches of a step; all ranks must ask."""
        return self.details.scalars() | self._alphas()

    def _alphas(self) -> dict[str, float]:
        """Alpha of the model, or of each layer: as long as it is 0 routers learn nothing."""
        if self._router_scale is None:
            return {}
        alpha: Tensor = self._router_scale.alpha.detach()
        whole = alpha.full_tensor() if isinstance(alpha, DTensor) else alpha
        values = whole.tolist()
        if len(values) == 1:
            return {"nested/alpha": values[0]}
        return {f"nested/layer_{layer}/alpha": value for layer, value in enumerate(values)}


def cross_entropies(
    logits: Tensor, targets: ClassificationTargets, label_smoothing: float
) -> Tensor:
    """Cross-entropy of a softmax against each image's class, `(batch,)`.

    Args:
        logits: `(batch, classes)`.
        targets: With one class for each image.
        label_smoothing: As that of PyTorch's `cross_entropy`.
    """
    surprise = -F.log_softmax(logits, 1)
    losses = (1 - label_smoothing) * _mixed_sum(surprise, targets)
    return losses + label_smoothing * surprise.mean(1)


def multi_label_losses(
    logits: Tensor, targets: ClassificationTargets, label_smoothing: float
) -> Tensor:
    """Binary cross-entropies of sigmoids, summed over classes, `(batch,)`.

    That of a target t is softplus(x) - t x, so that no targets of all classes are needed.

    Args:
        logits: `(batch, classes)`.
        targets: With any number of classes for each image.
        label_smoothing: See the head of this file.
    """
    own = (1 - label_smoothing) * _mixed_sum(logits, targets)
    return F.softplus(logits).sum(1) - own - label_smoothing * logits.mean(1)


def _mixed_sum(values: Tensor, targets: ClassificationTargets) -> Tensor:
    """Sum `(batch, classes)` over each image's classes, weighted by its share: `(batch,)`."""
    own = _sum_over(values, targets.classes)
    if targets.others is None or targets.share is None:
        return own
    return targets.share * own + (1 - targets.share) * _sum_over(values, targets.others)


def _sum_over(values: Tensor, classes: Tensor) -> Tensor:
    picked = values.gather(1, classes.clamp(min=0))
    return (picked * (classes != NO_LABEL)).sum(1)


def _is_among(guesses: Tensor, classes: Tensor) -> Tensor:
    """Say whether any guess `(batch, guesses)` is any of the classes `(batch, labels)`."""
    return (guesses[:, :, None] == classes[:, None, :]).flatten(1).any(1)


def classifier_args(job_config: JobConfig) -> ClassifierArgs:
    """Look up the arguments of a job's flavour and complete them from its configuration."""
    spec = get_train_spec(job_config.model.name)
    args = cast(ClassifierArgs, spec.model_args[job_config.model.flavor])
    args.update_from_config(job_config)
    return args


def build_schedule(config: MixtureJobConfig, args: ClassifierArgs) -> CapacitySchedule:
    """Build the schedule of a job."""
    seed = config.debug.seed or 0
    return CapacitySchedule(config.nested, config.training.steps, seed, own_capacity(args))


def lengthen_to_same_flops(job_config: MixtureJobConfig) -> None:
    """Give a job the steps that cost what its steps of the dense model would, and log it.

    The job then says how many steps it has, and no more that there is something to do about it.
    """
    args, training = classifier_args(job_config), job_config.training
    steps = same_flops_steps(training.steps, args, build_schedule(job_config, args))
    logger.info(
        f"nested.same_flops: {steps:,} steps, which cost as many multiply-adds as "
        f"training.steps = {training.steps:,} of the dense model"
    )
    training.steps, job_config.nested.same_flops = steps, False


def build_classification_loss(
    job_config: JobConfig, parallel_dims: ParallelDims | None = None, **unused: Any
) -> ClassificationLoss:
    """Build the loss for a TrainSpec (`build_loss_fn`)."""
    config = cast(MixtureJobConfig, job_config)
    args = classifier_args(config)
    schedule = build_schedule(config, args)
    seed = config.debug.seed or 0
    return ClassificationLoss(args, config.classification, schedule, seed, parallel_dims)
