"""Codebooks: files of centres, and the search for the nearest of them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from torchtitan_mixtures.data.emoji import EMBEDDED_FOLDER, check_files

_CHUNK_DISTANCES = 2**23  # bounds the distance matrix to 32 MB (64 MB if in float64)


def split_patches(images: NDArray[np.uint8], patch_size: int) -> NDArray[np.uint8]:
    """Cut images into flat patches, row-major within each image.

    Args:
        images: `(batch, side, side, 3)` uint8; `side` is a multiple of `patch_size`.
        patch_size: Height and width of a patch.

    Returns:
        `(batch * grid * grid, patch_size * patch_size * 3)` uint8.
    """
    batch, side = images.shape[:2]
    grid = side // patch_size
    blocks = images.reshape(batch, grid, patch_size, grid, patch_size, 3)
    blocks = blocks.transpose(0, 1, 3, 2, 4, 5)  # (batch, grid, grid, patch, patch, 3)
    return blocks.reshape(batch * grid * grid, -1)


def nearest_centres(points: NDArray[np.uint8], centres: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Index of the nearest centre of each point, the lowest one on a tie.

    Args:
        points: `(points, dim)` uint8.
        centres: `(centres, dim)` uint8.

    Returns:
        `(points,)` int64.
    """
    # Every term is an integer. While all partial sums stay below 2**24 float32 holds them exactly,
    # so the result does not depend on the BLAS, its threads or the machine.
    dtype = np.float32 if 2 * centres.shape[1] * 255**2 < 2**24 else np.float64
    matrix = centres.astype(dtype)
    norms = (matrix * matrix).sum(1)
    doubled = np.ascontiguousarray(-2 * matrix.T)
    codes = np.empty(len(points), np.int64)
    rows = max(1, _CHUNK_DISTANCES // len(centres))
    for start in range(0, len(points), rows):
        distances = points[start : start + rows].astype(dtype) @ doubled
        distances += norms  # squared distance less the point's own norm
        codes[start : start + rows] = distances.argmin(1)
    return codes


def check_codes(codes: NDArray, num_codes: int, path: Path) -> None:
    """Check that a codebook has all of some codes.

    Raises:
        ValueError: It does not; names its file and the range.
    """
    if codes.size and (codes.min() < 0 or codes.max() >= num_codes):
        raise ValueError(
            f"codes span [{codes.min()}, {codes.max()}]; codebook {path} has codes 0 to "
            f"{num_codes - 1}"
        )


def codebook_fingerprint(measure: str, centres: NDArray[np.uint8], number: int) -> str:
    """A digest of all that the codes of a codebook depend on.

    Args:
        measure: See `read_codebook`.
        centres: Of any shape, uint8.
        number: The measure's value.

    Returns:
        SHA-256 in hexadecimal digits.
    """
    digest = hashlib.sha256(f"{measure} {number} centres {centres.shape}\n".encode())
    digest.update(centres.tobytes())
    return digest.hexdigest()


def find_codebook(
    key: str,
    name: str,
    embedded: Mapping[str, Path],
    others: str = "the path of a codebook file",
) -> Path:
    """The file of an embedded codebook, or the one that `name` is the path of.

    Args:
        key: The key of `[multimodal]` that says `name`, for the message.
        name: A name in `embedded`, or a path.
        embedded: Files of the embedded codebooks.
        others: What else the key may say, for the message.

    Raises:
        ValueError: `name` is neither, or an embedded file is missing or damaged.
    """
    path = embedded.get(name, Path(name))
    if name in embedded:
        check_embedded_files()
    elif not path.is_file():
        raise unknown_tokenizer(key, name, embedded, others)
    return path


def unknown_tokenizer(key: str, name: str, known: Collection[str], others: str) -> ValueError:
    """What to raise if a key names no tokenizer.

    Args:
        key: Of `[multimodal]`.
        name: What it says: no known name, and the path of nothing.
        known: Names of the embedded tokenizers.
        others: What else the key may say.
    """
    where = "" if Path(name).is_absolute() else f" seen from the current folder {Path.cwd()}"
    return ValueError(
        f"multimodal.{key} = {name!r} is unknown; use {' or '.join(known)}, or {others}. There is "
        f"no such file{where}."
    )


@contextmanager
def naming_key(key: str, name: str) -> Iterator[None]:
    """Let errors of building a tokenizer begin with the key that names it.

    Args:
        key: Of `[multimodal]`.
        name: What it says.

    Raises:
        ValueError: What is raised inside; as it is if it says the key already.
    """
    try:
        yield
    except ValueError as error:
        if str(error).startswith(f"multimodal.{key}"):
            raise
        raise ValueError(f"multimodal.{key} = {name!r}: {error}") from error


@functools.cache
def check_embedded_files() -> None:
    """Compare the embedded files with their manifest, once per process."""
    check_files(EMBEDDED_FOLDER)


def read_codebook(
    path: Path, measure: str, num_axes: int, expected: str
) -> tuple[NDArray[np.uint8], int, str]:
    """Read a codebook: safetensors with `centres` and one number that says what they are of.

    Args:
        path: The file.
        measure: Name of the number, an entry `(1,)` int64.
        num_axes: Axes of `centres`, which are uint8.
        expected: What such a file holds, for the messages.

    Returns:
        The centres, the number, and a description of both for the caller's own checks.

    Raises:
        ValueError: Not such a file; names it, what it holds and what is expected.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path} ({error}); {expected}") from error
    if set(tensors) != {"centres", measure}:
        raise ValueError(f"{path} holds {sorted(tensors)}; {expected}")
    centres, number = tensors["centres"], tensors[measure]
    described = (
        f"{path} has centres {centres.shape} {centres.dtype}, {measure} {number.shape} "
        f"{number.dtype}"
    )
    is_centres = centres.dtype == np.uint8 and centres.ndim == num_axes
    if not is_centres or number.dtype != np.int64 or number.size != 1:
        raise ValueError(f"{described}; {expected}")
    return centres, int(number.item()), f"{described} = {number.item()}; {expected}"
