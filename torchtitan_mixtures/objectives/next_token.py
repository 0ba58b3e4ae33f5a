"""Next-token prediction over one vocabulary that spans all modalities.

The loss is a **sum** over supervised positions; the trainer divides it by the global number of
labels that are not -100, which makes gradient accumulation, data parallelism and mixed objectives
right without further code. A loss weight scales the terms of its positions, not that number:
`loss = sum_i weight_i * nll_i / count`.

The loss of a position is booked under the modality of its **target** token, while its tower was
chosen by its input token: the first code of an image is predicted by the text tower (from the
image-start sentinel) and counts as image loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import ModelProtocol
from torchtitan.tools.logging import logger

from torchtitan_mixtures.context_parallel import shard_batch, shard_batch_for_ring
from torchtitan_mixtures.data.vocabulary import token_model_args
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.objectives.meter import LossMeter


class Targets(NamedTuple):
    """What a batch is scored against.

    Attributes:
        labels: Token ids, `(batch, seq)` int64, -100 where there is no loss.
        loss_weights: Weight of each position, `(batch, seq)` float32, or None for all ones.
    """

    labels: Tensor
    loss_weights: Tensor | None = None

    def slice(self, start: int, stop: int) -> Targets:
        """Those of the rows `start` to `stop` of the batch, as views."""
        weights = self.loss_weights
        return Targets(self.labels[start:stop], None if weights is None else weights[start:stop])


def split_batch(
    input_dict: dict[str, Tensor], labels: Tensor
) -> tuple[Tensor, Targets, dict[str, Tensor]]:
    """Separate a batch into the model's inputs and the targets of the loss.

    Args:
        input_dict: The batch as `data/batch.py` describes it.
        labels: `(batch, seq)` int64.

    Returns:
        `(inputs, targets, extra_inputs)`: the token ids `(batch, seq)`, what the loss needs, and
        the keyword arguments of the model's `forward`.
    """
    extra_inputs = {k: v for k, v in input_dict.items() if k not in ("input", "loss_weights")}
    return input_dict["input"], Targets(labels, input_dict.get("loss_weights")), extra_inputs


def prepare_batch(
    model: ModelProtocol,
    tokenizer: BaseTokenizer,
    input_dict: dict[str, Tensor],
    labels: Tensor,
    parallel_dims: ParallelDims,
    job_config: MixtureJobConfig,
) -> tuple[Tensor, Targets, dict[str, Tensor], dict[str, Any]]:
    """Bring a batch to the form in which a model and the loss take it, in training and validation.

    Under context parallelism a rank keeps its part of every sequence, and all ids that attention
    masks are made of: models make their masks themselves, in every stage of a pipeline. Only the
    ring takes a mask that was cut along its queries beforehand.

    Args:
        model: Builds the ring's attention mask, if it takes any.
        tokenizer: The text tokenizer.
        input_dict: The batch as `data/batch.py` describes it.
        labels: `(batch, seq)` int64.
        parallel_dims: The job's parallel layout.
        job_config: The job's configuration.

    Returns:
        `(inputs, targets, extra_inputs, extra_kwargs)` as TorchTitan's `post_dataloading_process`
        returns them: pipeline parallelism hands only `extra_kwargs` to all stages.
    """
    extra_kwargs: dict[str, Any] = {}
    if parallel_dims.cp_enabled:
        mesh = parallel_dims.get_mesh("cp")
        tensors = {**input_dict, "labels": labels}
        if "positions" not in tensors:  # a part cannot count from 0
            tensors["positions"] = torch.arange(labels.shape[1], device=labels.device).expand(
                labels.shape
            )
        if job_config.mixture.context_parallel == "ring":
            mask = None
            if getattr(model.model_args, "attn_type", "sdpa") != "sdpa":
                mask = model.get_attention_masks(input_dict["input"], tokenizer, input_dict)
            balancer = job_config.parallelism.context_parallel_load_balancer
            tensors, mask = shard_batch_for_ring(tensors, mask, mesh, balancer)
            if mask is not None:
                extra_kwargs["attention_masks"] = mask
        else:
            tensors = shard_batch(tensors, mesh)
        labels = tensors.pop("labels")
        input_dict = tensors
    inputs, targets, extra_inputs = split_batch(input_dict, labels)
    if parallel_dims.pp_enabled:
        extra_inputs, extra_kwargs = {}, {**extra_inputs, **extra_kwargs}
    return inputs, targets, extra_inputs, extra_kwargs


def position_losses(pred: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label.

    Args:
        pred: Logits, `(batch, seq, vocab)`; under PyTorch's `loss_parallel` a DTensor of them that
            is cut along the vocabulary.
        labels: `(batch, seq)` int64; -100 gives 0.

    Returns:
        `(batch * seq,)`, in nats, in float32 at least; a plain tensor, the same on every rank that
        holds a part of the logits.
    """
    nll = F.cross_entropy(
        pred.flatten(0, 1).to(torch.promote_types(pred.dtype, torch.float32)),
        labels.flatten(0, 1),
        reduction="none",
        ignore_index=IGNORE_INDEX,
    )
    return nll.to_local() if isinstance(nll, DTensor) else nll


class NextTokenLoss:
    """Sum of weighted cross-entropies, with a meter of the unweighted loss of each modality."""

    def __init__(
        self,
        vocab_ranges: Sequence[tuple[int, int]],
        modality_names: Sequence[str],
        compile_backend: str | None = None,
    ):
        """Build the loss.

        Args:
            vocab_ranges: Half-open range of token ids of each modality, in ascending order.
            modality_names: Name of each modality.
            compile_backend: Backend of `torch.compile` for the cross-entropy; None runs it eagerly.
        """
        self.meter = LossMeter(modality_names)
        self._range_ends = [end for _, end in vocab_ranges]
        self._position_losses = position_losses
        if compile_backend:
            self._position_losses = torch.compile(position_losses, backend=compile_backend)

    prepare = staticmethod(prepare_batch)

    def __call__(self, pred: Tensor, targets: Targets | Tensor) -> Tensor:
        """Score logits `(batch, seq, vocab)` against targets; return a scalar sum in nats."""
        if not isinstance(targets, Targets):
            targets = Targets(targets)
        loss, nll_sums, counts = self.score(pred, targets)
        self.meter.add(nll_sums, counts)
        return loss

    def score(self, pred: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Score without a note in the meter.

        Returns:
            The loss, a scalar; the unweighted nll sum and the number of targets of each modality,
            `(modalities,)` each.
        """
        nll = self._position_losses(pred, targets.labels)
        nll_sums, counts = self._sums(nll.detach(), targets.labels.flatten())
        if targets.loss_weights is not None:
            nll = nll * targets.loss_weights.flatten()
        return nll.sum(), nll_sums, counts

    def _sums(self, nll: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and count the positions of each modality."""
        start = 0
        sums, counts = [], []
        for end in self._range_ends:
            members = (labels >= start) & (labels < end)
            sums.append((nll * members).sum())
            counts.append(members.sum())
            start = end
        return torch.stack(sums), torch.stack(counts)


def build_next_token_loss(
    job_config: JobConfig, parallel_dims: ParallelDims | None = None, **unused: Any
) -> NextTokenLoss:
    """Build the loss for a TrainSpec (`build_loss_fn`)."""
    args = token_model_args(job_config)
    backend = None
    if job_config.compile.enable and "loss" in job_config.compile.components:
        logger.info("Compiling the loss function with torch.compile")
        backend = job_config.compile.backend
    return NextTokenLoss(args.vocab_ranges, args.modality_names, backend)
