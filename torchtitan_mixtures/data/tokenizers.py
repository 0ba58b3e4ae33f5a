"""Tokenizers of text and of images; both are plain data on disk, used without a network."""

import functools
import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.codebooks import (
    check_codes,
    check_embedded_files,
    codebook_fingerprint,
    find_codebook,
    naming_key,
    nearest_centres,
    read_codebook,
    split_patches,
    unknown_tokenizer,
)
from torchtitan_mixtures.data.emoji import EMBEDDED_FOLDER
from torchtitan_mixtures.data.tokenizer_files import (
    added_tokens,
    read_tokenizer,
    with_special_tokens,
    without_spellings,
)

# --- images ---------------------------------------------------------------------------------------

IMAGE_TOKENIZERS = {
    "emoji_32px": EMBEDDED_FOLDER / "codebook_32px.safetensors",
    "emoji_64px": EMBEDDED_FOLDER / "codebook_64px.safetensors",
}
"""Names of the embedded image tokenizers and their files."""


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

    def fingerprint(self) -> str:
        """A digest (SHA-256, hexadecimal) of all that codes depend on."""
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
        self._patches, self.image_size = _read_patches(self.path)
        self.num_codes, self.patch_size = self._patches.shape[:2]
        self.codes_per_image = (self.image_size // self.patch_size) ** 2
        self.centres = self._patches.reshape(self.num_codes, -1)  # (codes, patch * patch * 3)

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

    def fingerprint(self) -> str:
        """See `ImageTokenizer.fingerprint`."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return codebook_fingerprint("image_size", self._patches, self.image_size)


def build_image_tokenizer(name: str) -> ImageTokenizer:
    """The image tokenizer of a name in `IMAGE_TOKENIZERS`, a codebook file or a VQ model's folder.

    Raises:
        ValueError: `name` is none of them, or what it names cannot be used; names the key.
    """
    key = "image_tokenizer"
    with naming_key(key, name):
        if name not in IMAGE_TOKENIZERS and Path(name).expanduser().is_dir():
            # Imported late: most runs have a codebook.
            from torchtitan_mixtures.data.vq_tokenizer import VQTokenizer

            return VQTokenizer(name)
        others = "the path of a codebook file, or a folder with the config.json of a VQ model"
        return PatchCodebook(find_codebook(key, name, IMAGE_TOKENIZERS, others))


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
    "bos": (
        *("<|bos|>", "<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<|endoftext|>"),
        "[CLS]",
    ),
    "eos": ("<|eos|>", "<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "[SEP]"),
    "image_start": ("<|image_start|>", "<|reserved_special_token_0|>"),
    "image_end": ("<|image_end|>", "<|reserved_special_token_1|>"),
    "speech_start": ("<|speech_start|>", "<|reserved_special_token_2|>"),
    "speech_end": ("<|speech_end|>", "<|reserved_special_token_3|>"),
}
"""Token strings of each sentinel, most preferred first.

The first string is ours. The others let foreign tokenizers serve: usual spellings for pad, bos and
eos, and the tokens that Llama 3 reserves, always the same one for the same sentinel (Llama 3.0 has
no padding token, so one of them stands in). A sentinel with none of them gets an id of its own,
after those of the tokenizer.
"""


class TextTokenizer(BaseTokenizer):
    """A Hugging Face `tokenizer.json` and the sentinels of multimodal documents.

    Any such file will do. Sentinels that it has no token for get ids after its own, in the order
    of the fields of `Sentinels`; a message says so once. That does not change what is encoded.

    `encode` adds no sentinel and never produces one: a caption that contains "<|image_start|>" is
    plain text. Placing sentinels is the packer's work.

    Args:
        path: A `tokenizer.json` or the folder that holds it.

    Raises:
        ValueError: No such file, or not a tokenizer.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        self.path = Path(path)
        if self.path.is_dir():
            self.path = self.path / "tokenizer.json"
        content, tokenizer = read_tokenizer(self.path)
        # Not the number of tokens: there may be gaps between ids.
        num_own = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.sentinels, self._appended = find_sentinels(added_tokens(tokenizer), num_own)
        self._sentinel_ids = frozenset(astuple(self.sentinels))
        self._content, self._tokenizer = with_special_tokens(content, tokenizer, self._sentinel_ids)
        self._vocab_size = num_own + len(self._appended)
        if self._appended:
            _log_appended(self.path, tuple(self._appended.items()))
        self.bos_id = self.sentinels.bos
        self.eos_id = self.sentinels.eos

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled `Tokenizer` forgets `encode_special_tokens`.
        return type(self), (self.path,)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens and appended sentinels included."""
        return self._vocab_size

    def get_vocab_size(self) -> int:
        """`vocab_size` under the host's name."""
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without sentinels."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._sentinel_ids.isdisjoint(ids):
            return ids
        ids = self._unspelled.encode(text, add_special_tokens=False).ids
        # What is left of them stands for a character that the tokenizer does not know.
        return [index for index in ids if index not in self._sentinel_ids]

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """The text of token ids.

        Args:
            ids: Ids of this tokenizer.
            skip_special: Leave out sentinels and other special tokens.
        """
        if skip_special:
            own = [index for index in ids if index not in self._appended]
            return self._tokenizer.decode(own, skip_special_tokens=True)
        parts = []
        for is_appended, group in itertools.groupby(ids, lambda index: index in self._appended):
            if is_appended:
                parts += [self._appended[index] for index in group]
            else:
                parts.append(self._tokenizer.decode(list(group), skip_special_tokens=False))
        return "".join(parts)

    def fingerprint(self) -> str:
        """A digest of all that ids depend on: the file, and the ids of sentinels."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        parts = [self._content, asdict(self.sentinels), list(self._appended.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @functools.cached_property
    def _unspelled(self) -> Tokenizer:
        """The tokenizer without the spellings of sentinels, for texts that contain one.

        Special tokens are looked for in no text, but a model whose vocabulary has them too may
        find them itself, as that of T5 finds "</s>".
        """
        return without_spellings(self._content, self._sentinel_ids)


def build_text_tokenizer(name: str) -> TextTokenizer:
    """The text tokenizer called "emoji", or that of a `tokenizer.json` file or its folder.

    Raises:
        ValueError: `name` is neither, or the file is not a tokenizer; names the key.
    """
    key, path = "text_tokenizer", TEXT_TOKENIZERS.get(name, Path(name))
    with naming_key(key, name):
        if name in TEXT_TOKENIZERS:
            check_embedded_files()
        elif not path.exists():
            others = "the path of a tokenizer.json or its folder"
            raise unknown_tokenizer(key, name, TEXT_TOKENIZERS, others)
        return TextTokenizer(path)


def find_sentinels(tokens: Mapping[str, int], first_free: int) -> tuple[Sentinels, dict[int, str]]:
    """Choose the token of each sentinel by the order of `SENTINEL_TOKENS`.

    Args:
        tokens: Id of each added token by its string.
        first_free: The id that the first sentinel without a token gets; others follow.

    Returns:
        The ids of all sentinels, and the strings of those that have no token by their new ids.
    """
    found: dict[str, int] = {}
    appended: dict[int, str] = {}
    for sentinel in (field.name for field in fields(Sentinels)):
        candidates = SENTINEL_TOKENS[sentinel]
        token = next((text for text in candidates if text in tokens), None)
        if token is None:
            found[sentinel] = first_free + len(appended)
            appended[found[sentinel]] = candidates[0]
        else:
            found[sentinel] = tokens[token]
    return Sentinels(**found), appended


@functools.cache  # once per process and tokenizer
def _log_appended(path: Path, appended: tuple[tuple[int, str], ...]) -> None:
    tokens = ", ".join(f"{token} ({index})" for index, token in appended)
    logger.info(f"Tokenizer {path} has no tokens for some sentinels; appended {tokens}")
