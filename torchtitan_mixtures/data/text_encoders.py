"""Frozen text encoders in the format of `transformers`, from local folders.

Their outputs are joined as in Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206, figure 2):
of CLIP models the hidden states before the last layer, side by side, and the pooled embeddings one
after the other; of T5 models the last hidden states, below. Like there, no mask hides the tokens
that fill a text up. Any other model of texts gives its last hidden states, below, too.

Nothing is downloaded, only safetensors are read, and no code out of a folder is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from textwrap import shorten
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.data.text_encoder_families import (
    family_of,
    join_encoders,
    read_encoder_files,
)
from torchtitan_mixtures.data.text_encoder_files import (
    EncoderFiles,
    check_tokenizer,
    encoder_error,
    weight_files,
)

LongPrompts = Literal["truncate", "refuse"]

_LOAD_ERRORS = (
    *(OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError),
    SafetensorError,
)  # what `from_pretrained` raises of broken files, and of quantized ones


def frozen_prompt_spec(folders: Sequence[str]) -> PromptSpec:
    """Say what the embeddings of encoders are; reads JSON alone and needs no `transformers`.

    Args:
        folders: Local folders, in the order of their token ids.

    Raises:
        ValueError: A folder is missing, broken or of another kind of model.
    """
    return join_encoders([read_encoder_files(folder) for folder in folders])


class PromptTokenizers:
    """Makes the token ids that frozen encoders read of texts.

    Args:
        folders: Of the encoders.
        long_prompts: What happens to a text that is longer than an encoder's window.

    Attributes:
        truncated: For each encoder the texts that were cut.
        pad_tokens: For each encoder the id that fills texts up.

    Raises:
        ValueError: A tokenizer is missing or broken, or `transformers` is not installed.
    """

    def __init__(self, folders: Sequence[str], long_prompts: LongPrompts = "truncate") -> None:
        self._files = [read_encoder_files(folder) for folder in folders]
        self._names = [span.name for span in join_encoders(self._files).spans]
        self._is_refusing = long_prompts == "refuse"
        self._tokenizers = [_load_tokenizer(files) for files in self._files]
        self.truncated = [0] * len(self._files)
        self.pad_tokens: list[int] = [each.pad_token_id for each in self._tokenizers]

    def tokenize(self, text: str) -> list[Tensor]:
        """Make the ids of one text.

        Args:
            text: Without special tokens.

        Returns:
            For each encoder `(window,)` int64.

        Raises:
            ValueError: The text is too long, and such are refused.
        """
        return [self._encode(number, text) for number in range(len(self._files))]

    def _encode(self, number: int, text: str) -> Tensor:
        files, tokenizer = self._files[number], self._tokenizers[number]
        filling = {"padding": "max_length", "max_length": files.window}
        ids = tokenizer(text, **filling, truncation=False, verbose=False)["input_ids"]
        if len(ids) > files.window:
            if self._is_refusing:
                raise ValueError(
                    f"the prompt {shorten(text, 80)!r} has {len(ids)} tokens for the encoder "
                    f"{self._names[number]}, whose window is {files.window} with special tokens; "
                    'shorten it, or set multimodal.long_prompts = "truncate".'
                )
            self.truncated[number] += 1
            ids = tokenizer(text, **filling, truncation=True)["input_ids"]
        if max(ids) >= files.vocab_size:
            raise encoder_error(
                files.tokenizer,
                f"makes the token {max(ids)} of {shorten(text, 80)!r}, but the encoder knows those "
                f"below {files.vocab_size}; put the tokenizer of the same model there",
            )
        return torch.tensor(ids, dtype=torch.int64)


class FrozenTextEncoders:
    """Encoders that make the embeddings of texts, and are not trained.

    Args:
        folders: Local folders of the encoders.
        device: Where they compute.
        long_prompts: What happens to a text that is longer than an encoder's window.
        dtype: In which they compute.

    Attributes:
        spec: What the embeddings are.
        tokenizers: Make the token ids of texts.

    Raises:
        ValueError: A folder is missing or broken, or `transformers` is not installed.
    """

    def __init__(
        self,
        folders: Sequence[str],
        device: torch.device | str,
        long_prompts: LongPrompts = "truncate",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._files = [read_encoder_files(folder) for folder in folders]
        self.spec = join_encoders(self._files)
        self.tokenizers = PromptTokenizers(folders, long_prompts)
        self._device = torch.device(device)
        self._models = [_load_model(files, dtype).to(self._device) for files in self._files]

    @torch.no_grad()
    def encode_ids(self, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Make the embeddings of texts.

        Args:
            ids: Of each encoder `(batch, window)` int64, as `PromptTokenizers` makes them.

        Returns:
            `(batch, length, dim)` and `(batch, pooled_dim)`, float32, on the encoders' device.
        """
        batch = len(ids[0])
        kind = {"dtype": torch.float32, "device": self._device}
        embeddings = torch.zeros(batch, self.spec.length, self.spec.dim, **kind)
        pooled = torch.zeros(batch, self.spec.pooled_dim, **kind)
        pads = self.tokenizers.pad_tokens
        parts = zip(self._files, self._models, self.spec.spans, ids, pads, strict=True)
        for files, model, span, tokens, pad in parts:
            states, vector = family_of(files).embed(model, files, tokens.to(self._device), pad)
            embeddings[:, slice(*span.rows), slice(*span.channels)] = states.float()
            if vector is not None:
                pooled[:, slice(*span.pooled)] = vector.float()
        return embeddings, pooled

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Make the embeddings of texts; see `encode_ids`."""
        rows = [self.tokenizers.tokenize(text) for text in texts]
        return self.encode_ids([torch.stack(parts) for parts in zip(*rows, strict=True)])


def _load_model(files: EncoderFiles, dtype: torch.dtype) -> Any:
    """Load the weights of one encoder, frozen, on the CPU."""
    weight_files(files.folder)  # for a better message than that of `transformers`
    transformers = _import_transformers(files)
    family = family_of(files)
    options = {
        "local_files_only": True,
        "use_safetensors": True,
        "dtype": dtype,
        "output_loading_info": True,
    }
    try:
        with _quiet(transformers):
            model, loading = family.load(transformers, files, options)
    except _LOAD_ERRORS as error:
        raise encoder_error(
            files.folder, f"cannot be loaded ({error}); copy or save the model again"
        ) from error
    missing = [name for name in loading["missing_keys"] if not family.is_optional(name)]
    if missing:  # `transformers` would leave them at random
        raise encoder_error(files.folder, f"lacks the weight {min(missing)}; save the model again")
    return model.requires_grad_(False).eval()


def _load_tokenizer(files: EncoderFiles) -> Any:
    family = family_of(files)
    check_tokenizer(files, family.bare_tokenizers)
    transformers = _import_transformers(files)
    try:
        with _quiet(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(files.tokenizer),
                config=family.tokenizer_config(transformers, files),
                local_files_only=True,
                trust_remote_code=False,
                padding_side="right",  # some decoders have theirs on the left
            )
    # `tokenizers` is compiled from Rust and raises `Exception` itself of broken files, no subclass.
    except Exception as error:
        raise encoder_error(
            files.tokenizer, f"has a tokenizer that cannot be loaded ({error}); copy it again"
        ) from error
    if tokenizer.pad_token is None:
        raise encoder_error(
            files.tokenizer,
            "has a tokenizer that does not say how to fill texts up; set pad_token in its "
            "tokenizer_config.json",
        )
    family.check_end(files, tokenizer)
    return tokenizer


def _import_transformers(files: EncoderFiles) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise encoder_error(
            files.folder,
            f'needs transformers ({error}): pip install "torchtitan_mixtures[text]"',
        ) from None
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without progress bars and lists of the weights that are left out on purpose."""
    logging = transformers.utils.logging
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
