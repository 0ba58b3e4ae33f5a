"""What the folder of a text encoder holds, read without `transformers` and without its weights.

A folder is as `transformers` saves one: `config.json`, `model.safetensors` (or several of them and
their index), and the files of the tokenizer. In a pipeline of `diffusers` the tokenizer of
`text_encoder_2` is in `tokenizer_2` beside it, and is found there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model"),
)

REMEDY = (
    'a folder that "transformers" saved a text encoder to (CLIP, T5 or another), with its '
    "tokenizer. Nothing is downloaded"
)
"""What to name in place of a folder that cannot be used."""


@dataclass(frozen=True)
class EncoderFiles:
    """One encoder: where it is, and what its JSON files say.

    Attributes:
        folder: Has `config.json` and the weights.
        tokenizer: Folder that has the tokenizer.
        model_type: As in `config.json`.
        name: What messages call it.
        window: Tokens of a text; shorter ones are filled up.
        dim: Channels of the embedding of a token.
        vocab_size: Ids are below it.
        pooled_dim: Channels of the embedding of the text; 0 = it makes none.
        end_token: Of CLIP: the id whose position is the embedding of the text.
        is_projected: Of CLIP: whether the embedding of the text is projected.
    """

    folder: Path
    tokenizer: Path
    model_type: str
    name: str
    window: int
    dim: int
    vocab_size: int
    pooled_dim: int = 0
    end_token: int = 0
    is_projected: bool = False


def check_tokenizer(files: EncoderFiles, others: Sequence[Sequence[str]] = ()) -> None:
    """Check that the files of a tokenizer are there.

    Args:
        files: The encoder.
        others: Sets of files that can take the place of `tokenizer.json`.

    Raises:
        ValueError: They are not.
    """
    folder = files.tokenizer
    for names in (("tokenizer.json",), *others):
        if all((folder / name).is_file() for name in names):
            return
    if (folder / "spiece.model").is_file():
        raise encoder_error(
            folder,
            "has its tokenizer as spiece.model alone; with sentencepiece and protobuf installed, "
            "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes the "
            "tokenizer.json that is read here",
        )
    raise encoder_error(folder, "has no tokenizer.json; copy the files of its tokenizer there")


def weight_files(folder: Path) -> list[Path]:
    """List the files of an encoder's weights.

    Raises:
        ValueError: There are none in safetensors.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict):
            raise encoder_error(folder, f"has a corrupt {index.name}; copy it again")
        paths = [folder / name for name in sorted(set(names.values()))]
        for path in paths:
            if not path.is_file():
                raise encoder_error(folder, f"lacks {path.name}, which {index.name} names")
        return paths
    others = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.ckpt")]
    if others:
        raise encoder_error(
            folder,
            f"has its weights as {others[0].name}, a pickle, which could run any code; convert "
            "them to safetensors first (model.save_pretrained(DIR) of transformers does)",
        )
    variants = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f"rename {variants[0]} to that" if variants else f"name {REMEDY}"
    raise encoder_error(folder, f"has no model.safetensors; {hint}")


def hash_encoder(files: EncoderFiles) -> str:
    """Hash the files that decide what embeddings look like."""
    digest = hashlib.sha256()
    tokenizer = [files.tokenizer / name for name in _TOKENIZER_FILES]
    for path in [files.folder / "config.json", *weight_files(files.folder), *tokenizer]:
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def encoder_error(folder: Path, problem: str) -> ValueError:
    """The error of a folder that cannot be used."""
    return ValueError(f'multimodal.text_encoders: "{folder}" {problem}.')


def find_tokenizer(path: Path) -> Path:
    """The folder of an encoder's tokenizer: its own, or the one beside it in a pipeline."""
    if path.name.startswith("text_encoder") and not any(
        (path / name).is_file() for name in _TOKENIZER_FILES
    ):
        beside = path.with_name(path.name.replace("text_encoder", "tokenizer", 1))
        if beside.is_dir():
            return beside
    return path


def token_limit(tokenizer: Path) -> int | None:
    """The tokens that a tokenizer allows a text to have; None if it says nothing of that.

    Args:
        tokenizer: Its folder.

    Raises:
        ValueError: It says something else.
    """
    if not (tokenizer / "tokenizer_config.json").is_file():
        return None
    limit = read_json(tokenizer / "tokenizer_config.json").get("model_max_length")
    # A tokenizer without a limit has none here, or one of 10^30.
    if limit is not None and not (isinstance(limit, (int, float)) and limit >= 2):
        raise encoder_error(
            tokenizer,
            f"has model_max_length = {limit!r} in tokenizer_config.json; it must be a number of "
            "tokens of 2 or more, or be left out",
        )
    return None if limit is None else int(limit)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The file holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of what is no text at all
        raise encoder_error(path.parent, f"has a corrupt {path.name} ({error})") from None
    if not isinstance(content, dict):
        raise encoder_error(path.parent, f"has a corrupt {path.name}: it holds no JSON object")
    return content


def read_number(
    path: Path, config: Mapping[str, Any], key: str, default: int | None = None, least: int = 1
) -> int:
    """Read a number of a configuration.

    Args:
        path: The encoder's folder.
        config: What `config.json` says, or a part of it.
        key: Of the number.
        default: For a key that is left out, as `transformers` does in nested configurations; None:
            it must be there.
        least: What it must be at least.

    Raises:
        ValueError: It is none, or too small.
    """
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise encoder_error(
            path, f"has {key} = {value!r} in config.json; it must be a number, {least} or more"
        )
    return value
