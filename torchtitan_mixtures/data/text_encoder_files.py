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
from typing import Any, Literal

from torchtitan_mixtures.data.prompt_spec import EncoderSpan, PromptSpec

T5_WINDOW = 77
"""Tokens that T5 encoders are given, which have no window of their own; that of CLIP."""

FAMILY_OF_TYPE: dict[str, Literal["clip", "t5"]] = {
    "clip_text_model": "clip",
    "clip": "clip",
    "t5": "t5",
    "mt5": "t5",
    "umt5": "t5",
}
"""For each `model_type` that can be used: how its output is joined with that of others."""

_IS_PROJECTED = {
    "CLIPTextModel": False,
    "CLIPTextModelWithProjection": True,
    "CLIPModel": True,
}  # by the architecture of CLIP that `config.json` names
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "spiece.model"),
)
_REMEDY = (
    'a folder that "transformers" saved a CLIP text model or a T5 encoder to, with its tokenizer. '
    "Nothing is downloaded"
)


@dataclass(frozen=True)
class EncoderFiles:
    """One encoder: where it is, and what its JSON files say.

    Attributes:
        folder: Has `config.json` and the weights.
        tokenizer: Folder that has the tokenizer.
        model_type: A key of `FAMILY_OF_TYPE`.
        window: Tokens of a text; shorter ones are filled up.
        dim: Channels of the embedding of a token.
        pooled_dim: Channels of the embedding of the text; 0 = it makes none.
        vocab_size: Ids are below it.
        end_token: Of CLIP: the id whose position is the embedding of the text.
        is_projected: Of CLIP: whether the embedding of the text is projected.
    """

    folder: Path
    tokenizer: Path
    model_type: str
    window: int
    dim: int
    pooled_dim: int
    vocab_size: int
    end_token: int = 0
    is_projected: bool = False

    @property
    def family(self) -> Literal["clip", "t5"]:
        """How its output is joined with that of others."""
        return FAMILY_OF_TYPE[self.model_type]


def read_encoder_files(folder: str) -> EncoderFiles:
    """Read the configuration of an encoder.

    Args:
        folder: Local folder.

    Raises:
        ValueError: There is no such folder, or what is in it is no encoder that can be used.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        inner = sorted(found.parent for found in path.glob("text_encoder*/config.json"))
        hint = " ".join(f'"{name}"' for name in inner) or _REMEDY
        what = "has no config.json" if path.is_dir() else "is not a local folder"
        raise encoder_error(path, f"{what}; name {hint}")
    config = _read_json(path / "config.json")
    model_type = config.get("model_type")
    if model_type not in FAMILY_OF_TYPE:
        raise encoder_error(
            path,
            f"is of model_type {model_type!r}; those that can be used are "
            f"{', '.join(FAMILY_OF_TYPE)}",
        )
    read = _read_clip if FAMILY_OF_TYPE[model_type] == "clip" else _read_t5
    return read(path, _find_tokenizer(path), config)


def join_encoders(encoders: Sequence[EncoderFiles]) -> PromptSpec:
    """Say what the joined embeddings of encoders are, as in Stable Diffusion 3 (2403.03206).

    CLIP encoders share rows and follow one another along the channels; T5 encoders follow along
    the rows. What no encoder fills is zero.

    Args:
        encoders: In the order of their token ids and of the spans.
    """
    if not encoders:
        raise ValueError("multimodal.text_encoders = []: name at least one folder.")
    row = max((files.window for files in encoders if files.family == "clip"), default=0)
    channel = pooled = 0
    counts = {"clip": 0, "t5": 0}
    spans = []
    for files in encoders:
        counts[files.family] += 1
        number = counts[files.family]
        name = files.family if number == 1 else f"{files.family}_{number}"
        if files.family == "clip":
            rows, channels = (0, files.window), (channel, channel + files.dim)
            pooled_range = (pooled, pooled + files.pooled_dim)
            channel, pooled = channels[1], pooled_range[1]
            spans.append(EncoderSpan(name, rows, channels, pooled_range))
        else:
            spans.append(EncoderSpan(name, (row, row + files.window), (0, files.dim)))
            row += files.window
    dim = max(span.channels[1] for span in spans)
    return PromptSpec("text", "embeddings", row, dim=dim, pooled_dim=pooled, spans=tuple(spans))


def check_tokenizer(files: EncoderFiles) -> None:
    """Check that the files of a tokenizer are there.

    Raises:
        ValueError: They are not.
    """
    folder = files.tokenizer
    has_merges = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    if (folder / "tokenizer.json").is_file() or (files.family == "clip" and has_merges):
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
        names = _read_json(index).get("weight_map")
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
    hint = f"rename {variants[0]} to that" if variants else f"name {_REMEDY}"
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


def _read_clip(path: Path, tokenizer: Path, config: Mapping[str, Any]) -> EncoderFiles:
    architecture = next(iter(config.get("architectures") or ()), None)
    if architecture not in _IS_PROJECTED:
        raise encoder_error(
            path,
            f"has architectures = {config.get('architectures')!r} in config.json; it must name one "
            f"of {', '.join(_IS_PROJECTED)}, which says whether pooled embeddings are projected",
        )
    text = config
    if config["model_type"] == "clip":  # a whole CLIP, whose text half is described inside
        text = config.get("text_config_dict") or config.get("text_config") or {}
        text = {**text, "projection_dim": config.get("projection_dim", 512)}
    is_projected = _IS_PROJECTED[architecture]
    dim = _number(path, text, "hidden_size", 512)
    return EncoderFiles(
        folder=path,
        tokenizer=tokenizer,
        model_type=config["model_type"],
        window=_number(path, text, "max_position_embeddings", 77),
        dim=dim,
        pooled_dim=_number(path, text, "projection_dim", 512) if is_projected else dim,
        vocab_size=_number(path, text, "vocab_size", 49408),
        end_token=_number(path, text, "eos_token_id", 49407, least=0),
        is_projected=is_projected,
    )


def _read_t5(path: Path, tokenizer: Path, config: Mapping[str, Any]) -> EncoderFiles:
    window = T5_WINDOW
    if (tokenizer / "tokenizer_config.json").is_file():
        limit = _read_json(tokenizer / "tokenizer_config.json").get("model_max_length")
        # A tokenizer without a limit has none here, or one of 10^30.
        if limit is not None and not (isinstance(limit, (int, float)) and limit >= 2):
            raise encoder_error(
                tokenizer,
                f"has model_max_length = {limit!r} in tokenizer_config.json; it must be a number "
                "of tokens of 2 or more, or be left out",
            )
        window = int(min(window, limit or window))
    return EncoderFiles(
        folder=path,
        tokenizer=tokenizer,
        model_type=config["model_type"],
        window=window,
        dim=_number(path, config, "d_model", 512),
        pooled_dim=0,
        vocab_size=_number(path, config, "vocab_size", 32128),
    )


def _find_tokenizer(path: Path) -> Path:
    """The folder of an encoder's tokenizer: its own, or the one beside it in a pipeline."""
    if path.name.startswith("text_encoder") and not any(
        (path / name).is_file() for name in _TOKENIZER_FILES
    ):
        beside = path.with_name(path.name.replace("text_encoder", "tokenizer", 1))
        if beside.is_dir():
            return beside
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of what is no text at all
        raise encoder_error(path.parent, f"has a corrupt {path.name} ({error})") from None
    if not isinstance(content, dict):
        raise encoder_error(path.parent, f"has a corrupt {path.name}: it holds no JSON object")
    return content


def _number(path: Path, config: Mapping[str, Any], key: str, default: int, least: int = 1) -> int:
    """A number of a configuration; `transformers` leaves defaults out of nested ones."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise encoder_error(
            path, f"has {key} = {value!r} in config.json; it must be a number, {least} or more"
        )
    return value
