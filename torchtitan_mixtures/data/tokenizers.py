"""Tokenizers of text and of images; both are plain data on disk, used without a network."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from torchtitan.components.tokenizer import BaseTokenizer

from torchtitan_mixtures.data.emoji import EMBEDDED_FOLDER, check_files

# --- images ---------------------------------------------------------------------------------------

IMAGE_TOKENIZERS = {
    "emoji_32px": EMBEDDED_FOLDER / "codebook_32px.safetensors",
    "emoji_64px": EMBEDDED_FOLDER / "codebook_64px.safetensors",
}
"""Names of the embedded image tokenizers and their files."""

_CHUNK_ROWS = 8192  # bounds the distance matrix to 32 MB at 1,024 codes


class ImageTokenizer(Protocol):
    """Turns square RGB images into codes and back; what a learned tokenizer must offer too."""

    image_size: int
    num_codes: int
    codes_per_image: int

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Codes of images.

        Args:
            images: `(batch, image_size, image_size, 3)` uint8.

        Returns:
            `(batch, codes_per_image)` int64 in `[0, num_codes)`, patches in row-major order.
        """
        ...

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images of codes.

        Args:
            codes: `(batch, codes_per_image)` integers in `[0, num_codes)`.

        Returns:
            `(batch, image_size, image_size, 3)` uint8.
        """
        ...


class PatchCodebook:
    """Vector quantisation of non-overlapping patches by their nearest centre.

    The file is safetensors with two entries: `centres`, `(codes, patch, patch, 3)` uint8, and
    `image_size`, `(1,)` int64.

    Args:
        path: The codebook file.

    Raises:
        ValueError: The file is not such a codebook.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        centres, self.image_size = _read_patches(self.path)
        self.num_codes, self.patch_size = centres.shape[:2]
        self.codes_per_image = (self.image_size // self.patch_size) ** 2
        self.centres = centres.reshape(self.num_codes, -1)  # (codes, patch * patch * 3)

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Codes of images; see `ImageTokenizer.encode`."""
        side = self.image_size
        if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
            raise ValueError(
                f"images of shape {images.shape} and dtype {images.dtype} do not fit codebook "
                f"{self.path}; expected (batch, {side}, {side}, 3) uint8"
            )
        patches = split_patches(images, self.patch_size)
        return nearest_centres(patches, self.centres).reshape(len(images), self.codes_per_image)

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images of codes; see `ImageTokenizer.decode`."""
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.codes_per_image:
            raise ValueError(
                f"codes of shape {codes.shape} do not fit codebook {self.path}; "
                f"expected (batch, {self.codes_per_image})"
            )
        check_codes(codes, self.num_codes, self.path)
        grid, patch = self.image_size // self.patch_size, self.patch_size
        patches = self.centres[codes].reshape(-1, grid, grid, patch, patch, 3)
        rows = patches.transpose(0, 1, 3, 2, 4, 5)  # (batch, grid, patch, grid, patch, 3)
        return rows.reshape(-1, self.image_size, self.image_size, 3)


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
    for start in range(0, len(points), _CHUNK_ROWS):
        distances = points[start : start + _CHUNK_ROWS].astype(dtype) @ doubled
        distances += norms  # squared distance less the point's own norm
        codes[start : start + _CHUNK_ROWS] = distances.argmin(1)
    return codes


def build_image_tokenizer(name: str) -> ImageTokenizer:
    """The image tokenizer of a name in `IMAGE_TOKENIZERS`, or of a codebook file.

    Raises:
        ValueError: `name` is neither, or the file is not a codebook.
    """
    return PatchCodebook(find_codebook("image_tokenizer", name, IMAGE_TOKENIZERS))


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


def find_codebook(key: str, name: str, embedded: Mapping[str, Path]) -> Path:
    """The file of an embedded codebook, or the one that `name` is the path of.

    Args:
        key: The key of `[multimodal]` that says `name`, for the message.
        name: A name in `embedded`, or a path.
        embedded: Files of the embedded codebooks.

    Raises:
        ValueError: `name` is neither, or an embedded file is missing or damaged.
    """
    path = embedded.get(name, Path(name))
    if name in embedded:
        check_embedded_files()
    elif not path.is_file():
        raise ValueError(
            f"multimodal.{key} = {name!r} is unknown; use {' or '.join(embedded)}, or the path of "
            "a codebook file"
        )
    return path


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


def _read_patches(path: Path) -> tuple[NDArray[np.uint8], int]:
    centres, image_size, described = read_codebook(
        path,
        "image_size",
        4,
        "expected a patch codebook: safetensors with `centres`, (codes, patch, patch, 3) uint8, "
        "and `image_size`, (1,) int64, a multiple of patch",
    )
    codes, height, width, channels = centres.shape
    if not codes or height != width or channels != 3 or image_size < 1 or image_size % height:
        raise ValueError(described)
    return centres, image_size


# --- text -----------------------------------------------------------------------------------------

TEXT_TOKENIZERS = {"emoji": EMBEDDED_FOLDER / "tokenizer.json"}
"""Names of the embedded text tokenizers and their files."""


@dataclass(frozen=True)
class Sentinels:
    """Ids of the tokens that frame documents and modalities."""

    pad: int
    bos: int
    eos: int
    image_start: int
    image_end: int
    speech_start: int
    speech_end: int


SENTINEL_TOKENS = {
    "pad": (
        "<|pad|>",
        "<pad>",
        "[PAD]",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_4|>",
    ),
    "bos": ("<|bos|>", "<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<|endoftext|>"),
    "eos": ("<|eos|>", "<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>"),
    "image_start": ("<|image_start|>", "<|reserved_special_token_0|>"),
    "image_end": ("<|image_end|>", "<|reserved_special_token_1|>"),
    "speech_start": ("<|speech_start|>", "<|reserved_special_token_2|>"),
    "speech_end": ("<|speech_end|>", "<|reserved_special_token_3|>"),
}
"""Token strings of each sentinel, most preferred first.

The first string is ours. The others let foreign tokenizers serve: usual spellings for pad, bos and
eos, and the tokens that Llama 3 reserves, always the same one for the same sentinel (Llama 3.0 has
no padding token, so one of them stands in).
"""


class TextTokenizer(BaseTokenizer):
    """A Hugging Face `tokenizer.json` and the sentinels of multimodal documents.

    `encode` adds no sentinel and never produces one: a caption that contains "<|image_start|>" is
    plain text. Placing sentinels is the packer's work.

    Args:
        path: A `tokenizer.json` or the folder that holds it.

    Raises:
        ValueError: No such file, not a tokenizer, or no token for one of the sentinels.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        self.path = Path(path)
        if self.path.is_dir():
            self.path = self.path / "tokenizer.json"
        self._tokenizer, self.sentinels = _read_tokenizer(self.path)
        self.bos_id = self.sentinels.bos
        self.eos_id = self.sentinels.eos

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def get_vocab_size(self) -> int:
        """`vocab_size` under the host's name."""
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without sentinels."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """The text of token ids.

        Args:
            ids: Ids of this tokenizer.
            skip_special: Leave out sentinels and other special tokens.
        """
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)


def build_text_tokenizer(name: str) -> TextTokenizer:
    """The text tokenizer called "emoji", or that of a `tokenizer.json` file or its folder.

    Raises:
        ValueError: `name` is neither, or the tokenizer lacks a sentinel.
    """
    path = TEXT_TOKENIZERS.get(name, Path(name))
    if name in TEXT_TOKENIZERS:
        check_embedded_files()
    elif not path.exists():
        raise ValueError(
            f"multimodal.text_tokenizer = {name!r} is unknown; use {' or '.join(TEXT_TOKENIZERS)}, "
            "or the path of a tokenizer.json or its folder"
        )
    return TextTokenizer(path)


def _read_tokenizer(path: Path) -> tuple[Tokenizer, Sentinels]:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} ({error}); expected a tokenizer.json") from error
    try:
        tokenizer = Tokenizer.from_str(content)
    # `from_str` is compiled from Rust and raises `Exception` itself, no subclass of it.
    except Exception as error:
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
    added = tokenizer.get_added_tokens_decoder()
    sentinels = find_sentinels({token.content: index for index, token in added.items()}, path)
    ids = {getattr(sentinels, field.name) for field in fields(sentinels)}
    if not all(added[index].special for index in ids):
        # Only tokens marked special can be kept out of encoded text.
        data = json.loads(content)
        for token in data["added_tokens"]:
            token["special"] |= token["id"] in ids
        tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.encode_special_tokens = True  # special strings in a text are split as plain text
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, sentinels


def find_sentinels(added_tokens: dict[str, int], path: Path) -> Sentinels:
    """Choose the token of each sentinel by the order of `SENTINEL_TOKENS`.

    Args:
        added_tokens: Id of each added token by its string.
        path: The tokenizer file, for the message.

    Raises:
        ValueError: A sentinel has no token.
    """
    found: dict[str, int] = {}
    for sentinel, candidates in SENTINEL_TOKENS.items():
        token = next((text for text in candidates if text in added_tokens), None)
        if token is None:
            raise ValueError(
                f"tokenizer {path} has no token for the sentinel {sentinel!r}; "
                f'add "{candidates[0]}" to its added_tokens (accepted: {", ".join(candidates)})'
            )
        found[sentinel] = added_tokens[token]
    return Sentinels(**found)
