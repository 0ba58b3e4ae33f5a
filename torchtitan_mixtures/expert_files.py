"""Models as safetensors and JSON: single ones, and mixtures of diffusers with a folder per expert.

    DIR/config.json                  as in checkpoints; of a mixture it also says which experts the
                                     router has not learned, "unrouted"
    DIR/model.safetensors            of a single model: its parameters
    DIR/router/model.safetensors     of a mixture: those of its router. Rows of its head go by the
                                     names in the file's metadata, not by place
    DIR/experts/NAME/                of a mixture: each expert as a single model

Nothing here can run code when it is read, and nothing outside of the folder is read: names of
experts have letters, digits, `_` and `-` alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
EXPERTS = "experts"
ROUTER = "router"

_ROWS = "experts"  # in the metadata of a router's file
HEAD = ("head.weight", "head.bias")
"""What has a row for each expert, of a router."""

NEVER = -1e4
"""Bias of an expert that the router has not learned: a probability of exactly zero."""


def is_single(folder: Path) -> bool:
    """Say whether a folder holds a single model."""
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def is_mixture(folder: Path) -> bool:
    """Say whether a folder holds a mixture of diffusers."""
    return (folder / ROUTER / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def expert_folder(folder: Path, name: str) -> Path:
    """Where the expert of a name is, or would be."""
    return folder / EXPERTS / name


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file of tensors, and its metadata.

    Raises:
        ValueError: It is missing or broken; names it.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}.") from None


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of the tensors of a file, of which the header alone is read.

    Raises:
        ValueError: It is missing or broken; names it.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors: {error}.") from None


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file of tensors, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(ready, partial, {"format": "pt", **(metadata or {})})
    partial.replace(path)


def read_rows(folder: Path) -> list[str]:
    """Name the experts that rows of a mixture's router are of; the file's header alone is read.

    Raises:
        ValueError: The file is missing or broken, or does not say whose rows it has.
    """
    path = folder / ROUTER / WEIGHTS
    shapes = read_shapes(path)
    counts = [shapes.get(name, [])[:1] for name in HEAD]
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_ROWS, "")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError:
        rows = None
    is_list = isinstance(rows, list) and all(isinstance(name, str) for name in rows)
    if not is_list or len(set(rows)) < len(rows) or counts != [[len(rows)]] * len(HEAD):
        raise ValueError(f"{path}: does not say which experts its rows are of.")
    return rows


def read_router(
    folder: Path, names: Sequence[str], unrouted: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Read the router of a mixture, rows of its head in an order of experts.

    Args:
        folder: The mixture's.
        names: Experts; those that the router has no row for are never chosen.
        unrouted: Of these neither, whatever rows there are: one may be left of an expert of the
            same name whose removal was interrupted.

    Raises:
        ValueError: The file is missing or broken, or does not say whose rows it has.
    """
    rows = read_rows(folder)
    tensors, _ = read_tensors(folder / ROUTER / WEIGHTS)
    weight, bias = (tensors[name] for name in HEAD)
    known = set(rows) - set(unrouted)
    found = [rows.index(name) if name in known else None for name in names]
    unknown = torch.zeros_like(weight[0]), torch.full_like(bias[0], NEVER)
    tensors["head.weight"] = torch.stack([unknown[0] if r is None else weight[r] for r in found])
    tensors["head.bias"] = torch.stack([unknown[1] if r is None else bias[r] for r in found])
    return tensors


def write_router(folder: Path, tensors: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Write the router of a mixture, with the names that rows of its head are of."""
    write_tensors(folder / ROUTER / WEIGHTS, tensors, {_ROWS: json.dumps(list(names))})


def read_state(
    folder: Path, names: Sequence[str] = (), unrouted: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Read all parameters of a folder, under the names that its model gives them.

    Args:
        folder: Of a single model or a mixture.
        names: Of a mixture its experts, in order.
        unrouted: Of a mixture the experts that its router has not learned.

    Raises:
        ValueError: A file is missing or broken; names it.
    """
    if is_single(folder):
        return read_tensors(folder / WEIGHTS)[0]
    router = read_router(folder, names, unrouted)
    state = {f"{ROUTER}.{name}": tensor for name, tensor in router.items()}
    for expert in names:
        tensors, _ = read_tensors(expert_folder(folder, expert) / WEIGHTS)
        state |= {f"{EXPERTS}.{expert}.{name}": tensor for name, tensor in tensors.items()}
    return state
