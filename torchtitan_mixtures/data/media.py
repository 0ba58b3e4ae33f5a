"""Pictures, sounds and texts that documents bring along, read and checked."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchtitan_mixtures.data.audio import read_sound

MAX_MEDIA_BYTES = 1 << 30
"""Of one picture or sound as a file; more is a mistake, and would fill the memory of a worker."""


class MediaReader:
    """Reads pictures and sounds as the tokenizers of a run take them.

    Args:
        image_size: Height and width of pictures.
        sample_rate: Samples per second of sounds; None: the model has no speech.
    """

    def __init__(self, image_size: int, sample_rate: int | None) -> None:
        self.image_size = image_size
        self.sample_rate = sample_rate

    def image(self, file: Path | bytes) -> NDArray[np.uint8]:
        """Read a picture.

        Args:
            file: Its path, or what the file holds.

        Returns:
            `(size, size, 3)` uint8, RGB.

        Raises:
            ValueError: It is missing, broken, or unpacks to an absurd size.
        """
        # Imported late: `datasets`, which opens what it reads, takes a second. Text needs none.
        from torchtitan_mixtures.data.images import decode_image

        return decode_image(_content(file), self.image_size)

    def sound(self, file: Path | bytes, name: str) -> NDArray[np.float32]:
        """Read a sound as one channel.

        Args:
            file: Its path, or what the file holds.
            name: What messages call it.

        Returns:
            `(samples,)` float32 at `sample_rate`.

        Raises:
            ValueError: It is missing or broken, or the model has no speech.
        """
        if self.sample_rate is None:
            raise ValueError(
                "has audio, and the model has no speech; choose a model.flavor with speech, or "
                "leave audio out of the data"
            )
        return read_sound(_content(file), self.sample_rate, name)


def read_file(path: Path, limit: int = MAX_MEDIA_BYTES) -> bytes:
    """Read a whole small file.

    Args:
        path: A regular file; others might never end.
        limit: The most bytes it may have.

    Raises:
        ValueError: There is no such file, or it is not regular or too large.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file")
        if status.st_size > limit:
            raise ValueError(f"{path} has {status.st_size} bytes; at most {limit} are read")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from error


def decode_text(content: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark.

    Raises:
        ValueError: It is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: byte {error.object[error.start]:#04x} at {error.start} ({error.reason})"
        ) from error


def check_text(text: str) -> str:
    """Check that a tokenizer can take a text: JSON can spell what Unicode forbids.

    Returns:
        The text.

    Raises:
        ValueError: It is empty, or has half a surrogate pair.
    """
    if not text:
        raise ValueError("the text is empty")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has half a surrogate pair at character {error.start}"
            ) from error
    return text


def _content(file: Path | bytes) -> bytes:
    return read_file(file) if isinstance(file, Path) else file
