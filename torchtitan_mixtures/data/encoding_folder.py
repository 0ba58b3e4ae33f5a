"""Folders that encoders of data sets write: a plan, shards, and last what is in them.

Shards are written whole or not at all, and those that are there are kept: a run that ended early
goes on where it was. So the plan, written first, says what the rest of them must be made of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from torchtitan_mixtures.data.latents import PLAN, write_json


def begin_folder(out: Path, plan: Mapping[str, Any], what: str, others: Mapping[str, str]) -> None:
    """Make a folder, or check that what is in it was begun for the same plan.

    Args:
        out: The folder.
        plan: What the shards depend on.
        what: What they hold, for messages.
        others: What messages call another value of a key of the plan, if not "another" key.

    Raises:
        ValueError: It holds something else.
    """
    wanted = json.loads(json.dumps(plan))  # with lists for tuples, as it is read
    path = out / PLAN
    if not path.is_file():
        if out.exists() and (not out.is_dir() or any(p.suffix != ".tmp" for p in out.iterdir())):
            raise ValueError(f"--out {out}: exists and holds no {what}; name a new folder.")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = next((key for key in wanted if wanted[key] != found.get(key)), None)
    except (ValueError, AttributeError):
        raise ValueError(
            f"--out {out}: {path} cannot be read; name a new folder, or delete this one."
        ) from None
    if differing is not None:
        other = others.get(differing, f"another {differing}")
        raise ValueError(
            f"--out {out}: was begun with {other} ({path}); name a new folder, or delete this one."
        )


def write_shard(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Write a shard, whole or not at all.

    Args:
        path: The file.
        tensors: What it holds.
        notes: What is said of it beside, in JSON.
    """
    metadata = {key: json.dumps(note) for key, note in notes.items()}
    temporary = path.with_name(path.name + ".tmp")
    # Not `save_file`, whose files nobody else may read.
    temporary.write_bytes(save(dict(tensors), metadata=metadata))
    temporary.replace(path)


def read_shard(path: Path, tensor: str, note: str) -> tuple[int, Any]:
    """Look into a finished shard.

    Args:
        path: The file.
        tensor: One that has a row for each item.
        note: One that was written.

    Returns:
        The number of items, and the note.

    Raises:
        ValueError: It is corrupt.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice(tensor).get_shape()[0], json.loads(file.metadata()[note])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: corrupt ({error}); delete it and run again.") from error
