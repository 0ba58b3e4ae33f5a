"""Weights that other libraries wrote, and the JSON beside them.

What is exchanged is safetensors and JSON, which cannot run code; pickled weights are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_REMEDY = "convert it to safetensors first (save_pretrained(DIR) of the library does)"


def read_weights(source: Path, name: str) -> dict[str, Tensor]:
    """Read weights, which may be in several files.

    Args:
        source: A folder, or a safetensors file.
        name: Of the file in a folder, without `.safetensors`.

    Raises:
        ValueError: They are not there, broken, or pickled.
    """
    weights = {}
    for path in _weight_files(source, name):
        if path.suffix != ".safetensors":
            raise ValueError(
                f"--from {path}: only safetensors files are read, pickled ones can run code; "
                f"{_REMEDY}."
            )
        try:
            weights |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"--from {path}: cannot be read: {error}") from None
    return weights


def _weight_files(source: Path, name: str) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise ValueError(f"--from {source}: no such file or folder.")
    whole = source / f"{name}.safetensors"
    if whole.is_file():
        return [whole]
    index = read_json(source / f"{whole.name}.index.json")
    if index is not None:
        # Names, not paths: an index from elsewhere stays within its folder.
        names = {Path(file).name for file in (index.get("weight_map") or {}).values()}
        return [source / file for file in sorted(names)]
    pickled = sorted(path.name for path in source.glob("*.bin")) + sorted(
        path.name for path in source.glob("*.pt*")
    )
    instead = (
        f"; {', '.join(pickled)} would have to be unpickled, which can run code: {_REMEDY}"
        if pickled
        else ""
    )
    raise ValueError(f"--from {source}: no {whole.name} in the folder{instead}.")


def read_json(path: Path) -> dict[str, Any] | None:
    """Read an object; None if there is no such file.

    Raises:
        ValueError: It is something else.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object.")
    return content
