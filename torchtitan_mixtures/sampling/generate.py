"""Continuing documents: prompts in, segments of other modalities out.

A prompt is framed as in training (`data/packing.py`) and left open at its end. All rows of a batch
take one token per step, whatever they are in the middle of. For classifier-free guidance each row
has a second one beside it that knows nothing but `<bos>` and the image so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from torchtitan_mixtures.data.batch_builder import number_runs
from torchtitan_mixtures.data.codecs import Codecs
from torchtitan_mixtures.data.encoding import DocumentEncoder, Modalities
from torchtitan_mixtures.data.sources import Document, Segment
from torchtitan_mixtures.sampling.cache import CachedModel, cached_attention
from torchtitan_mixtures.sampling.decoding import (
    choose_tokens,
    draw_uniforms,
    find_broken,
    guide,
)
from torchtitan_mixtures.sampling.grammar import Grammar, Phase, plan_phases
from torchtitan_mixtures.sampling.settings import SamplingSettings

Prompt = Sequence[Segment]
Progress = Callable[[int, int], None]

_STEPS_BETWEEN_LOOKS = 8  # asking whether all rows are done waits for the device


@dataclass(frozen=True)
class Sample:
    """What was generated after a prompt."""

    prompt: int
    """Number of the prompt."""

    number: int
    """Number of the sample among all; with the seed, it decides what was drawn."""

    segments: tuple[Segment, ...]
    """One per modality asked for: text, or `(codes,)` int64 of the modality's tokenizer."""


def refuse_broken() -> None:
    """Say that a model gives no numbers to choose by."""
    raise ValueError("the model's logits are not finite (did the run diverge?).")


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Prompt],
    into: Sequence[str],
    settings: SamplingSettings,
    codecs: Codecs,
    *,
    num_samples: int = 1,
    batch_size: int = 16,
    stops_early: bool = True,
    progress: Progress | None = None,
    keep: Callable[[Sample], None] = lambda sample: None,
    on_broken: Callable[[], None] = refuse_broken,
) -> list[Sample]:
    """Continue each prompt, several times if asked to.

    Guidance compares with the same image in a document that has nothing before it: neither the
    prompt nor what was generated after it.

    Args:
        model: A model over tokens in evaluation mode; see `cached_attention`.
        prompts: The segments that each document starts with; none is an empty document.
        into: Modalities to generate, one after the other in one document.
        settings: How to draw.
        codecs: Those the model was trained with.
        num_samples: Samples of each prompt.
        batch_size: Samples that are drawn together; guidance doubles their rows.
        stops_early: Stop once all texts have ended. False: the number of model calls depends on no
            drawn token, as is needed where several processes have to make the same calls.
        progress: Called with the steps done and all steps there may be.
        keep: Called with each sample when its batch is done.
        on_broken: Called after a batch for which logits to choose by were not finite. If it
            returns, tokens that the grammar allows stand in their place.

    Returns:
        The samples of the first prompt, of the second, ...

    Raises:
        ValueError: The model lacks a modality, a document does not fit into its positions,
            `into` asks for what cannot be, or what `on_broken` raises.
    """
    rows = encode_prompts(_model_args(model), prompts, into, settings, codecs)
    phases = _phases(into, settings, codecs)
    steps = sum(phase.maximum for phase in phases)
    numbers = range(len(prompts) * num_samples)
    starts = numbers[::batch_size]
    progress = progress or (lambda done, total: None)
    samples = []
    for index, start in enumerate(starts):
        batch = numbers[start : start + batch_size]
        contents, is_broken = _generate_batch(
            model,
            [rows[number // num_samples] for number in batch],
            phases,
            draw_uniforms(settings.seed, batch, steps),
            settings,
            codecs,
            stops_early,
            lambda step, done=index * steps: progress(done + step, len(starts) * steps),
        )
        if is_broken:
            on_broken()
        for number, parts in zip(batch, contents, strict=True):
            segments = [
                _as_segment(name, part, codecs) for name, part in zip(into, parts, strict=True)
            ]
            samples.append(Sample(number // num_samples, number, tuple(segments)))
            keep(samples[-1])
        progress((index + 1) * steps, len(starts) * steps)
    return samples


def encode_prompts(
    model_args: Any,
    prompts: Sequence[Prompt],
    into: Sequence[str],
    settings: SamplingSettings,
    codecs: Codecs,
) -> list[Tensor]:
    """Check a request and turn its prompts into tokens, `<bos>` first.

    Errors and all arguments but the first are those of `generate`.

    Args:
        model_args: Arguments of the model.

    Returns:
        One `(tokens,)` int64 tensor per prompt.
    """
    _check_modalities(prompts, into, codecs)
    if model_args.bidirectional_images and "image" in into:
        raise ValueError(
            "into = image: this model's image tokens see later ones of their image, so it was not "
            "trained to predict them; generate text."
        )
    # Room for any length: what the model has positions for is checked with what is generated.
    encoder = DocumentEncoder(codecs.text, codecs.image, codecs.modalities, seq_len=2**31)
    steps = sum(phase.maximum for phase in _phases(into, settings, codecs))
    rows = []
    for number, prompt in enumerate(prompts):
        (tokens,) = encoder.encode(Document(tuple(prompt), f"(prompt {number})"))
        length = len(tokens) - 1  # <eos> is not part of what goes on
        if length + steps > model_args.max_seq_len:
            which = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            raise ValueError(
                f"{which} has {length} tokens and its continuation up to {steps}: "
                f"{length + steps} positions, but the model was trained with "
                f"{model_args.max_seq_len} (training.seq_len). Shorten the prompt, lower "
                "max_text_tokens or max_speech_seconds, or generate fewer segments."
            )
        rows.append(torch.from_numpy(tokens[:length]))
    return rows


def _check_modalities(prompts: Sequence[Prompt], into: Sequence[str], codecs: Codecs) -> None:
    names, ranges = codecs.modalities.names, codecs.modalities.vocab_ranges
    present = [name for name, (low, high) in zip(names, ranges, strict=True) if high > low]
    prompted = [segment.modality for prompt in prompts for segment in prompt]
    for what, wanted in (("into", into), ("prompt", prompted)):
        for name in wanted:
            if name not in present:
                raise ValueError(
                    f"{what} = {name}: the model has no such modality; it has {', '.join(present)}."
                )
    if not into:
        raise ValueError(f"into = []: must name one or several of {', '.join(present)}.")
    if (names[0], names[0]) in pairwise(into):
        raise ValueError(
            f"into = {list(into)}: a text after a text is one text; raise max_text_tokens."
        )


def _phases(into: Sequence[str], settings: SamplingSettings, codecs: Codecs) -> list[Phase]:
    rate = 0.0 if codecs.speech is None else codecs.speech.units_per_second
    return plan_phases(
        into,
        codecs.modalities,
        codecs.text.sentinels,
        text_vocab_size=codecs.text.vocab_size,
        max_text_tokens=settings.max_text_tokens,
        codes_per_image=codecs.image.codes_per_image,
        max_speech_units=max(1, int(settings.max_speech_seconds * rate)),
    )


def _model_args(model: nn.Module) -> Any:
    return cast(Any, model).model_args


def _generate_batch(
    model: nn.Module,
    prompts: list[Tensor],
    phases: list[Phase],
    uniforms: Tensor,
    settings: SamplingSettings,
    codecs: Codecs,
    stops_early: bool,
    report: Callable[[int], None],
) -> tuple[list[list[Tensor]], bool]:
    """Continue some prompts together.

    Returns:
        The contents of each row's segments, and whether logits to choose by were not finite.
    """
    args, device = _model_args(model), next(model.parameters()).device
    sentinels = codecs.text.sentinels
    grammar = Grammar(phases, len(prompts), args.total_vocab_size, sentinels, device)
    uniforms = uniforms.to(device)
    is_guided = settings.guidance != 1 and any(phase.is_image for phase in phases)
    longest = max(len(prompt) for prompt in prompts)
    chosen, places = [], []
    is_broken = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    with cached_attention(model, longest + grammar.max_steps) as cached:
        rows = _Rows(cached, prompts, sentinels.bos if is_guided else None, codecs, args, device)
        for step in range(grammar.max_steps):
            logits = rows.logits
            if rows.unconditional is not None:
                guided = guide(logits, rows.unconditional, settings.guidance)
                logits = torch.where(grammar.is_image[grammar.phase][:, None], guided, logits)
            allowed = grammar.allowed()
            is_broken |= find_broken(logits, allowed)
            tokens = choose_tokens(logits, allowed, uniforms[:, step], settings)
            tokens, emitted = grammar.advance(tokens)
            chosen.append(tokens)
            places.append(emitted)
            report(step + 1)
            is_look = stops_early and step % _STEPS_BETWEEN_LOOKS == _STEPS_BETWEEN_LOOKS - 1
            if step + 1 == grammar.max_steps or (is_look and bool(grammar.is_done)):
                break
            rows.append(tokens, grammar.is_image[emitted], grammar.opens_image[emitted])
    contents = grammar.contents(torch.stack(chosen, 1).cpu(), torch.stack(places, 1).cpu())
    return contents, bool(is_broken.any())


class _Rows:
    """Documents in the making, with their unconditional twins behind them in the same batch.

    Attributes:
        logits: Of the next token of each document, `(rows, vocab)`.
        unconditional: The same of the twins; None without guidance.
    """

    logits: Tensor
    unconditional: Tensor | None = None

    def __init__(
        self,
        cached: CachedModel,
        prompts: list[Tensor],
        twin: int | None,
        codecs: Codecs,
        args: Any,
        device: torch.device,
    ) -> None:
        """Run the prompts through the model.

        Args:
            cached: The model.
            prompts: Tokens of each document, `(tokens,)` int64.
            twin: The one token that twins start with; None: there are none.
            codecs: For the padding token and the range of images.
            args: Arguments of the model.
            device: Where the model is.
        """
        self._cached = cached
        if twin is not None:
            prompts = [*prompts, *([torch.tensor([twin])] * len(prompts))]
        self._has_twins = twin is not None
        pad = codecs.text.sentinels.pad
        tokens = pad_sequence(prompts, batch_first=True, padding_value=pad).to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        places = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        image_ids = None
        if args.bidirectional_images:
            image_ids = number_images(tokens, codecs.modalities)
        logits = cached(tokens, places, tokens.shape[1], image_ids)
        self._keep(logits.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, logits.shape[2])))
        self._positions = lengths  # of the next token
        self._num_slots = tokens.shape[1]

    def append(self, tokens: Tensor, is_image: Tensor, opens_image: Tensor) -> None:
        """Go on with one token per document.

        A twin's place stands still at 1 until an image begins: what was written there before is
        overwritten, so that it sees `<bos>` and the image only.

        Args:
            tokens: `(rows,)` int64.
            is_image: Whether it is a token of an image, sentinels included, `(rows,)` bool.
            opens_image: Whether it is the sentinel before an image, `(rows,)` bool.
        """
        positions = self._positions
        if self._has_twins:
            own, twins = positions.chunk(2)
            twins = torch.where(is_image & ~opens_image, twins, 1)
            tokens, positions = tokens.repeat(2), torch.cat((own, twins))
        self._num_slots += 1
        self._keep(self._cached(tokens[:, None], positions[:, None], self._num_slots))
        self._positions = positions + 1

    def _keep(self, logits: Tensor) -> None:
        if self._has_twins:
            self.logits, self.unconditional = logits[:, 0].chunk(2)
        else:
            self.logits = logits[:, 0]


def number_images(tokens: Tensor, modalities: Modalities) -> Tensor:
    """Number the images of each row; sentinels keep neighbouring ones apart.

    Args:
        tokens: `(batch, seq)` int64.
        modalities: Names and token ranges.

    Returns:
        `(batch, seq)` int64, -1 outside images.
    """
    if "image" not in modalities.names:
        return torch.full_like(tokens, -1)
    low, high = modalities.vocab_ranges[modalities.names.index("image")]
    is_image = (tokens >= low) & (tokens < high)
    return torch.from_numpy(number_runs(is_image.cpu().numpy())).to(tokens.device)


def _as_segment(name: str, tokens: Tensor, codecs: Codecs) -> Segment:
    index = codecs.modalities.names.index(name)
    if index == 0:
        return Segment(name, codecs.text.decode(tokens.tolist()))
    codes = tokens.numpy().astype(np.int64) - codecs.modalities.vocab_ranges[index][0]
    return Segment(name, codes)
