"""Trains codebooks of image patches and of sounds on a user's files, by k-means.

A sample of patches, drawn evenly over all files and bounded in memory, is clustered; some files are
held out to say how well the codebook serves what it has not seen.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from torchtitan_mixtures.data.audio import read_sound
from torchtitan_mixtures.data.codebooks import nearest_centres, split_patches
from torchtitan_mixtures.data.image_files import SUFFIXES
from torchtitan_mixtures.data.images import decode_image
from torchtitan_mixtures.data.kmeans import kmeans
from torchtitan_mixtures.data.speech import FRAMES_PER_SECOND, split_stretches
from torchtitan_mixtures.data.training_rows import RowReader, Rows, RowSample, find_files

SOUND_SUFFIXES = (".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav")

MAX_CODES = 32_768

_MAX_ROWS = 2**20  # that k-means sees
_MAX_BYTES = 2**28  # of them
_JUDGED = 1000  # files of either kind that the quality is measured on


@dataclass(frozen=True)
class Training:
    """What both kinds of training are told."""

    path: str
    """Folder, searched with all that are in it, or a pattern such as "photos/*.jpg"."""

    out: Path
    """Codebook file to write."""

    codes: int = 1024
    """Number of centres."""

    max_files: int | None = None
    """Files used, drawn at random; None: all."""

    holdout: float = 0.05
    """Share of the files that is not trained on."""

    seed: int = 0
    """Of all that is drawn."""

    iterations: int = 25
    """Rounds of k-means."""

    max_bad_fraction: float = 0.01
    """Share of broken files above which the training stops."""

    def check(self) -> None:
        """Check the values.

        Raises:
            ValueError: One is out of range, or `out` exists.
        """
        limits = (
            ("--codes", self.codes, 2 <= self.codes <= MAX_CODES, f"2 to {MAX_CODES}"),
            ("--iterations", self.iterations, self.iterations >= 1, "at least 1"),
            ("--holdout", self.holdout, 0 <= self.holdout < 1, "at least 0 and below 1"),
            (
                "--max-bad-fraction",
                self.max_bad_fraction,
                0 <= self.max_bad_fraction <= 1,
                "between 0 and 1",
            ),
            (
                "the number of files",
                self.max_files,
                self.max_files is None or self.max_files >= 1,
                "at least 1",
            ),
        )
        for name, value, is_good, expected in limits:
            if not is_good:
                raise ValueError(f"{name} = {value} is out of range; expected {expected}")
        if self.out.exists():
            # Models may have been trained on what it is.
            raise ValueError(f"--out {self.out} exists; name a new file, or delete this one")


@dataclass
class Quality:
    """How well a codebook serves some files."""

    num_codes: int
    files: int = 0
    _error: int = 0
    _values: int = 0
    _squares: int = 0
    _sums: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    _counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))

    def add(self, rows: Rows, centres: Rows) -> None:
        """Encode one file's rows and count."""
        codes = nearest_centres(rows, centres)
        difference = rows.astype(np.int64) - centres[codes]
        self.files += 1
        self._error += int((difference**2).sum())
        self._values += rows.size
        self._squares += int((rows.astype(np.int64) ** 2).sum())
        self._sums = self._sums + rows.sum(axis=0, dtype=np.int64)
        self._counts = self._counts + np.bincount(codes, minlength=self.num_codes)

    @property
    def psnr(self) -> float:
        """Of all values together, in dB; infinite if nothing was lost."""
        mean = self._error / self._values
        return 10 * math.log10(255**2 / mean) if mean else math.inf

    @property
    def variance_kept(self) -> float:
        """Share of the variance of values around the mean of their place; 1: nothing was lost.

        Less than 0 if the means themselves would serve better; 0 if nothing varies.
        """
        num_rows = int(self._counts.sum())
        about_mean = self._squares - sum(int(total) ** 2 for total in self._sums) / num_rows
        if not self._error:
            return 1.0
        return 1 - self._error / about_mean if about_mean > 0 else 0.0

    @property
    def used(self) -> float:
        """Share of the codes that occur."""
        return float((self._counts > 0).mean())

    @property
    def perplexity(self) -> float:
        """Number of codes that would occur as evenly, if all did alike."""
        shares = self._counts[self._counts > 0] / self._counts.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))


@dataclass(frozen=True)
class Trained:
    """A codebook, `centres` `(codes, dim)` uint8, and its quality."""

    centres: Rows
    trained: Quality
    held_out: Quality | None
    """None: nothing was held out."""


def train_image_tokenizer(
    training: Training, size: int, patch_size: int, log: Callable[[str], None]
) -> Trained:
    """Train a codebook of patches and write it; `multimodal.image_tokenizer` takes the file.

    Images are decoded as for training: on white, cropped to the centre square. Code 0 is white.

    Args:
        training: See there.
        size: Height and width that images are brought to.
        patch_size: Height and width of a patch.
        log: Called with lines that say how it goes.

    Raises:
        ValueError: A value is out of range, there are no images, too few different patches, or too
            many broken images; nothing is written then.
    """
    if patch_size < 1 or size < 1 or size % patch_size:
        raise ValueError(f"--size = {size} is not a multiple of --patch-size = {patch_size}")

    def read(path: Path) -> Rows:
        return split_patches(decode_image(path.read_bytes(), size)[None], patch_size)

    white = np.full(patch_size**2 * 3, 255, np.uint8)
    trained = _train(training, SUFFIXES, read, white, "image", log)
    _write(
        training.out,
        centres=trained.centres.reshape(-1, patch_size, patch_size, 3),
        image_size=np.array([size], np.int64),
    )
    for name, quality in (("trained", trained.trained), ("held-out", trained.held_out)):
        if quality is not None:
            log(f"PSNR {quality.psnr:.2f} dB of {quality.files} {name} images")
    _log_use(trained, "images", log)
    return trained


def train_speech_tokenizer(
    training: Training,
    bands: int,
    sample_rate: int,
    frames_per_unit: int,
    log: Callable[[str], None],
) -> Trained:
    """Train a codebook of log-mel spectra and write it; `multimodal.speech_tokenizer` takes it.

    Args:
        training: See there. Code 0 is silence.
        bands: Mel bands of a spectrum.
        sample_rate: Samples per second that sounds are brought to.
        frames_per_unit: Spectra of 20 ms that a unit stands for.
        log: Called with lines that say how it goes.

    Raises:
        ValueError: A value is out of range, there are no sounds, too few different stretches, or
            too many broken files; nothing is written then.
    """
    if sample_rate < 1 or sample_rate % (2 * FRAMES_PER_SECOND):
        raise ValueError(
            f"--sample-rate = {sample_rate} is not a multiple of {2 * FRAMES_PER_SECOND}"
        )
    if bands < 1 or frames_per_unit < 1:
        raise ValueError(
            f"--bands = {bands} and --frames-per-unit = {frames_per_unit}; expected at least 1"
        )

    def read(path: Path) -> Rows:
        waveform = read_sound(path, sample_rate, str(path))
        return split_stretches(waveform, sample_rate, frames_per_unit, bands)

    silence = np.zeros(frames_per_unit * bands, np.uint8)
    trained = _train(training, SOUND_SUFFIXES, read, silence, "sound", log)
    _write(
        training.out,
        centres=trained.centres.reshape(-1, frames_per_unit, bands),
        sample_rate=np.array([sample_rate], np.int64),
    )
    for name, quality in (("trained", trained.trained), ("held-out", trained.held_out)):
        if quality is not None:
            log(
                f"{quality.variance_kept:.1%} of the variance of {quality.files} {name} sounds kept"
            )
    _log_use(trained, "sounds", log)
    return trained


def _log_use(trained: Trained, what: str, log: Callable[[str], None]) -> None:
    name = "trained" if trained.held_out is None else "held-out"
    quality = trained.held_out or trained.trained
    log(
        f"{quality.used:.1%} of {quality.num_codes} codes occur in {quality.files} {name} {what}, "
        f"perplexity {quality.perplexity:.1f}"
    )


def _train(
    training: Training,
    suffixes: Sequence[str],
    read: Callable[[Path], Rows],
    pinned: Rows,
    what: str,
    log: Callable[[str], None],
) -> Trained:
    training.check()
    held_out, trained = _divide(training, find_files(training.path, suffixes), what)
    files = RowReader(read, training.max_bad_fraction, what, training.path, log)
    sample = RowSample(min(_MAX_ROWS, _MAX_BYTES // len(pinned)), training.seed)
    for rows in files.read(trained):
        sample.add(rows)
    files.judge()
    points, counts = np.unique(sample.rows(len(pinned)), axis=0, return_counts=True)
    num_others = int((points != pinned).any(axis=1).sum())  # code 0 does not move
    if num_others < training.codes - 1:
        raise ValueError(
            f"--codes = {training.codes}, but the {what}s of {training.path} have only "
            f"{num_others} different pieces to make {training.codes - 1} of them of; lower it or "
            f"take more {what}s"
        )
    log(
        f"{len(trained)} {what}s, and {len(held_out)} held out; k-means of {counts.sum()} pieces, "
        f"{len(points)} of them different"
    )
    centres = kmeans(points, counts, pinned, training.codes, training.iterations, training.seed)
    qualities = [Quality(training.codes), Quality(training.codes)]
    for quality, paths in zip(qualities, (trained, held_out), strict=True):
        for rows in itertools.islice(files.read(paths), _JUDGED):
            quality.add(rows, centres)
    files.judge()
    return Trained(centres, qualities[0], qualities[1] if qualities[1].files else None)


def _divide(training: Training, files: list[Path], what: str) -> tuple[list[Path], list[Path]]:
    """Files held out, and those trained on, both in random order."""
    random.Random(training.seed).shuffle(files)
    files = files[: training.max_files]
    num_held_out = math.ceil(training.holdout * len(files))
    if num_held_out == len(files):
        raise ValueError(
            f"--path {training.path} gives {len(files)} {what}, which --holdout = "
            f"{training.holdout} takes; name more, or set --holdout 0"
        )
    return files[:num_held_out], files[num_held_out:]


def _write(path: Path, **tensors: NDArray) -> None:
    """Write safetensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(save(tensors))
    temporary.replace(path)
