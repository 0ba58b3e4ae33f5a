"""The families of text encoders that can be used: how each is read, loaded, run and joined.

CLIP models stand side by side, T5 and all others below them (see `join_encoders`). A model that is
neither is what `transformers.AutoModel` makes of its folder.

Nothing here imports `transformers`, which takes seconds and is an extra: it is an argument.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan_mixtures.data.prompt_spec import EncoderSpan, PromptSpec
from torchtitan_mixtures.data.text_encoder_files import (
    REMEDY,
    EncoderFiles,
    encoder_error,
    find_tokenizer,
    read_json,
    read_number,
    token_limit,
)

if TYPE_CHECKING:
    from torch import Tensor

T5_WINDOW = 77
"""Tokens that T5 encoders are given, which have no window of their own; that of CLIP."""

MAX_WINDOW = 512
"""Tokens that encoders which are neither CLIP nor T5 are given at most."""

_LEGACY_END = 2
"""The end token that the first CLIP models name, wrongly: with it `transformers` takes the largest
id of a text for its end."""

_IS_PROJECTED = {
    "CLIPTextModel": False,
    "CLIPTextModelWithProjection": True,
    "CLIPModel": True,
}  # by the architecture of CLIP that `config.json` names

_MERGES = ("vocab.json", "merges.txt")


class EncoderFamily(ABC):
    """Models of one kind; what is here is common to most.

    Attributes:
        model_types: Those of `config.json`; none: all that no other family names.
        is_beside: Whether models of the family share rows and follow one another along the
            channels, not along the rows.
        bare_tokenizers: Sets of files that make a tokenizer without a `tokenizer.json`.
    """

    model_types: tuple[str, ...] = ()
    is_beside = False
    bare_tokenizers: tuple[tuple[str, ...], ...] = ()

    @abstractmethod
    def read(self, path: Path, tokenizer: Path, config: Mapping[str, Any]) -> EncoderFiles:
        """Read an encoder's configuration; needs no `transformers`.

        Args:
            path: Its folder.
            tokenizer: That of its tokenizer.
            config: What `config.json` says.

        Raises:
            ValueError: It cannot be used.
        """

    @abstractmethod
    def load(self, transformers: Any, files: EncoderFiles, options: Mapping[str, Any]) -> Any:
        """Load the weights: what `from_pretrained` returns with these options."""

    @abstractmethod
    def tokenizer_config(self, transformers: Any, files: EncoderFiles) -> Any:
        """A configuration that says of which family a tokenizer is that does not say it."""

    def check_end(self, files: EncoderFiles, tokenizer: Any) -> None:
        """Check that texts end as the encoder expects; most expect nothing.

        Raises:
            ValueError: They do not.
        """
        return

    def is_optional(self, weight: str) -> bool:
        """Whether a weight may be missing since nothing here depends on it."""
        del weight
        return False

    def embed(
        self, model: Any, files: EncoderFiles, ids: Tensor, pad_token: int
    ) -> tuple[Tensor, Tensor | None]:
        """Make the embeddings of texts.

        Args:
            model: The encoder.
            files: It is described by them.
            ids: `(batch, window)` int64.
            pad_token: The id that fills texts up.

        Returns:
            `(batch, window, dim)`, and `(batch, pooled_dim)` or None, in the type of the model.
        """
        del files, pad_token
        return model(input_ids=ids).last_hidden_state, None


class _Clip(EncoderFamily):
    """CLIP: the hidden states before the last layer, and the pooled embedding."""

    model_types = ("clip_text_model", "clip")
    is_beside = True
    bare_tokenizers = (_MERGES,)

    def read(self, path: Path, tokenizer: Path, config: Mapping[str, Any]) -> EncoderFiles:
        architecture = next(iter(config.get("architectures") or ()), None)
        if architecture not in _IS_PROJECTED:
            raise encoder_error(
                path,
                f"has architectures = {config.get('architectures')!r} in config.json; it must name "
                f"one of {', '.join(_IS_PROJECTED)}, which says whether pooled embeddings are "
                "projected",
            )
        text = config
        if config["model_type"] == "clip":  # a whole CLIP, whose text half is described inside
            text = config.get("text_config_dict") or config.get("text_config") or {}
            text = {**text, "projection_dim": config.get("projection_dim", 512)}
        is_projected = _IS_PROJECTED[architecture]
        dim = read_number(path, text, "hidden_size", 512)
        return EncoderFiles(
            folder=path,
            tokenizer=tokenizer,
            model_type=config["model_type"],
            name="clip",
            window=read_number(path, text, "max_position_embeddings", 77),
            dim=dim,
            pooled_dim=read_number(path, text, "projection_dim", 512) if is_projected else dim,
            vocab_size=read_number(path, text, "vocab_size", 49408),
            end_token=read_number(path, text, "eos_token_id", 49407, least=0),
            is_projected=is_projected,
        )

    def load(self, transformers: Any, files: EncoderFiles, options: Mapping[str, Any]) -> Any:
        folder, further = str(files.folder), {}
        if files.model_type == "clip":
            config = transformers.CLIPConfig.from_pretrained(folder, local_files_only=True)
            config.text_config.projection_dim = config.projection_dim
            further["config"] = config.text_config
        name = "CLIPTextModelWithProjection" if files.is_projected else "CLIPTextModel"
        return getattr(transformers, name).from_pretrained(folder, **options, **further)

    def tokenizer_config(self, transformers: Any, files: EncoderFiles) -> Any:
        return transformers.CLIPConfig()

    def check_end(self, files: EncoderFiles, tokenizer: Any) -> None:
        # The embedding of a whole text is read at its end, and elsewhere if there is none.
        if files.end_token not in (_LEGACY_END, *tokenizer("")["input_ids"]):
            raise encoder_error(
                files.tokenizer,
                f"has a tokenizer that does not end texts with token {files.end_token}, the "
                "eos_token_id of config.json; put the tokenizer of the same model there",
            )

    def embed(
        self, model: Any, files: EncoderFiles, ids: Tensor, pad_token: int
    ) -> tuple[Tensor, Tensor | None]:
        output = model(input_ids=ids, output_hidden_states=True)
        vector = output.text_embeds if files.is_projected else output.pooler_output
        return output.hidden_states[-2], vector


class _T5(EncoderFamily):
    """The encoder of a T5: its last hidden states, without a mask as in Stable Diffusion 3."""

    model_types = ("t5", "mt5", "umt5")

    def read(self, path: Path, tokenizer: Path, config: Mapping[str, Any]) -> EncoderFiles:
        return EncoderFiles(
            folder=path,
            tokenizer=tokenizer,
            model_type=config["model_type"],
            name="t5",
            window=min(T5_WINDOW, token_limit(tokenizer) or T5_WINDOW),
            dim=read_number(path, config, "d_model", 512),
            vocab_size=read_number(path, config, "vocab_size", 32128),
        )

    def load(self, transformers: Any, files: EncoderFiles, options: Mapping[str, Any]) -> Any:
        kind = getattr(transformers, f"{files.model_type.upper()}EncoderModel")
        return kind.from_pretrained(str(files.folder), **options)

    def tokenizer_config(self, transformers: Any, files: EncoderFiles) -> Any:
        return getattr(transformers, f"{files.model_type.upper()}Config")()


class _Other(EncoderFamily):
    """Any other model of texts, such as BERT: its last hidden states.

    Unlike CLIP and T5, which Stable Diffusion 3 uses without, it is told by a mask which tokens
    fill a text up: so are most such models trained.
    """

    bare_tokenizers = (_MERGES, ("vocab.txt",))

    _dim_keys = ("hidden_size", "d_model", "dim", "n_embd")
    _window_keys = ("max_position_embeddings", "n_positions")
    _counts_behind_padding = (
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm"),
        *("mpnet", "longformer", "data2vec-text", "ibert"),
    )  # types whose first position has the number after that of the token that fills up

    def read(self, path: Path, tokenizer: Path, config: Mapping[str, Any]) -> EncoderFiles:
        if config.get("is_encoder_decoder"):
            raise encoder_error(
                path,
                f"is of model_type {config['model_type']!r}, an encoder with a decoder; of such "
                f"only {', '.join(_T5.model_types)} can be used",
            )
        dim_key = next((key for key in self._dim_keys if key in config), self._dim_keys[0])
        windows = [
            read_number(path, config, key) for key in self._window_keys if config.get(key, -1) != -1
        ]
        if config["model_type"] in self._counts_behind_padding:
            behind = read_number(path, config, "pad_token_id", 1, least=0) + 1
            windows = [window - behind for window in windows]
        window = min([MAX_WINDOW, *windows, token_limit(tokenizer) or MAX_WINDOW])
        if window < 2:
            raise encoder_error(path, f"takes {window} tokens by config.json; it must take 2")
        return EncoderFiles(
            folder=path,
            tokenizer=tokenizer,
            model_type=config["model_type"],
            name=config["model_type"],
            window=window,
            dim=read_number(path, config, dim_key),
            vocab_size=read_number(path, config, "vocab_size"),
        )

    def load(self, transformers: Any, files: EncoderFiles, options: Mapping[str, Any]) -> Any:
        return transformers.AutoModel.from_pretrained(
            str(files.folder), trust_remote_code=False, **options
        )

    def tokenizer_config(self, transformers: Any, files: EncoderFiles) -> Any:
        return transformers.AutoConfig.from_pretrained(
            str(files.folder), local_files_only=True, trust_remote_code=False
        )

    def is_optional(self, weight: str) -> bool:
        return weight.startswith("pooler.")

    def embed(
        self, model: Any, files: EncoderFiles, ids: Tensor, pad_token: int
    ) -> tuple[Tensor, Tensor | None]:
        mask = ids != pad_token
        mask[:, 0] = True  # an empty text may consist of such tokens alone
        output = model(input_ids=ids, attention_mask=mask.long())
        states = getattr(output, "last_hidden_state", None)
        if states is None or tuple(states.shape) != (*ids.shape, files.dim):
            raise encoder_error(
                files.folder,
                f"is of model_type {files.model_type!r}, which does not return {files.dim} "
                "channels for each token; name another model",
            )
        return states, None


_OTHER = _Other()
_FAMILY_OF_TYPE: dict[str, EncoderFamily] = {
    model_type: family for family in (_Clip(), _T5()) for model_type in family.model_types
}


def family_of(files: EncoderFiles) -> EncoderFamily:
    """The family of an encoder."""
    return _FAMILY_OF_TYPE.get(files.model_type, _OTHER)


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
        hint = " ".join(f'"{name}"' for name in inner) or REMEDY
        what = "has no config.json" if path.is_dir() else "is not a local folder"
        raise encoder_error(path, f"{what}; name {hint}")
    config = read_json(path / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise encoder_error(path, f"has model_type = {model_type!r} in config.json; name {REMEDY}")
    family = _FAMILY_OF_TYPE.get(model_type, _OTHER)
    return family.read(path, find_tokenizer(path), config)


def join_encoders(encoders: Sequence[EncoderFiles]) -> PromptSpec:
    """Say what the joined embeddings of encoders are, as in Stable Diffusion 3 (2403.03206).

    CLIP encoders share rows and follow one another along the channels; others follow along the
    rows. What no encoder fills is zero.

    Args:
        encoders: In the order of their token ids and of the spans.
    """
    if not encoders:
        raise ValueError("multimodal.text_encoders = []: name at least one folder.")
    row = max((files.window for files in encoders if family_of(files).is_beside), default=0)
    channel = pooled = 0
    counts: Counter[str] = Counter()
    spans = []
    for files in encoders:
        counts[files.name] += 1
        number = counts[files.name]
        name = files.name if number == 1 else f"{files.name}_{number}"
        if family_of(files).is_beside:
            rows, channels = (0, files.window), (channel, channel + files.dim)
            channel = channels[1]
        else:
            rows, channels = (row, row + files.window), (0, files.dim)
            row = rows[1]
        pooled_range = (pooled, pooled + files.pooled_dim) if files.pooled_dim else (0, 0)
        pooled += files.pooled_dim
        spans.append(EncoderSpan(name, rows, channels, pooled_range))
    dim = max(span.channels[1] for span in spans)
    return PromptSpec("text", "embeddings", row, dim=dim, pooled_dim=pooled, spans=tuple(spans))
