"""What a job's images are taken to be where they are not on this machine, to plan it without them.

Only the planner assumes anything; in training the data itself says what it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class AssumedImages:
    """Shapes and numbers of images, of pixels or of latents.

    Attributes:
        channels: Of what the model sees.
        size: Height and width of it.
        num_classes: Of labelled images.
        domains: Names of their domains; empty: they have none.
    """

    channels: int
    size: int
    num_classes: int
    domains: tuple[str, ...] = ()


_assumed: ContextVar[AssumedImages | None] = ContextVar("assumed_images", default=None)


def assumed_images() -> AssumedImages | None:
    """What is assumed here; None: nothing, the data has to be there."""
    return _assumed.get()


@contextmanager
def assume_images(images: AssumedImages | None) -> Iterator[None]:
    """Let all that ask for a job's images be told these; None: what is there."""
    token = _assumed.set(images)
    try:
        yield
    finally:
        _assumed.reset(token)
