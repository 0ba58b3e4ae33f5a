"""What prompts a model is given: token ids that it encodes itself, or embeddings of others.

A model may have several prompts, such as a text and its spoken form; each becomes a stream of its
own. Embeddings may come from several encoders at once, each of which owns a span of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class EncoderSpan:
    """Which part of a prompt's embeddings one encoder made; ranges are half-open.

    Attributes:
        name: What the encoder is called, for messages.
        rows: Range of positions.
        channels: Range of channels at those positions; the others are zero.
        pooled: Range of channels of the pooled embedding; (0, 0) = it has none.
    """

    name: str
    rows: tuple[int, int]
    channels: tuple[int, int]
    pooled: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class PromptSpec:
    """One prompt of a model.

    Attributes:
        name: Of its stream, such as "text".
        kind: `tokens`: ids that an encoder inside the model embeds. `embeddings`: vectors that
            frozen encoders made.
        length: Positions; shorter prompts are filled up, longer ones cut.
        vocab_size: Of tokens: ids are below it.
        null_token: Of tokens: the id that fills up, and that a dropped prompt consists of.
        dim: Of embeddings: channels.
        pooled_dim: Of embeddings: channels of the pooled embedding; 0 = there is none.
        spans: Of embeddings: what each encoder made.
    """

    name: str
    kind: Literal["tokens", "embeddings"]
    length: int
    vocab_size: int = 0
    null_token: int = 0
    dim: int = 0
    pooled_dim: int = 0
    spans: tuple[EncoderSpan, ...] = ()

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> PromptSpec:
        """Make one of what `dataclasses.asdict` made of it, in which JSON has lists for tuples."""
        values: dict[str, Any] = {**table}
        values["spans"] = tuple(
            EncoderSpan(span["name"], *(tuple(span[key]) for key in ("rows", "channels", "pooled")))
            for span in table["spans"]
        )
        return cls(**values)

    @property
    def num_encoders(self) -> int:
        """How many parts of it can be dropped independently."""
        return max(1, len(self.spans))
