"""Weights of a model for images of another size.

Only token mixers have weights for single tokens. A resized mixer does what the old one did, on the
old grid: tokens are resampled to it, mixed, and resampled back, all folded into its matrices. A
token's input weights are thereby spread over the tokens of a finer grid (bicubic, times the old
number of tokens / the new one), its output weights and bias repeated (bicubic).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_mixtures.models.mom.args import MoMModelArgs

_FREE_FIELDS = {"image_size", "token_ratio", *MoMModelArgs.resumable_fields}


class _Weights(NamedTuple):
    """Those of the token mixers of a layer, see `Mixers`."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor


def resize_token_mixers(
    state_dict: Mapping[str, Tensor], old_args: MoMModelArgs, new_args: MoMModelArgs
) -> dict[str, Tensor]:
    """Turn the weights of a model into those of a model for images of another size.

    A mixer has hidden units in proportion to tokens. If there are more, the old ones come first
    and the mixer computes what it computed: the others repeat their input weights, with output
    weights of zero, from which training tells them apart. If there are fewer, those remain that
    have the largest product of the norms of their input and output weights.

    Args:
        state_dict: Parameter name -> plain tensor; not changed.
        old_args: Arguments of the model it is of.
        new_args: Arguments of the model to be; `image_size` and `token_ratio` may differ.

    Returns:
        Parameter name -> plain tensor; those of other layers are the same tensors.

    Raises:
        ValueError: Names a field that must not differ.
    """
    before, after = dataclasses.asdict(old_args), dataclasses.asdict(new_args)
    for name in before.keys() - _FREE_FIELDS:
        if before[name] != after[name]:
            raise ValueError(
                f"{name} is {before[name]!r} in the checkpoint's model and {after[name]!r} in the "
                "new one: only the size of images can be changed."
            )
    resized = dict(state_dict)
    for name in state_dict:
        if not name.endswith("token_mixers.w1"):
            continue
        names = [name.removesuffix("w1") + part for part in _Weights._fields]
        weights = _Weights(*(state_dict[part] for part in names))
        if old_args.num_tokens != new_args.num_tokens:
            weights = _resize_tokens(weights, old_args.num_tokens, new_args.num_tokens)
        if old_args.token_hidden_dim != new_args.token_hidden_dim:
            weights = _resize_hidden(weights, new_args.token_hidden_dim)
        resized |= dict(zip(names, weights, strict=True))
    return resized


def resample_matrix(old_tokens: int, new_tokens: int) -> Tensor:
    """Bicubic resampling of a square grid as a matrix, `(new_tokens, old_tokens)` float64.

    Rows sum to 1, so that what is the same everywhere stays so. A grid that becomes coarser is
    low-pass filtered.
    """
    old, new = math.isqrt(old_tokens), math.isqrt(new_tokens)
    basis = torch.eye(old_tokens, dtype=torch.float64).view(old_tokens, 1, old, old)
    images = F.interpolate(basis, (new, new), mode="bicubic", antialias=True)
    return images.view(old_tokens, new_tokens).t().contiguous()


def _resize_tokens(old: _Weights, old_tokens: int, new_tokens: int) -> _Weights:
    device, dtype = old.w1.device, old.w1.dtype
    to_old = resample_matrix(new_tokens, old_tokens).to(device)
    to_new = resample_matrix(old_tokens, new_tokens).to(device)
    return _Weights(
        w1=(old.w1.double() @ to_old).to(dtype),
        b1=old.b1,
        w2=(to_new @ old.w2.double()).to(dtype),
        b2=(old.b2.double() @ to_new.t()).to(dtype),
    )


def _resize_hidden(old: _Weights, hidden: int) -> _Weights:
    num_old = old.w1.shape[1]
    if hidden > num_old:
        repeated = torch.arange(hidden, device=old.w1.device) % num_old
        w2 = F.pad(old.w2, (0, hidden - num_old))
        return _Weights(old.w1[:, repeated], old.b1[:, repeated], w2, old.b2)
    importance = old.w1.double().norm(dim=2) * old.w2.double().norm(dim=1)  # (experts, hidden)
    kept = importance.topk(hidden, dim=1).indices.sort(dim=1).values
    return _Weights(
        w1=old.w1.gather(1, kept[:, :, None].expand(-1, -1, old.w1.shape[2])),
        b1=old.b1.gather(1, kept),
        w2=old.w2.gather(2, kept[:, None].expand(-1, old.w2.shape[1], -1)),
        b2=old.b2,
    )
