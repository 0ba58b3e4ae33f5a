"""From logits to tokens: temperature, top-k, top-p, guidance, and numbers to draw with."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from torchtitan_mixtures.sampling.settings import SamplingSettings


def choose_tokens(
    logits: Tensor, allowed: Tensor, uniforms: Tensor, settings: SamplingSettings
) -> Tensor:
    """Choose one token per row.

    The temperature applies first, then top-k, then top-p to what top-k leaves. Where the logits
    are broken (`find_broken`) all tokens that may be chosen are equally likely.

    Args:
        logits: `(rows, vocab)`.
        allowed: Tokens that may be chosen, at least one a row, `(rows, vocab)` bool.
        uniforms: What the choice is made with, `(rows,)` float64 in [0, 1).
        settings: Temperature, top-k and top-p.

    Returns:
        `(rows,)` int64.
    """
    is_broken = find_broken(logits, allowed)
    logits = logits.masked_fill(is_broken[:, None], 0).masked_fill(~allowed, float("-inf"))
    if settings.temperature == 0:
        return logits.argmax(-1)
    # The largest is 0, so that no temperature makes an infinite one of it.
    logits = logits.double() - logits.double().amax(-1, keepdim=True)
    probabilities = (logits / settings.temperature).softmax(-1)
    if settings.top_k or settings.top_p < 1:
        probabilities = _keep_likeliest(probabilities, settings)
    # Mass is laid out by token id: by probability, tokens that are nearly as likely would change
    # places with every rounding, and another number of rows would draw other tokens.
    mass = probabilities.cumsum(-1)
    index = torch.searchsorted(mass, uniforms[:, None] * mass[:, -1:], right=True)
    # Rounding may put the number drawn on the end of all mass: then the last token that has any.
    ids = torch.arange(mass.shape[1], device=mass.device)
    last = torch.where(probabilities > 0, ids, 0).amax(-1, keepdim=True)
    return index.minimum(last)[:, 0]


def find_broken(logits: Tensor, allowed: Tensor) -> Tensor:
    """Find the rows that nothing can be chosen by: a logit of an allowed token is not finite.

    Args:
        logits: `(rows, vocab)`.
        allowed: Tokens that may be chosen, `(rows, vocab)` bool.

    Returns:
        `(rows,)` bool.
    """
    return (allowed & ~logits.isfinite()).any(-1)


def _keep_likeliest(probabilities: Tensor, settings: SamplingSettings) -> Tensor:
    """Set to zero what top-k and top-p leave out, `(rows, vocab)`; of equals the first stay."""
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    if settings.top_k:
        ordered[:, settings.top_k :] = 0
    if settings.top_p < 1:
        likelier = ordered.cumsum(-1) - ordered  # mass in front of each token
        ordered[likelier >= settings.top_p * ordered.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(ordered).scatter(-1, tokens, ordered)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), of logits.

    Args:
        conditional: Logits given the prompt, `(rows, vocab)`.
        unconditional: Logits without it, `(rows, vocab)`.
        scale: 1 gives the former, 0 the latter, more exaggerates the difference.

    Returns:
        `(rows, vocab)` float64: what is exaggerated may be too large for the model's own type.
    """
    return unconditional + scale * (conditional.double() - unconditional)


def draw_uniforms(seed: int, numbers: Sequence[int], steps: int) -> Tensor:
    """Draw all that samples are chosen with, each from a generator of its own.

    Args:
        seed: Seed of all samples.
        numbers: Number of each sample: it and the seed decide, not what else is in the batch.
        steps: Tokens to choose.

    Returns:
        `(samples, steps)` float64 in [0, 1), on the CPU.
    """
    rows = []
    for number in numbers:
        own_seed = random.Random(f"{seed}/{number}").getrandbits(63)
        generator = torch.Generator().manual_seed(own_seed)
        rows.append(torch.rand(steps, generator=generator, dtype=torch.float64))
    return torch.stack(rows)
