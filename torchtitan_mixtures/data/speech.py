"""Speech as discrete units: stretches of a log-mel spectrogram by their nearest centre.

Encoding is what speech language models do with learned features, here with the oldest features
there are. Decoding is rough: the log-mel of the units says nothing about pitch harmonics and
phases, and Griffin-Lim invents the phases. Words stay intelligible at best; the voice does not.

**Source**: mel scale of O'Shaughnessy (1987) in its HTK form; Griffin and Lim, "Signal estimation
from modified short-time Fourier transform" (1984); its momentum from Perraudin, Balazs and
Sondergaard, "A fast Griffin-Lim algorithm" (2013), equations of Algorithm 2.
"""

import functools
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from torchtitan_mixtures.data.audio import check_waveform
from torchtitan_mixtures.data.codebooks import (
    check_codes,
    codebook_fingerprint,
    find_codebook,
    naming_key,
    nearest_centres,
    read_codebook,
)
from torchtitan_mixtures.data.emoji import EMBEDDED_FOLDER

SPEECH_TOKENIZERS = {"emoji_25hz": EMBEDDED_FOLDER / "codebook_speech.safetensors"}
"""Names of the embedded speech tokenizers and their files."""

FRAMES_PER_SECOND = 50
"""Spectra per second. A spectrum sees twice its step: 40 ms through a Hann window."""

FLOOR_DB, CEILING_DB = -90.0, 0.0
"""Band powers that become levels 0 and 255; 0 dB is a sine of full scale."""

GRIFFIN_LIM_ROUNDS = 32
GRIFFIN_LIM_MOMENTUM = 0.99
_INVERSION_ROUNDS = 50
_TINY = 1e-12

Floats = NDArray[np.float64]
Spectra = NDArray[np.complex128]


class SpeechTokenizer(Protocol):
    """Turns a waveform into units and back; what a learned tokenizer must offer too."""

    num_codes: int
    sample_rate: int
    units_per_second: float

    def encode(self, waveform: NDArray[np.float32]) -> NDArray[np.int64]:
        """Units of a waveform.

        Args:
            waveform: `(samples,)` float32 in [-1, 1] at `sample_rate`.

        Returns:
            `(units,)` int64 in `[0, num_codes)`; silence fills the last unit.
        """
        ...

    def decode(self, units: NDArray[np.int64]) -> NDArray[np.float32]:
        """A waveform that sounds like the units.

        Args:
            units: `(units,)` integers in `[0, num_codes)`.

        Returns:
            `(samples,)` float32 at `sample_rate`, as long as the units say.
        """
        ...

    def fingerprint(self) -> str:
        """A digest (SHA-256, hexadecimal) of all that units depend on."""
        ...


class LogMelCodebook:
    """Vector quantisation of a few successive log-mel spectra by their nearest centre.

    The file is safetensors with two entries: `centres`, `(codes, frames, bands)` uint8 levels (see
    `log_mel_levels`), and `sample_rate`, `(1,)` int64. Levels are rounded before anything is
    compared, so what follows is arithmetic on integers, the same on every machine.

    Args:
        path: The codebook file.

    Raises:
        ValueError: The file is not such a codebook.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._stretches, self.sample_rate = _read_stretches(self.path)
        self.num_codes, self.frames_per_unit, self.num_bands = self._stretches.shape
        self.units_per_second = FRAMES_PER_SECOND / self.frames_per_unit
        self.centres = self._stretches.reshape(self.num_codes, -1)  # (codes, frames * bands)

    def encode(self, waveform: NDArray[np.float32]) -> NDArray[np.int64]:
        """Units of a waveform; see `SpeechTokenizer.encode`."""
        check_waveform(waveform)
        stretches = split_stretches(
            waveform, self.sample_rate, self.frames_per_unit, self.num_bands
        )
        return nearest_centres(stretches, self.centres)

    def decode(self, units: NDArray[np.int64]) -> NDArray[np.float32]:
        """A rough waveform of units by Griffin-Lim; see `SpeechTokenizer.decode`."""
        levels = self.centres[self.check_units(units)].reshape(-1, self.num_bands)
        return invert_levels(levels, self.sample_rate).astype(np.float32)

    def check_units(self, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """The units as an array, if this codebook has them all.

        Raises:
            ValueError: They are not `(units,)` integers in `[0, num_codes)`.
        """
        units = np.asarray(units)
        if units.ndim != 1 or (units.size and not np.issubdtype(units.dtype, np.integer)):
            raise ValueError(
                f"units of shape {units.shape} and dtype {units.dtype} do not fit codebook "
                f"{self.path}; expected (units,) integers"
            )
        check_codes(units, self.num_codes, self.path)
        return units.astype(np.int64)

    def fingerprint(self) -> str:
        """See `SpeechTokenizer.fingerprint`."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return codebook_fingerprint("sample_rate", self._stretches, self.sample_rate)


def build_speech_tokenizer(name: str) -> SpeechTokenizer:
    """The speech tokenizer of a name in `SPEECH_TOKENIZERS`, or of a codebook file.

    Raises:
        ValueError: `name` is neither, or the file is not a codebook; names the key.
    """
    key = "speech_tokenizer"
    with naming_key(key, name):
        return LogMelCodebook(find_codebook(key, name, SPEECH_TOKENIZERS))


def _read_stretches(path: Path) -> tuple[NDArray[np.uint8], int]:
    centres, sample_rate, described = read_codebook(
        path,
        "sample_rate",
        3,
        "expected a speech codebook: safetensors with `centres`, (codes, frames, bands) uint8, "
        f"and `sample_rate`, (1,) int64, a multiple of {2 * FRAMES_PER_SECOND}",
    )
    if not centres.size or sample_rate < 1 or sample_rate % (2 * FRAMES_PER_SECOND):
        raise ValueError(described)
    return centres, sample_rate


# --- spectra --------------------------------------------------------------------------------------


def split_stretches(
    waveform: NDArray[np.floating], sample_rate: int, frames: int, num_bands: int
) -> NDArray[np.uint8]:
    """Cut a waveform into the stretches that units stand for.

    Args:
        waveform: `(samples,)` floating in [-1, 1].
        sample_rate: Samples per second.
        frames: Spectra of a stretch.
        num_bands: Bands of a spectrum.

    Returns:
        `(stretches, frames * num_bands)` uint8 levels; silence fills the last stretch.
    """
    length = frames * sample_rate // FRAMES_PER_SECOND
    padded = np.pad(waveform.astype(np.float64), (0, -len(waveform) % length))
    return log_mel_levels(padded, sample_rate, num_bands).reshape(-1, frames * num_bands)


def log_mel_levels(waveform: Floats, sample_rate: int, num_bands: int) -> NDArray[np.uint8]:
    """Power of each mel band in each frame, as a byte.

    Args:
        waveform: `(frames * step,)` in [-1, 1], where `step = sample_rate / 50`.
        sample_rate: Samples per second.
        num_bands: Number of mel bands.

    Returns:
        `(frames, num_bands)` uint8: `FLOOR_DB` to `CEILING_DB` in 255 equal steps, clipped.
    """
    step = sample_rate // FRAMES_PER_SECOND
    if not len(waveform):
        return np.zeros((0, num_bands), np.uint8)
    # Frames of two steps around the middle of each step.
    frames = sliding_window_view(np.pad(waveform, step // 2), 2 * step)[::step]
    power = np.abs(np.fft.rfft(frames * _hann(2 * step))) ** 2  # (frames, bins)
    bands = power @ mel_filters(sample_rate, 2 * step, num_bands).T / _full_scale(step)
    decibels = 10 * np.log10(np.maximum(bands, _TINY))
    levels = (decibels - FLOOR_DB) * (255 / (CEILING_DB - FLOOR_DB))
    return np.rint(np.clip(levels, 0, 255)).astype(np.uint8)


@functools.cache
def mel_filters(sample_rate: int, window: int, num_bands: int) -> Floats:
    """Triangles of height 1 whose corners are equally far from each other on the mel scale.

    Returns:
        `(num_bands, window // 2 + 1)`: weight of each frequency bin in each band.
    """
    top = 2595 * np.log10(1 + sample_rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, num_bands + 2) / 2595) - 1)  # Hz
    bins = np.arange(window // 2 + 1) * (sample_rate / window)
    left, middle, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (bins - left) / (middle - left), (right - bins) / (right - middle)
    return np.maximum(0, np.minimum(rising, falling))


@functools.cache
def _hann(length: int) -> Floats:
    """The periodic Hann window: shifted by half its length it adds up to 1."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)


def _full_scale(step: int) -> float:
    """Power of the strongest bin of a sine of amplitude 1."""
    return (_hann(2 * step).sum() / 2) ** 2


# --- back to sound --------------------------------------------------------------------------------


def invert_levels(levels: NDArray[np.uint8], sample_rate: int) -> Floats:
    """A waveform whose log-mel levels are near the given ones.

    Args:
        levels: `(frames, bands)` uint8 of `log_mel_levels`.
        sample_rate: Samples per second.

    Returns:
        `(frames * step,)` in [-1, 1].
    """
    step = sample_rate // FRAMES_PER_SECOND
    if not len(levels):
        return np.zeros(0)
    # Phases need more overlap than units have: spectra between two frames are their mean.
    decibels = levels * ((CEILING_DB - FLOOR_DB) / 255) + FLOOR_DB
    edged = np.pad(decibels, ((1, 1), (0, 0)), mode="edge")
    dense = np.empty((2 * len(levels) + 1, levels.shape[1]))
    dense[0::2] = (edged[:-1] + edged[1:]) / 2
    dense[1::2] = decibels
    bands = 10 ** (dense / 10) * _full_scale(step)
    magnitudes = np.sqrt(spread_bands(bands, mel_filters(sample_rate, 2 * step, levels.shape[1])))
    return np.clip(griffin_lim(magnitudes, step // 2), -1, 1)


def spread_bands(bands: Floats, filters: Floats) -> Floats:
    """Non-negative powers per bin whose bands are the given ones as nearly as possible.

    Multiplicative updates of non-negative least squares (Lee and Seung, 2001), from a flat start
    that keeps bins without information smooth.

    Args:
        bands: `(frames, bands)`, powers.
        filters: `(bands, bins)` of `mel_filters`.

    Returns:
        `(frames, bins)`.
    """
    target = bands @ filters
    gram = filters.T @ filters
    power = target / np.maximum(filters.sum(0), _TINY)
    for _ in range(_INVERSION_ROUNDS):
        power *= target / np.maximum(power @ gram, _TINY)
    return power


def griffin_lim(magnitudes: Floats, hop: int) -> Floats:
    """A waveform whose spectra have nearly the given magnitudes; phases start at random.

    The random numbers are always the same ones, so equal magnitudes give equal waveforms.

    Args:
        magnitudes: `(frames, 2 * hop + 1)`; frame `i` is centred on sample `i * hop`, through a
            Hann window of `4 * hop`.
        hop: Samples from frame to frame.

    Returns:
        `((frames - 1) * hop,)`.
    """
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, magnitudes.shape)
    phases: Spectra = np.cos(angles) + 1j * np.sin(angles)
    previous: Spectra = np.zeros_like(phases)
    for _ in range(GRIFFIN_LIM_ROUNDS):
        consistent = short_spectra(_overlap_add(magnitudes * phases, hop), hop)
        accelerated: Spectra = consistent + GRIFFIN_LIM_MOMENTUM * (consistent - previous)
        previous = consistent
        phases = accelerated / np.maximum(np.abs(accelerated), _TINY)
    return _overlap_add(magnitudes * phases, hop)


def short_spectra(waveform: Floats, hop: int) -> Spectra:
    """Spectra of a waveform as `griffin_lim` has them, `(samples / hop + 1, 2 * hop + 1)`."""
    frames = sliding_window_view(np.pad(waveform, 2 * hop), 4 * hop)[::hop]
    return np.fft.rfft(frames * _hann(4 * hop))


def _overlap_add(spectra: Spectra, hop: int) -> Floats:
    """The waveform whose `short_spectra` are nearest to the given ones."""
    window = _hann(4 * hop)
    parts = (np.fft.irfft(spectra) * window).reshape(len(spectra), 4, hop)
    sums = np.zeros((len(spectra) + 3, hop))
    weights = np.zeros_like(sums)
    for quarter in range(4):
        rows = slice(quarter, quarter + len(spectra))
        sums[rows] += parts[:, quarter]
        weights[rows] += window.reshape(4, hop)[quarter] ** 2
    # The outer half windows are padding.
    return (sums[2:-2] / weights[2:-2]).reshape(-1)
