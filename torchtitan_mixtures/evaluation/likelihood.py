"""Log-likelihoods of many continuations of many beginnings, at the price of few forward passes.

The continuations of one beginning share it: they stand behind it in one row, each seeing the
beginning and itself only, and each at the positions it would have alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchtitan.protocols import ModelProtocol

from torchtitan_mixtures.data.encoding import Modalities, Tokens
from torchtitan_mixtures.sampling.generate import number_images

ROW_TOKENS = 512
"""Continuations share a row up to this many tokens: attention sees all of a row, mostly in vain."""

BATCH_TOKENS = 4096

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """A beginning and some of its continuations, one behind the other."""

    beginning: int
    """Index of the beginning."""

    continuations: range
    """Indices of the continuations."""

    tokens: Tokens
    positions: Tokens
    """Of each token in the document of its own continuation."""

    owners: Tokens
    """Continuation of each token, counted from 1; 0 in the beginning."""

    @property
    def predictors(self) -> Tokens:
        """For each token after the beginning: the index of the token that predicts it."""
        indices = np.arange(len(self.tokens))
        start = int(np.count_nonzero(self.owners == 0))
        is_first = np.diff(self.owners, prepend=0) != 0
        return np.where(is_first, start - 1, indices - 1)[start:]


@torch.no_grad()
def score_continuations(
    model: ModelProtocol,
    beginnings: Sequence[Tokens],
    continuations: Sequence[Tokens],
    progress: Progress = lambda done, total: None,
) -> NDArray[np.float64]:
    """Log-likelihood of every continuation after every beginning.

    Args:
        model: A decoder over token ids, in evaluation mode.
        beginnings: Token ids of each, at least one.
        continuations: Token ids of each, at least one.
        progress: Called with how many beginnings are done, and how many there are.

    Returns:
        `(beginnings, continuations)`, in nats, summed over the tokens of the continuation.

    Raises:
        ValueError: A document exceeds the positions of the model.
    """
    longest = max(map(len, beginnings)) + max(map(len, continuations))
    limit = model.model_args.max_seq_len  # pyrefly: ignore [missing-attribute]
    if longest > limit:
        raise ValueError(
            f"a document of {longest} tokens is longer than the {limit} positions of the model; "
            "evaluate shorter captions, or a model with a longer training.seq_len."
        )
    scores = np.empty((len(beginnings), len(continuations)))
    rows = iter(_fill_rows(beginnings, continuations))
    while batch := list(_take_tokens(rows)):
        for row, found in zip(batch, _score_rows(model, batch), strict=True):
            scores[row.beginning, row.continuations.start : row.continuations.stop] = found
        progress(batch[-1].beginning, len(beginnings))
    progress(len(beginnings), len(beginnings))
    return scores


def _fill_rows(beginnings: Sequence[Tokens], continuations: Sequence[Tokens]) -> Iterator[Row]:
    lengths = np.array([len(tokens) for tokens in continuations])
    for index, beginning in enumerate(beginnings):
        first = 0
        while first < len(continuations):
            room = ROW_TOKENS - len(beginning)
            count = max(1, int(np.searchsorted(lengths[first:].cumsum(), room, side="right")))
            chosen = continuations[first : first + count]
            after = [len(beginning) + np.arange(len(tokens)) for tokens in chosen]
            yield Row(
                beginning=index,
                continuations=range(first, first + count),
                tokens=np.concatenate([beginning, *chosen]),
                positions=np.concatenate([np.arange(len(beginning)), *after]),
                owners=np.repeat(
                    np.arange(count + 1), [len(beginning), *lengths[first : first + count]]
                ),
            )
            first += count


def _take_tokens(rows: Iterator[Row]) -> Iterator[Row]:
    """The next rows, to some `BATCH_TOKENS` tokens."""
    return islice(rows, max(1, BATCH_TOKENS // ROW_TOKENS))


def _score_rows(model: ModelProtocol, rows: Sequence[Row]) -> list[NDArray[np.float64]]:
    """Score the continuations of each row in one forward pass."""
    device = next(model.parameters()).device
    tokens, positions, owners = (
        pad_sequence(
            [torch.from_numpy(getattr(row, name)) for row in rows],
            batch_first=True,
            padding_value=padding,
        ).to(device)
        for name, padding in (("tokens", 0), ("positions", 0), ("owners", -1))
    )  # (rows, tokens) each
    masks = _visible(owners) | _same_image(model, tokens, owners)
    logits = model(tokens, positions=positions, attention_masks=masks)
    scores = []
    for row, row_logits in zip(rows, logits, strict=True):
        start = len(row.tokens) - len(row.predictors)
        targets = torch.from_numpy(row.tokens[start:]).to(device)
        predictors = torch.from_numpy(row.predictors).to(device)
        chosen = row_logits[predictors]
        log_probs = chosen.to(torch.promote_types(chosen.dtype, torch.float32)).log_softmax(-1)
        found = log_probs.gather(1, targets[:, None]).squeeze(1).double().cpu().numpy()
        scores.append(np.bincount(row.owners[start:] - 1, found).astype(np.float64))
    return scores


def _visible(owners: Tensor) -> Tensor:
    """Which tokens see which: `(rows, tokens)` owners -> `(rows, 1, tokens, tokens)` bool."""
    seq = owners.shape[1]
    is_past = torch.ones(seq, seq, dtype=torch.bool, device=owners.device).tril()
    is_same = owners[:, :, None] == owners[:, None, :]
    return (is_past & (is_same | (owners == 0)[:, None, :]))[:, None]


def _same_image(model: ModelProtocol, tokens: Tensor, owners: Tensor) -> Tensor:
    """What a model with bidirectional images sees besides: later codes of an image it was given.

    Returns:
        `(rows, 1, tokens, tokens)` bool, or a single False.
    """
    args: Any = model.model_args  # pyrefly: ignore [missing-attribute]
    if not getattr(args, "bidirectional_images", False):
        return torch.zeros((), dtype=torch.bool, device=tokens.device)
    modalities = Modalities(tuple(args.modality_names), tuple(args.vocab_ranges))
    images = number_images(tokens.masked_fill(owners != 0, 0), modalities)  # 0 is text
    is_same = images[:, :, None] == images[:, None, :]
    return (is_same & (images >= 0)[:, :, None])[:, None]
