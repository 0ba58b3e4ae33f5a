"""Image tokenizers that somebody else has trained: VQ models in local folders.

`diffusers` and `transformers` load them, the extras "vae" and "text". Nothing is downloaded and
only safetensors are read. What each kind of model takes and gives:

| Class | Pixels | Image size | Codes to images |
|---|---|---|---|
| `VQModel` of diffusers | [-1, 1] (*) | `sample_size` | yes |
| `ChameleonVQVAE` of transformers | [-1, 1] | `resolution` | no: it has no decoder there |
| `JanusVQVAE` of transformers | [-1, 1] | `num_patches` times the factor | yes |

(*) [0, 1] with `lookup_from_codebook`, as in aMUSEd.

A key "image_size" that you add to `config.json` goes first, but for Janus, whose decoder has one
size: these models are convolutions, and many a `sample_size` says nothing about the pictures that
the model is good at. Codes are in row-major
order. Colours are RGB.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from torchtitan_mixtures.data.codebooks import check_codes
from torchtitan_mixtures.device import has_accelerator

_LOAD_ERRORS = (
    *(OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, AttributeError),
    SafetensorError,
)  # what `from_pretrained` raises of broken files


@dataclass(frozen=True)
class _Family:
    """How one class of models is used."""

    class_name: str
    library: str
    extra: str
    model_type: str  # in config.json of transformers; diffusers has none
    sizes: Callable[[dict[str, Any]], tuple[int, int]]
    """Image size and number of codes that a configuration says; the size is 0 if it says none."""

    factor: Callable[[dict[str, Any]], int]
    """By which the grid of codes is smaller than the image."""

    encode: Callable[[Any, Tensor], Tensor]
    """Codes of pixels: `(1, 3, size, size)` to `(grid * grid,)`."""

    decode: Callable[[Any, Tensor], Tensor] | None
    """Pixels of codes: `(1, grid, grid)` to `(1, 3, size, size)`."""

    options: dict[str, Any]
    """Of `from_pretrained`."""

    low: Callable[[dict[str, Any]], float] = lambda config: -1.0
    """The value of black; that of white is 1."""


def _encode_diffusers(model: Any, pixels: Tensor) -> Tensor:
    return model.quantize(model.encode(pixels).latents)[2][2]


def _decode_diffusers(model: Any, codes: Tensor) -> Tensor:
    shape = (*codes.shape, model.quantize.vq_embed_dim)
    if model.config.lookup_from_codebook:
        return model.decode(codes.flatten(), force_not_quantize=True, shape=shape).sample
    entries = model.quantize.get_codebook_entry(codes.flatten(), shape)
    return model.decode(entries, force_not_quantize=True).sample


def _encode_transformers(model: Any, pixels: Tensor) -> Tensor:
    return model.encode(pixels).image_tokens


_FAMILIES = (
    _Family(
        "VQModel",
        "diffusers",
        "vae",
        "none",
        sizes=lambda config: (config.get("sample_size", 0), config["num_vq_embeddings"]),
        factor=lambda config: 2 ** (len(config["block_out_channels"]) - 1),
        encode=_encode_diffusers,
        decode=_decode_diffusers,
        # The other way of saving memory needs a further package.
        options={"torch_dtype": torch.float32, "low_cpu_mem_usage": False},
        low=lambda config: 0.0 if config.get("lookup_from_codebook") else -1.0,
    ),
    _Family(
        "ChameleonVQVAE",
        "transformers",
        "text",
        "chameleon_vqgan",
        sizes=lambda config: (config.get("resolution", 0), config["num_embeddings"]),
        factor=lambda config: 2 ** (len(config["channel_multiplier"]) - 1),
        encode=_encode_transformers,
        decode=None,
        options={"dtype": torch.float32},
    ),
    _Family(
        "JanusVQVAE",
        "transformers",
        "text",
        "janus_vqgan",
        sizes=lambda config: (
            config.get("num_patches", 0) * 2 ** (len(config["channel_multiplier"]) - 1),
            config["num_embeddings"],
        ),
        factor=lambda config: 2 ** (len(config["channel_multiplier"]) - 1),
        encode=_encode_transformers,
        decode=lambda model, codes: model.decode(codes.flatten(1)),
        options={"dtype": torch.float32},
    ),
)

_REMEDY = (
    "name a folder that has the config.json and *.safetensors of one of "
    f"{', '.join(f'{family.class_name} ({family.library})' for family in _FAMILIES)}"
)


class VQTokenizer:
    """A frozen VQ model in float32 as an image tokenizer; see `ImageTokenizer`.

    The model is loaded when it is first needed, in each process for itself; what is pickled is the
    folder. It computes on the accelerator if there is one, but in worker processes on the CPU. One
    image is computed at a time, so that its codes do not depend on the others of a batch.

    Args:
        folder: Where `save_pretrained` saved the model.

    Raises:
        ValueError: There is no such folder, its `config.json` is of no model that can be used, or
            it has no safetensors.
    """

    def __init__(self, folder: Path | str) -> None:
        self.path = Path(folder).expanduser()
        config = _read_config(self.path)
        self._family = _find_family(self.path, config)
        self.image_size, self.num_codes, self._grid = _read_sizes(self.path, config, self._family)
        self.codes_per_image = self._grid**2
        self._weights = _find_weights(self.path)
        self._low = self._family.low(config)
        self._loaded: tuple[int, Any] | None = None  # process and model

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Codes of images; see `ImageTokenizer.encode`.

        Raises:
            ValueError: The images do not fit, or the model cannot be loaded.
        """
        side = self.image_size
        if images.dtype != np.uint8 or images.shape[1:] != (side, side, 3):
            raise ValueError(
                f"images of shape {images.shape} and dtype {images.dtype} do not fit the VQ model "
                f"{self.path}; expected (batch, {side}, {side}, 3) uint8"
            )
        codes = np.empty((len(images), self.codes_per_image), np.int64)
        model = self._model()
        with torch.no_grad():
            for row, image in zip(codes, images, strict=True):
                pixels = torch.tensor(image, dtype=torch.float32, device=model.device)
                pixels = pixels * ((1 - self._low) / 255) + self._low
                pixels = pixels.permute(2, 0, 1)[None].contiguous()  # (1, 3, height, width)
                row[:] = self._family.encode(model, pixels).reshape(-1).cpu().numpy()
        return codes

    def decode(self, codes: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images of codes; see `ImageTokenizer.decode`.

        Raises:
            ValueError: The codes do not fit, or the model cannot be loaded.
            NotImplementedError: The library has no decoder for this kind of model.
        """
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.codes_per_image:
            raise ValueError(
                f"codes of shape {codes.shape} do not fit the VQ model {self.path}; expected "
                f"(batch, {self.codes_per_image})"
            )
        check_codes(codes, self.num_codes, self.path)
        if self._family.decode is None:
            raise NotImplementedError(
                f"{self._family.library} cannot make images of the codes of a "
                f"{self._family.class_name}; for that set multimodal.image_tokenizer to a VQModel, "
                "a JanusVQVAE or a codebook"
            )
        images = np.empty((len(codes), self.image_size, self.image_size, 3), np.uint8)
        model = self._model()
        with torch.no_grad():
            for image, row in zip(images, codes, strict=True):
                grid = torch.tensor(row, dtype=torch.int64, device=model.device)
                pixels = self._family.decode(model, grid.reshape(1, self._grid, self._grid))
                pixels = (pixels[0].permute(1, 2, 0) - self._low) * (255 / (1 - self._low))
                image[:] = pixels.clamp(0, 255).round().to(torch.uint8).cpu().numpy()
        return images

    def fingerprint(self) -> str:
        """A digest of `config.json` and the weights; see `ImageTokenizer.fingerprint`."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in (self.path / "config.json", *self._weights):
            with path.open("rb") as file:
                part = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.name} {part}\n".encode())
        return digest.hexdigest()

    def _model(self) -> Any:
        # A model that a parent has loaded may be on a device that forked processes cannot use.
        if self._loaded is None or self._loaded[0] != os.getpid():
            self._loaded = os.getpid(), _load(self.path, self._family).to(_device())
        return self._loaded[1]


def _device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if has_accelerator() else None
    is_worker = multiprocessing.parent_process() is not None
    return torch.device("cpu") if is_worker or accelerator is None else accelerator


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a local folder"
        raise ValueError(
            f'multimodal.image_tokenizer = "{folder}" {what}; {_REMEDY}. Nothing is downloaded.'
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'}: cannot be read ({error}); {_REMEDY}"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'}: is no JSON object; {_REMEDY}")
    return config


def _find_family(folder: Path, config: dict[str, Any]) -> _Family:
    # `diffusers` writes the first of them, `transformers` the others.
    kinds = [config.get("_class_name"), config.get("architectures"), config.get("model_type")]
    named = str(next((kind for kind in kinds if kind), "nothing"))
    for family in _FAMILIES:
        if named in (family.class_name, f"['{family.class_name}']", family.model_type):
            return family
    whole = (
        ". Of a whole model save its VQ model alone, with `model.vqmodel.save_pretrained(FOLDER)`"
        if "hameleon" in named or "anus" in named
        else ""
    )
    raise ValueError(f"{folder / 'config.json'}: describes {named}; {_REMEDY}{whole}")


def _read_sizes(folder: Path, config: dict[str, Any], family: _Family) -> tuple[int, int, int]:
    """Image size, number of codes, and codes along a side."""
    path = folder / "config.json"
    try:
        said, num_codes = family.sizes(config)
        factor = family.factor(config)
        size = config.get("image_size", said)
        if not all(isinstance(number, int) and number >= 0 for number in (size, num_codes)):
            raise ValueError(f"image size {size!r}, {num_codes!r} codes")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be used ({error!r}); {_REMEDY}") from None
    if not size or size % factor:
        raise ValueError(
            f'{path}: says no image size that is a multiple of {factor} ({size}); add "image_size" '
            "to it, height and width in pixels of the images to encode"
        )
    if family.class_name == "JanusVQVAE" and size != said:
        raise ValueError(f"{path}: image_size = {size}, but num_patches fixes it at {said}")
    return size, num_codes, size // factor


def _find_weights(folder: Path) -> list[Path]:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        others = [path.name for path in sorted(folder.iterdir()) if path.name != "config.json"]
        raise ValueError(
            f'multimodal.image_tokenizer = "{folder}": has no *.safetensors but '
            f"{', '.join(others) or 'nothing'}. Other weights may run code and are not read; load "
            "the model where you trust it and save it with safe_serialization=True"
        )
    return weights


def _load(folder: Path, family: _Family) -> Any:
    try:
        model_class = getattr(importlib.import_module(family.library), family.class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f'multimodal.image_tokenizer = "{folder}": needs {family.library} ({error}): '
            f'pip install "torchtitan_mixtures[{family.extra}]"'
        ) from None
    try:
        with _without_bars(family.library):
            model, loading = model_class.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **family.options,
            )
    except _LOAD_ERRORS as error:
        raise ValueError(
            f'multimodal.image_tokenizer = "{folder}": cannot be loaded ({error}); {_REMEDY}'
        ) from error
    wrong = sorted(map(str, (*loading["missing_keys"], *loading["mismatched_keys"])))
    if wrong:  # they would be left at random
        raise ValueError(
            f'multimodal.image_tokenizer = "{folder}": its weights lack {wrong[0]}; {_REMEDY}'
        )
    return model.requires_grad_(False).eval()


@contextmanager
def _without_bars(library: str) -> Iterator[None]:
    """Without the progress bars of a library, which every worker would show."""
    logging = importlib.import_module(f"{library}.utils.logging")
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()
