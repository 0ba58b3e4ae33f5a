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

from torchtitan_mixtures.data.vocabulary import token_model_args


class Targets(NamedTuple):
    """What a batch is scored against.

    Attributes:
        labels: Token ids, `(batch, seq)` int64, -100 where there is no loss.
        loss_weights: Weight of each position, `(batch, seq)` float32, or None for all ones.
    """

    labels: Tensor
    loss_weights: Tensor | None = None


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
) -> tuple[Tensor, Targets, dict[str, Tensor], dict[str, Any]]:
    """Bring a batch to the form in which a model and the loss take it, in training and validation.

    Args:
        model: Builds its attention masks, if it takes any.
        tokenizer: The text tokenizer.
        input_dict: The batch as `data/batch.py` describes it.
        labels: `(batch, seq)` int64.

    Returns:
        `(inputs, targets, extra_inputs, extra_kwargs)` as TorchTitan's `post_dataloading_process`
        returns them: pipeline parallelism hands only `extra_kwargs` to all stages.
    """
    inputs, targets, extra_inputs = split_batch(input_dict, labels)
    # Asked first: the host's own way, to call and to catch the TypeError of a model without masks,
    # would also hide a fault in the making of one.
    if getattr(getattr(model, "model_args", None), "attn_type", "sdpa") == "sdpa":
        return inputs, targets, extra_inputs, {}
    masks = model.get_attention_masks(inputs, tokenizer, extra_inputs)
    return inputs, targets, extra_inputs, {"attention_masks": masks}


class LossMeter:
    """Running sums of loss and supervised positions per modality, kept on the device.

    Adding to it never waits for the device; reading does, and so happens only when metrics are
    logged.
    """

    def __init__(self, modality_names: Sequence[str]):
        self.modality_names = tuple(modality_names)
        self.sums: Tensor | None = None  # (2, modalities) float64: nll sums, counts

    def reset(self) -> None:
        """Forget everything added so far."""
        self.sums = None

    def add(self, nll: Tensor, counts: Tensor) -> None:
        """Add the nll sums and counts of one microbatch, each `(modalities,)`."""
        update = torch.stack([nll.detach().double(), counts.double()])
        self.sums = update if self.sums is None else self.sums + update

    def totals(self, device: torch.device) -> Tensor:
        """Return this rank's sums, `(2, modalities)` float64, zeros if nothing was added."""
        if self.sums is None:
            return torch.zeros(2, len(self.modality_names), dtype=torch.float64, device=device)
        return self.sums


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

    def __call__(self, pred: Tensor, targets: Targets | Tensor) -> Tensor:
        """Score logits `(batch, seq, vocab)` against targets; return a scalar sum in nats."""
        if not isinstance(targets, Targets):
            targets = Targets(targets)
        nll = self._position_losses(pred, targets.labels)
        self._book(nll, targets.labels.flatten())
        if targets.loss_weights is not None:
            nll = nll * targets.loss_weights.flatten()
        return nll.sum()

    def _book(self, nll: Tensor, labels: Tensor) -> None:
        """Add each modality's share of one microbatch to the meter."""
        start = 0
        sums, counts = [], []
        for end in self._range_ends:
            members = (labels >= start) & (labels < end)
            sums.append((nll.detach() * members).sum())
            counts.append(members.sum())
            start = end
        self.meter.add(torch.stack(sums), torch.stack(counts))


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
