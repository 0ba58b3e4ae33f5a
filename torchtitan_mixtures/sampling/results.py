"""What was generated, decoded, and as files in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from torchtitan_mixtures.data.audio import write_wav
from torchtitan_mixtures.data.codecs import Codecs
from torchtitan_mixtures.data.sources import Segment
from torchtitan_mixtures.sampling.generate import Sample
from torchtitan_mixtures.sampling.pictures import SheetRow, contact_sheet

SHEET_NAME = "contact_sheet.png"
TABLE_NAME = "samples.json"


@dataclass(frozen=True)
class Result:
    """The samples of one prompt."""

    prompt: str
    """The prompt's text, or the name of its file."""

    samples: Sequence[Sample]


def decode_image(segment: Segment, codecs: Codecs) -> NDArray[np.uint8]:
    """The image of a segment of codes, `(height, width, 3)` uint8."""
    return codecs.image.decode(np.asarray(segment.payload)[None])[0]


def decode_speech(segment: Segment, codecs: Codecs) -> tuple[NDArray[np.float32], int]:
    """The waveform of a segment of units, `(samples,)` float32, and its sample rate."""
    assert codecs.speech is not None  # or there were no units
    return codecs.speech.decode(np.asarray(segment.payload)), codecs.speech.sample_rate


def draw_sheet(results: Sequence[Result], codecs: Codecs) -> NDArray[np.uint8] | None:
    """Draw all images, one row per prompt, `(height, width, 3)` uint8; None if there are none."""
    rows = [
        SheetRow(
            result.prompt,
            [
                decode_image(segment, codecs)
                for sample in result.samples
                for segment in sample.segments
                if segment.modality == "image"
            ],
        )
        for result in results
    ]
    rows = [row for row in rows if row.images]
    return contact_sheet(rows) if rows else None


def write_sample(
    folder: Path, name: str, prompt: str, sample: Sample, codecs: Codecs
) -> dict[str, Any]:
    """Write a PNG for each image and a WAV for each speech.

    Args:
        folder: Where to.
        name: What the names of the files begin with.
        prompt: The prompt's text, or the name of its file.
        sample: What was generated.
        codecs: Those it was generated with.

    Returns:
        Its entry in `samples.json`.
    """
    segments = [
        _write_segment(folder, f"{name}_{part}", segment, codecs)
        for part, segment in enumerate(sample.segments)
    ]
    return {"prompt": prompt, "number": sample.number, "segments": segments}


def write_table(folder: Path, samples: Iterable[Mapping[str, Any]], facts: Any) -> None:
    """Write `samples.json`.

    Args:
        folder: Where to.
        samples: Entries of `write_sample`.
        facts: A dictionary of what it says beside them; must be JSON.
    """
    text = json.dumps({**facts, "samples": list(samples)}, indent=1, ensure_ascii=False) + "\n"
    # Names of files may hold bytes that are no text.
    (folder / TABLE_NAME).write_text(text, encoding="utf-8", errors="replace")


def write_sheet(folder: Path, results: Sequence[Result], codecs: Codecs) -> None:
    """Write the contact sheet, if there are images."""
    sheet = draw_sheet(results, codecs)
    if sheet is not None:
        Image.fromarray(sheet).save(folder / SHEET_NAME)


def _write_segment(folder: Path, name: str, segment: Segment, codecs: Codecs) -> dict[str, Any]:
    """Write the file of a segment that needs one; returns its entry in `samples.json`."""
    payload = segment.payload
    if isinstance(payload, str):
        return {"modality": segment.modality, "text": payload}
    if segment.modality == "image":
        file = f"{name}.png"
        Image.fromarray(decode_image(segment, codecs)).save(folder / file)
    else:
        file = f"{name}.wav"
        write_wav(folder / file, *decode_speech(segment, codecs))
    return {"modality": segment.modality, "file": file, "codes": payload.tolist()}
