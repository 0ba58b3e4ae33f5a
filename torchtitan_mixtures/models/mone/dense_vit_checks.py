"""Checks of the weights of dense ViTs that are to be imported; see `dense_vit.py`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from torchtitan_mixtures.models.mone.args import MoNEModelArgs

_LISTED = 10
"""Names of a kind that a message lists."""


def check_sizes(state: Mapping[str, Tensor], args: MoNEModelArgs, table: Mapping[str, str]) -> None:
    """Raise ValueError that names the fields in which a checkpoint differs from the flavour."""
    patches = state.get(f"{table['embedder.proj']}.weight")
    layer = re.escape(table["layers.{i}.attention_norm"]).replace(r"\{i\}", r"(\d+)")
    layers = {match[1] for name in state if (match := re.match(layer, name))}
    if patches is None or patches.dim() != 4 or not layers:
        return  # no ViT; missing names say so
    hidden = state.get(f"{table['layers.{i}.feed_forward.w1']}.weight".replace("{i}", "0"))
    found = {
        "dim": patches.shape[0],
        "in_channels": patches.shape[1],
        "patch_size": patches.shape[2],
        "n_layers": len(layers),
        "hidden_dim": args.hidden_dim if hidden is None else hidden.shape[0],
        "pool": "class_token" if table["embedder.class_token"] in state else "mean",
    }
    differing = [
        f"{name} = {value!r} (model: {getattr(args, name)!r})"
        for name, value in found.items()
        if value != getattr(args, name)
    ]
    if differing:
        raise ValueError(
            f"the checkpoint is of another model than model.flavor: {', '.join(differing)}. Choose "
            "another flavour."
        )


def check_head(state: Mapping[str, Tensor], args: MoNEModelArgs, table: Mapping[str, str]) -> None:
    """Raise ValueError, with the remedy, if a ViT has no head or one of other classes."""
    names = [f"{table['head']}.{leaf}" for leaf in ("weight", "bias")]
    found = [state[name] for name in names if name in state]
    if not found and f"{table['embedder.proj']}.weight" in state:
        raise ValueError(
            f"{', '.join(names)}: not in the checkpoint, which has no head; --new-head initialises "
            "one."
        )
    if found and len(found[0]) != args.num_classes:
        raise ValueError(
            f"the checkpoint's head has {len(found[0])} classes, the data {args.num_classes}; "
            "--new-head leaves it out and initialises another."
        )


def check_names(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError that lists parameters that are missing, unexpected or of another shape."""
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    found = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": shapes,
    }
    problems = [f"{what}: {_listed(names)}" for what, names in found.items() if names]
    if problems:
        raise ValueError(
            f"the checkpoint is not that of such a ViT; parameters {'; '.join(problems)}."
        )


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(list(names)[:_LISTED]) + more
