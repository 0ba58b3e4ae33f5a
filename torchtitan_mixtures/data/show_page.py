"""The HTML of `data/show.py`. Whatever comes from data or configuration passes `escape`."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from torchtitan_mixtures.data.audio import write_wav
from torchtitan_mixtures.data.codecs import Codecs
from torchtitan_mixtures.data.encoding import Modalities
from torchtitan_mixtures.data.inspection import (
    Bools,
    DocumentView,
    Ints,
    Piece,
    Row,
    Statistics,
    runs,
)
from torchtitan_mixtures.data.tokenizers import TextTokenizer

TEMPLATE = Path(__file__).with_name("show.html")

MAX_ORDERS = 24
"""Orders of modalities that are listed, the most frequent first."""

_STRIP_HEIGHT = 40  # of the sequence's picture, in its own units; modalities take 0 to 30
_COLOURS = 6  # of modalities in the template

Decoder = Callable[[Ints], str]
"""HTML that shows the codes `(codes,)` of one image or speech; a ValueError if they are none."""


@dataclass(frozen=True)
class SequenceView:
    """One sequence to show."""

    row: Row
    documents: Sequence[DocumentView]
    mistakes: Sequence[str]


def build_decoders(codecs: Codecs) -> dict[str, Decoder]:
    """Build what shows the codes of each modality that the model has a tokenizer for."""

    def show_image(codes: Ints) -> str:
        buffer = io.BytesIO()
        Image.fromarray(codecs.image.decode(codes[None])[0]).save(buffer, "PNG")
        return f'<img alt="decoded image" src="{_data_url("image/png", buffer.getvalue())}">'

    decoders: dict[str, Decoder] = {"image": show_image}
    speech = codecs.speech
    if speech is not None:

        def show_speech(units: Ints) -> str:
            waveform = speech.decode(units)
            buffer = io.BytesIO()
            write_wav(buffer, waveform, speech.sample_rate)
            url = _data_url("audio/wav", buffer.getvalue())
            seconds = len(waveform) / speech.sample_rate
            return f'<audio controls src="{url}"></audio><small>{seconds:.2f} s</small>'

        decoders["speech"] = show_speech
    return decoders


def render_page(
    title: str,
    header: str,
    alerts: Sequence[str],
    statistics: Statistics,
    sequences: Sequence[SequenceView],
    modalities: Modalities,
    tokenizer: TextTokenizer,
    decoders: Mapping[str, Decoder],
) -> str:
    """Render the whole page.

    Args:
        title: What is shown.
        header: HTML of the facts about the run.
        alerts: Messages about broken batches.
        statistics: Of `sequences`.
        sequences: At least one.
        modalities: Names and token ranges.
        tokenizer: Decodes text.
        decoders: What shows the codes of a modality; others are shown as numbers.
    """
    documents = _Documents(modalities, tokenizer, decoders)
    seq_len = len(sequences[0].row.tokens)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        hatch=seq_len / 100,
        half=seq_len / 200,
        alerts=_alerts(alerts),
        header=header,
        statistics=render_statistics(statistics, modalities),
        legend=render_legend(modalities),
        sequences="\n".join(
            render_sequence(number, sequence, documents)
            for number, sequence in enumerate(sequences)
        ),
    )


def definitions(values: Mapping[str, Any]) -> str:
    """Render names and values as a definition list."""
    items = (f"<dt>{escape(key)}</dt><dd>{escape(str(v))}</dd>" for key, v in values.items())
    return f"<dl>{''.join(items)}</dl>"


def render_statistics(statistics: Statistics, modalities: Modalities) -> str:
    """Render the table of modalities and what is known of documents."""
    heads = (
        *("modality", "tokens", "share", "targets", "mean loss weight", "segments"),
        *("mean length", "longest", "different ids"),
    )
    body = ""
    for index, (name, limits, of_modality) in enumerate(
        zip(modalities.names, modalities.vocab_ranges, statistics.modalities, strict=True)
    ):
        cells = (
            f"{of_modality.tokens:,}",
            f"{of_modality.share:.1%}",
            f"{of_modality.targets:,}",
            _number(of_modality.mean_weight, ".3g"),
            f"{of_modality.segments:,}",
            _number(of_modality.mean_length, ".1f"),
            f"{of_modality.max_length:,}",
            f"{of_modality.distinct:,} of {limits[1] - limits[0]:,}",
        )
        columns = "".join(f"<td>{cell}</td>" for cell in cells)
        body += f'<tr><th scope="row">{_swatch(_colour(index))}{escape(name)}</th>{columns}</tr>'
    documents = statistics.documents
    orders = statistics.orders.most_common(MAX_ORDERS)
    named = [
        f"{'>'.join(modalities.names[i] for i in order) or 'nothing'}: {count}"
        for order, count in orders
    ]
    if len(statistics.orders) > MAX_ORDERS:
        rest = statistics.orders.total() - sum(count for _, count in orders)
        named.append(f"{len(statistics.orders) - MAX_ORDERS} further orders: {rest}")
    facts = {
        "documents": f"{sum(documents)}, {sum(documents) / len(documents):.1f} a sequence "
        f"({min(documents)} to {max(documents)})",
        "sentinels": f"{statistics.sentinels:,}, counted as {modalities.names[0]}",
        "padding": f"{statistics.padding_share:.2%} of the positions",
        "without loss": f"{statistics.no_loss_share:.2%} of the positions, padding among them",
        "orders": ", ".join(named),
    }
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        f'<div class="wide"><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>'
        f"</div>{definitions(facts)}"
    )


def render_legend(modalities: Modalities) -> str:
    """Explain colours and marks."""
    entries = [(_colour(index), escape(name)) for index, name in enumerate(modalities.names)]
    entries += [
        ("padding", "padding"),
        ("boundary", "a document begins"),
        ("no-loss-marks", "no loss: the label is -100, nothing is predicted from this position"),
    ]
    items = "".join(f"<li>{_swatch(colour)}{words}</li>" for colour, words in entries)
    return (
        f'<ul class="plain">{items}</ul><p class="faint">In the cards: <code>tags</code> are '
        'sentinels, faint lines part tokens (hover for their ids), <span class="no-loss">dotted'
        "</span> is without loss (an image or a sound: most of it). Images and sounds are decoded "
        "from the codes of the batch.</p>"
    )


def render_sequence(number: int, sequence: SequenceView, documents: _Documents) -> str:
    """Render one sequence: its strip, then a card for every document."""
    cards = [
        documents.render(sequence.row, document, f"s{number}-d{index}", index)
        for index, document in enumerate(sequence.documents)
    ]
    return (
        f'<section id="s{number}"><h2>Sequence {number}</h2>{_alerts(sequence.mistakes)}'
        f"{render_strip(number, sequence)}{''.join(cards)}</section>"
    )


def render_strip(number: int, sequence: SequenceView) -> str:
    """Draw a whole sequence in one line, as wide as the page."""
    row, has_loss = sequence.row, sequence.row.has_loss
    parts = []
    for index, document in enumerate(sequence.documents):
        rects = "".join(
            f'<rect class="{piece.kind} {_colour(piece.modality)}" x="{piece.start}" '
            f'width="{piece.stop - piece.start}" height="30"/>'
            for piece in document.pieces
        )
        title = "padding" if document.is_padding else f"document {index}"
        parts.append(f'<a href="#s{number}-d{index}"><title>{title}</title>{rects}</a>')
    boundaries = "".join(f"M{document.start} 0v30" for document in sequence.documents)
    no_loss = "".join(
        f"M{start} 36h{stop - start}" for start, stop in runs(has_loss) if not has_loss[start]
    )
    seq_len, num_documents = len(row.tokens), sum(not d.is_padding for d in sequence.documents)
    label = f"{num_documents} documents, loss at {has_loss.sum()} of {seq_len} positions"
    return (
        f'<svg class="strip" viewBox="0 0 {seq_len} {_STRIP_HEIGHT}" preserveAspectRatio="none" '
        f'role="group" aria-label="{label}">{"".join(parts)}'
        f'<path class="boundaries" d="{boundaries}"/><path class="no-loss-marks" d="{no_loss}"/>'
        f'</svg><p class="faint">{label}</p>'
    )


class _Documents:
    """Renders documents as cards."""

    def __init__(
        self,
        modalities: Modalities,
        tokenizer: TextTokenizer,
        decoders: Mapping[str, Decoder],
    ) -> None:
        self._modalities = modalities
        self._tokenizer = tokenizer
        self._decoders = decoders
        self._sentinels: dict[int, str] = {}  # several names where one id serves for several
        for name, token in asdict(tokenizer.sentinels).items():
            self._sentinels[token] = "/".join(filter(None, (self._sentinels.get(token), name)))

    def render(self, row: Row, document: DocumentView, anchor: str, index: int) -> str:
        """Render one document, or the padding."""
        where = f"positions {document.start} to {document.stop - 1}"
        size = document.stop - document.start
        if document.is_padding:
            return f'<p class="padding faint" id="{anchor}">padding, {where} ({size})</p>'
        first, last = row.positions[document.start], row.positions[document.stop - 1]
        order = "&gt;".join(escape(self._modalities.names[i]) for i in document.order())
        pieces = "".join(self._piece(row, piece) for piece in document.pieces)
        return (
            f'<article id="{anchor}"><h3>Document {index} <small>{where} ({size}), rotary {first} '
            f'to {last}; {order}</small></h3><ol class="pieces">{pieces}</ol></article>'
        )

    def _piece(self, row: Row, piece: Piece) -> str:
        inside = slice(piece.start, piece.stop)
        tokens, has_loss = row.tokens[inside], row.has_loss[inside]
        colour = _colour(piece.modality)
        if piece.kind == "sentinel":
            token = int(tokens[0])
            loss = _loss_class(has_loss.any())
            shown = f"<code{loss} title={_title([token], has_loss)}>{self._sentinels[token]}</code>"
            return f'<li class="sentinel">{shown}</li>'
        if piece.modality == 0:
            title = f"positions {piece.start} to {piece.stop - 1}"
            text = self._text(tokens, has_loss)
            return f'<li class="{colour}" title="{title}">{text}</li>'
        weights = sorted(set(row.weights[inside][has_loss].tolist()))
        caption = f"{len(tokens)} codes, loss at {has_loss.sum()}"
        # The last code may have a loss only because it predicts a sentinel, or none for the same.
        loss = _loss_class(2 * has_loss.sum() >= len(tokens))
        if weights not in ([], [1.0]):
            caption += f", weight {' and '.join(f'{weight:g}' for weight in weights)}"
        name = self._modalities.names[piece.modality]
        return (
            f'<li class="{colour}"><figure{loss}>'
            f"{self._codes(name, tokens - self._modalities.vocab_ranges[piece.modality][0])}"
            f"<figcaption>{escape(name)}, positions {piece.start} to {piece.stop - 1}: {caption}"
            "</figcaption></figure></li>"
        )

    def _codes(self, name: str, codes: Ints) -> str:
        """Decoded codes, or the codes themselves, and why, if they cannot be decoded."""
        numbers = f"<code>{' '.join(map(str, codes.tolist()))}</code>"
        if name not in self._decoders:
            return numbers
        try:
            return self._decoders[name](codes)
        except ValueError as error:
            return f'<p class="alert">{escape(str(error))}</p>{numbers}'

    def _text(self, tokens: Ints, has_loss: Bools) -> str:
        spans, place = [], 0
        for ids, text in split_text(self._tokenizer, tokens.tolist()):
            loss = has_loss[place : place + len(ids)]
            place += len(ids)
            spans.append(
                f"<span{_loss_class(loss.all())} title={_title(ids, loss)}>{escape(text)}</span>"
            )
        return f'<p dir="auto">{"".join(spans)}</p>'


def split_text(tokenizer: TextTokenizer, ids: list[int]) -> list[tuple[list[int], str]]:
    """Decode ids one by one, several together where a character takes several tokens.

    Returns:
        Ids and their text; the texts add up to the decoded whole.
    """
    parts: list[tuple[list[int], str]] = []
    before: list[int] = []  # a token may be decoded otherwise at the start of a text
    group: list[int] = []
    for position, token in enumerate(ids, 1):
        group.append(token)
        with_before = tokenizer.decode([*before, *group], skip_special=False)
        if with_before.endswith("\ufffd") and position < len(ids):
            continue
        start = len(tokenizer.decode(before, skip_special=False)) if before else 0
        parts.append((group, with_before[start:]))
        before, group = group, []
    whole = tokenizer.decode(ids, skip_special=False)
    return parts if "".join(text for _, text in parts) == whole else [(ids, whole)]


def _title(ids: Sequence[int], has_loss: Bools) -> str:
    return f'"{" ".join(map(str, ids))}{"" if has_loss.all() else ", no loss"}"'


def _loss_class(has_loss: bool | np.bool_) -> str:
    return "" if has_loss else ' class="no-loss"'


def _alerts(messages: Sequence[str]) -> str:
    return "".join(f'<p class="alert" role="alert">{escape(message)}</p>' for message in messages)


def _swatch(colour: str) -> str:
    return f'<span class="swatch {colour}"></span>'


def _colour(modality: int) -> str:
    return f"m{modality % _COLOURS}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
