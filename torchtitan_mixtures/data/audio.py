"""Sound in WAV files: reading, writing and resampling, with numpy and the standard library."""

import math
import wave
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_REMEDY = (
    "expected an uncompressed WAV file of 8, 16, 24 or 32 bit integers; "
    "`ffmpeg -i FILE -c:a pcm_s16le OUT.wav` makes one"
)


def read_wav(path: Path | str, sample_rate: int) -> NDArray[np.float32]:
    """Read a WAV file as one channel.

    Args:
        path: Integer PCM of 8, 16, 24 or 32 bits; the mean of the channels is taken.
        sample_rate: Samples per second wanted; a file of another rate is resampled.

    Returns:
        `(samples,)` float32 in [-1, 1]. Resampling may overshoot that a little.

    Raises:
        ValueError: The file is missing, cut off or not such a WAV file; names it and a remedy.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate, count, *_ = file.getparams()
            content = file.readframes(count)
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from error
    except (EOFError, wave.Error) as error:
        raise ValueError(f"cannot read {path} ({str(error) or 'no header'}); {_REMEDY}") from error
    if not count:
        raise ValueError(f"{path} holds no sound: its header promises 0 samples")
    if width > 4 or rate < 1:
        raise ValueError(f"{path} has {8 * width} bits and {rate} samples a second; {_REMEDY}")
    if len(content) != count * channels * width:
        raise ValueError(
            f"{path} is cut off: {len(content)} bytes of sound, its header promises "
            f"{count * channels * width}; copy it again"
        )
    samples = _integers(content, width).reshape(count, channels).mean(axis=1)
    return resample((samples / 2.0**31).astype(np.float32), rate, sample_rate)


def _integers(content: bytes, width: int) -> NDArray[np.int32]:
    """Samples of any width as 32 bit integers of the same loudness."""
    octets = np.frombuffer(content, np.uint8).reshape(-1, width)
    wide = np.zeros((len(octets), 4), np.uint8)
    wide[:, 4 - width :] = octets  # little endian: the most significant octet is the last
    if width == 1:
        wide[:, 3] ^= 0x80  # 8 bit samples are the only unsigned ones
    return wide.view("<i4")[:, 0]


def write_wav(
    file: Path | str | BinaryIO, waveform: NDArray[np.floating], sample_rate: int
) -> None:
    """Write one channel as a WAV file of 16 bits.

    Args:
        file: Its path, replaced if it exists, or what bytes are written to.
        waveform: `(samples,)` floating, finite; what exceeds [-1, 1] is clipped.
        sample_rate: Samples per second.

    Raises:
        ValueError: `waveform` is not such an array.
    """
    check_waveform(waveform)
    samples = np.rint(np.clip(waveform, -1, 1) * 32767).astype("<i2")
    with wave.open(str(file) if isinstance(file, Path) else file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(sample_rate)
        writer.writeframes(samples.tobytes())


def check_waveform(waveform: NDArray[np.floating]) -> None:
    """Check that an array is a waveform.

    Raises:
        ValueError: It is not `(samples,)`, not floating, or not finite.
    """
    if waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
        raise ValueError(
            f"a waveform of shape {waveform.shape} and dtype {waveform.dtype}; expected (samples,) "
            "floating, in [-1, 1]"
        )
    if not np.isfinite(waveform).all():
        raise ValueError("a waveform with samples that are not finite; expected [-1, 1]")


def resample(waveform: NDArray[np.floating], old_rate: int, new_rate: int) -> NDArray[np.float32]:
    """Change the sample rate by cutting or extending the spectrum of the whole waveform.

    Args:
        waveform: `(samples,)` floating.
        old_rate: Samples per second it has.
        new_rate: Samples per second it gets.

    Returns:
        `(ceil(samples * new_rate / old_rate),)` float32.
    """
    if old_rate == new_rate or not len(waveform):
        return waveform.astype(np.float32)
    divisor = math.gcd(old_rate, new_rate)
    old_step, new_step = old_rate // divisor, new_rate // divisor
    # Whole steps, for an exact ratio; a tenth of a second of silence, as the ends are neighbours.
    num_steps = -(-(len(waveform) + old_rate // 10) // old_step)
    spectrum = np.fft.rfft(waveform.astype(np.float64), num_steps * old_step)
    num_bins = min(len(spectrum), num_steps * new_step // 2 + 1)
    resampled = np.fft.irfft(spectrum[:num_bins], num_steps * new_step) * (new_step / old_step)
    return resampled[: -(-len(waveform) * new_step // old_step)].astype(np.float32)
