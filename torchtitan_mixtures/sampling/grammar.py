"""What may follow: a state machine per row that keeps generated documents well-formed.

A document in the making passes through phases. An image is `<image_start>`, exactly as many codes
as the image tokenizer needs, `<image_end>`; speech is `<speech_start>`, units until the model says
`<speech_end>`, at most so many, `<speech_end>`; text is tokens until the model says that something
else follows, at most so many. All rows step together and each is in a phase of its own; tables
indexed by phase make a step a handful of tensor operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from torchtitan_mixtures.data.encoding import Modalities
from torchtitan_mixtures.data.tokenizers import Sentinels


@dataclass(frozen=True)
class Phase:
    """A stretch of tokens of one set."""

    start: int
    stop: int
    """The tokens are `[start, stop)`, without sentinels unless it is a single one."""

    minimum: int
    maximum: int
    """How many tokens the phase takes."""

    ends: tuple[int, ...] = ()
    """Tokens with which the model says that the phase is over, once `minimum` is reached. In their
    place comes the first token of the next phase, which is one of a single choice."""

    segment: int = -1
    """Number of the generated segment of which these tokens are the content."""

    is_image: bool = False
    """Whether the tokens are an image's, sentinels included."""

    opens_image: bool = False
    """Whether this is the sentinel in front of an image."""


def plan_phases(
    into: Sequence[str],
    modalities: Modalities,
    sentinels: Sentinels,
    *,
    text_vocab_size: int,
    max_text_tokens: int,
    codes_per_image: int,
    max_speech_units: int,
) -> list[Phase]:
    """Lay out the phases of a continuation.

    Args:
        into: Modality of each segment to generate.
        modalities: Names and token ranges of the model.
        sentinels: Ids of the sentinels.
        text_vocab_size: Number of text tokens that can be decoded.
        max_text_tokens: Longest text.
        codes_per_image: Length of every image.
        max_speech_units: Longest speech.
    """
    others = modalities.names[1:]
    openings = tuple(getattr(sentinels, f"{name}_start") for name in others)
    phases = []
    for segment, name in enumerate(into):
        first, last = modalities.vocab_ranges[modalities.names.index(name)]
        if name not in others:
            ends = (sentinels.eos, *openings)
            last = min(last, text_vocab_size)
            phases.append(Phase(first, last, 1, max_text_tokens, ends, segment))
            continue
        opening, closing = (getattr(sentinels, f"{name}_{end}") for end in ("start", "end"))
        is_image = name == "image"
        least, most = (codes_per_image,) * 2 if is_image else (1, max_speech_units)
        ends = () if is_image else (closing,)
        phases += [
            Phase(opening, opening + 1, 1, 1, is_image=is_image, opens_image=is_image),
            Phase(first, last, least, most, ends, segment, is_image),
            Phase(closing, closing + 1, 1, 1, is_image=is_image),
        ]
    return phases


class Grammar:
    """The phases of a continuation as tables, and the rows' places in them.

    Attributes:
        max_steps: Tokens after which every row is done.
        phase: Phase of each row, `(rows,)` int64; the number of phases once a row is done.
        is_image: Whether a phase is of an image, `(phases + 1,)` bool.
        opens_image: Whether a phase is the sentinel before an image, `(phases + 1,)` bool.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        rows: int,
        vocab_size: int,
        sentinels: Sentinels,
        device: torch.device,
    ) -> None:
        """Put all rows at the beginning.

        Args:
            phases: As planned by `plan_phases`.
            rows: Number of documents.
            vocab_size: Entries of the whole vocabulary.
            sentinels: Ids of the sentinels.
            device: Where the tables are to be.
        """
        self.max_steps = sum(phase.maximum for phase in phases)
        # A row that is done repeats <eos> for as long as others go on.
        self._phases = [*phases, Phase(sentinels.eos, sentinels.eos + 1, 0, self.max_steps + 1)]
        special = {getattr(sentinels, field.name) for field in fields(sentinels)}
        content = torch.zeros(len(self._phases), vocab_size, dtype=torch.bool)
        ends = content.clone()
        for row, phase in enumerate(self._phases):
            content[row, phase.start : phase.stop] = True
            if phase.segment >= 0:
                content[row, sorted(special)] = False
            ends[row, list(phase.ends)] = True
        self._content, self._ends = content.to(device), ends.to(device)

        def table(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, device=device)

        self._minimum = table([phase.minimum for phase in self._phases])
        self._maximum = table([phase.maximum for phase in self._phases])
        self._first = table([phase.start for phase in self._phases])
        self.is_image = table([phase.is_image for phase in self._phases])
        self.opens_image = table([phase.opens_image for phase in self._phases])
        self.phase = torch.zeros(rows, dtype=torch.int64, device=device)
        self._count = torch.zeros_like(self.phase)

    def allowed(self) -> Tensor:
        """Tokens that may come next, `(rows, vocab)` bool."""
        may_end = self._count >= self._minimum[self.phase]
        return self._content[self.phase] | (self._ends[self.phase] & may_end[:, None])

    def advance(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Move every row on by one token.

        Args:
            chosen: A token for each row out of `allowed`, `(rows,)` int64.

        Returns:
            The tokens that the documents go on with, `(rows,)` int64, and the phase that each
            belongs to, `(rows,)` int64.
        """
        is_end = self._ends[self.phase].gather(1, chosen[:, None])[:, 0]
        emitted = self.phase + is_end
        tokens = torch.where(is_end, self._first[emitted], chosen)
        count = torch.where(is_end, 0, self._count) + 1
        is_full = count >= self._maximum[emitted]
        self.phase = emitted + is_full
        self._count = torch.where(is_full, 0, count)
        return tokens, emitted

    @property
    def is_done(self) -> Tensor:
        """Whether all rows are, a bool scalar on the device."""
        return (self.phase == len(self._phases) - 1).all()

    def contents(self, tokens: Tensor, emitted: Tensor) -> list[list[Tensor]]:
        """Cut the tokens of each row into the generated segments, without sentinels.

        Args:
            tokens: What `advance` returned, step after step, `(rows, steps)`.
            emitted: The phases beside them, `(rows, steps)`.

        Returns:
            For each row one `(tokens of the segment,)` tensor per segment.
        """
        numbers = [row for row, phase in enumerate(self._phases) if phase.segment >= 0]
        return [
            [ids[phases == number] for number in numbers]
            for ids, phases in zip(tokens, emitted, strict=True)
        ]
