"""Sound in files: reading, writing and resampling; WAV needs numpy and the standard library alone.

FLAC, Ogg and MP3 are read by `soundfile`, the extra "audio".
"""

from __future__ import annotations

import importlib
import io
import math
import struct
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

_REMEDY = (
    "expected an uncompressed WAV file of 8, 16, 24 or 32 bit integers, or 32 or 64 bit floats; "
    "`ffmpeg -i FILE -c:a pcm_s16le OUT.wav` makes one"
)

MIN_RATE, MAX_RATE = 1_000, 768_000
"""Samples per second that a file may have."""

MAX_SECONDS = 4 * 3600
"""Length of a compressed file. Little silence takes next to no bytes and much memory."""

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE  # formats of WAV files
_SUBFORMAT = bytes.fromhex("000000001000800000aa00389b71")  # end of the GUIDs of PCM and floats
_COMPRESSED = {b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "MP3"} | {
    bytes([0xFF, second]): "MP3" for second in (0xE2, 0xE3, 0xF2, 0xF3, 0xFA, 0xFB)
}  # by how they begin
# Sizes in a WAV file that was written to a pipe, when nobody knew its end: the largest there is,
# signed or not, less what comes before the sound or makes no whole frame. Some write 0 instead.
_OPEN_ENDED = (range(0x7FFF0000, 0x80000001), range(0xFFFF0000, 0x100000000))
_MP3_FRAME = 1152  # samples, at most
_BLOCK = 2**20  # frames that are converted at once
_RESAMPLED = 2**21  # samples that are resampled at once, about


@dataclass(frozen=True)
class _WavFormat:
    is_float: bool
    channels: int
    rate: int
    width: int  # bytes of a sample


def read_wav(path: Path | str, sample_rate: int) -> NDArray[np.float32]:
    """Read a sound file as one channel; see `read_sound`.

    Args:
        path: The file.
        sample_rate: Samples per second wanted.

    Returns:
        `(samples,)` float32.

    Raises:
        ValueError: See `read_sound`.
    """
    return read_sound(Path(path), sample_rate, str(path))


def read_sound(file: Path | bytes, sample_rate: int, name: str) -> NDArray[np.float32]:
    """Read a sound file as one channel, the mean of all.

    Args:
        file: Its path, or its content: WAV with integers of 8, 16, 24 or 32 bits or floats of 32
            or 64, in the old or the extensible format; FLAC, Ogg or MP3 if `soundfile` is there.
        sample_rate: Samples per second wanted; a file of another rate is resampled.
        name: What messages call it.

    Returns:
        `(samples,)` float32 in [-1, 1]. Resampling may overshoot that a little, and files of
        floats may as much as they like.

    Raises:
        ValueError: The file is missing, empty, cut off, of no such kind, of an absurd rate, or has
            samples that are not finite; names it and a remedy.
    """
    try:
        content = file if isinstance(file, bytes) else file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {name} ({error.strerror})") from error
    kind = next((kind for start, kind in _COMPRESSED.items() if content.startswith(start)), None)
    waveform, rate = _read_riff(content, name) if kind is None else _unpack(content, kind, name)
    if not np.isfinite(waveform).all():
        raise ValueError(f"{name} has samples that are not finite; repair it or leave it out")
    return resample(waveform, rate, sample_rate)


def _read_riff(content: bytes, name: str) -> tuple[NDArray[np.float32], int]:
    """The mean of the channels of a WAV file, and its rate."""
    if len(content) < 12:
        raise ValueError(f"cannot read {name} (no header); {_REMEDY}")
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise ValueError(f"cannot read {name} (it does not begin as a WAV file does); {_REMEDY}")
    (whole,) = struct.unpack_from("<I", content, 4)
    layout, position = None, 12
    while position + 8 <= len(content):
        chunk, size = struct.unpack_from("<4sI", content, position)
        position += 8
        if chunk == b"fmt ":
            layout = _read_format(content[position : position + size], name)
        elif chunk == b"data" and layout is not None:
            if _is_open_ended(size, whole, position, len(content)):
                size = len(content) - position
            sound = memoryview(content)[position : position + size]
            return _mean_of_channels(sound, size, layout, name), layout.rate
        position += size + size % 2
    raise ValueError(f"cannot read {name} (no sound after its format); {_REMEDY}")


def _is_open_ended(size: int, whole: int, position: int, end: int) -> bool:
    """Say whether sound reaches to the end of the file because its size was not known.

    Args:
        size: Of the sound, as its header has it.
        whole: Of all that follows the first 8 bytes, as the file has it.
        position: Where the sound begins.
        end: Bytes of the file.
    """
    if size == 0:  # an empty sound, too, if the file knows of what follows it
        return whole + 8 <= position or any(whole in sizes for sizes in _OPEN_ENDED)
    return position + size > end and any(size in sizes for sizes in _OPEN_ENDED)


def _read_format(chunk: bytes, name: str) -> _WavFormat:
    if len(chunk) < 16:
        raise ValueError(f"cannot read {name} (no header); {_REMEDY}")
    kind, channels, rate, _, frame, bits = struct.unpack_from("<HHIIHH", chunk)
    if kind == _EXTENSIBLE and chunk[26:40] == _SUBFORMAT:
        (kind,) = struct.unpack_from("<H", chunk, 24)
    width = -(-bits // 8)
    if width not in {_PCM: (1, 2, 3, 4), _FLOAT: (4, 8)}.get(kind, ()):
        raise ValueError(f"cannot read {name} (format {kind:#x} of {bits} bits); {_REMEDY}")
    if not channels or frame != channels * width:
        raise ValueError(
            f"cannot read {name} ({channels} channels of {bits} bits in {frame} bytes); {_REMEDY}"
        )
    _check_rate(rate, name)
    return _WavFormat(kind == _FLOAT, channels, rate, width)


def _check_rate(rate: int, name: str) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(
            f"{name} has {rate} samples a second; expected {MIN_RATE} to {MAX_RATE}. Repair its "
            "header or leave it out"
        )


def _mean_of_channels(
    sound: memoryview, promised: int, layout: _WavFormat, name: str
) -> NDArray[np.float32]:
    frame = layout.channels * layout.width
    count = promised // frame
    if not count:
        raise ValueError(f"{name} holds no sound: its header promises 0 samples")
    if len(sound) < count * frame:
        raise ValueError(
            f"{name} is cut off: {len(sound)} bytes of sound, its header promises "
            f"{count * frame}; copy it again"
        )
    mean = np.empty(count, np.float32)
    for start in range(0, count, _BLOCK):  # what is made of a block is larger than the file's
        stop = min(start + _BLOCK, count)
        block = sound[start * frame : stop * frame]
        if layout.is_float:
            samples, scale = np.frombuffer(block, f"<f{layout.width}"), 1.0
        else:
            samples, scale = _integers(block, layout.width), 2.0**31
        with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for what is infinite
            mean[start:stop] = (
                samples.reshape(-1, layout.channels).mean(axis=1, dtype=np.float64) / scale
            )
    return mean


def _integers(content: memoryview, width: int) -> NDArray[np.int32]:
    """Samples of any width as 32 bit integers of the same loudness."""
    octets = np.frombuffer(content, np.uint8).reshape(-1, width)
    wide = np.zeros((len(octets), 4), np.uint8)
    wide[:, 4 - width :] = octets  # little endian: the most significant octet is the last
    if width == 1:
        wide[:, 3] ^= 0x80  # 8 bit samples are the only unsigned ones
    return wide.view("<i4")[:, 0]


def _unpack(content: bytes, kind: str, name: str) -> tuple[NDArray[np.float32], int]:
    """The mean of the channels of a compressed file, and its rate."""
    try:
        soundfile = importlib.import_module("soundfile")
    except (ImportError, OSError) as error:  # the latter: it finds no libsndfile
        raise ValueError(
            f"{name} is {kind}, which needs soundfile ({error}): pip install "
            '"torchtitan_mixtures[audio]", or make it a WAV file'
        ) from None
    if kind == "Ogg" and not _ends_with_a_page(content):
        raise ValueError(f"{name} is cut off: its last page is not whole; copy it again")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            promised = file.frames
            if kind == "MP3":  # some encoders count the frame, too, that their header is in
                promised = promised - _MP3_FRAME if _counts_frames(content) else 0
            return _read_blocks(file, promised, name), file.samplerate
    except soundfile.SoundFileError as error:
        # Without its prefix, which names an object in memory.
        reason = getattr(error, "error_string", error)
        message = f"cannot read {name} ({reason}); copy it again, or leave it out"
        raise ValueError(message) from error


def _ends_with_a_page(content: bytes) -> bool:
    """Say whether the last page of an Ogg file is whole. No header says how long the file is."""
    start = content.rfind(b"OggS")
    if start + 27 > len(content):
        return False
    body = start + 27 + content[start + 26]  # after the sizes of its segments
    return body + sum(content[start + 27 : body]) <= len(content)


def _counts_frames(content: bytes) -> bool:
    """Say whether an MP3 file has a header with their number; else libsndfile estimates it."""
    start = 0
    if content.startswith(b"ID3"):  # its size, of 7 bits a byte, follows
        start = 10 + sum(octet << 7 * (3 - i) for i, octet in enumerate(content[6:10]))
    first = content[start : start + 64]
    mark = max(first.find(b"Xing"), first.find(b"Info"))
    return mark >= 0 and len(first) > mark + 7 and bool(first[mark + 7] & 1)


def _read_blocks(file: Any, promised: int, name: str) -> NDArray[np.float32]:
    _check_rate(file.samplerate, name)
    blocks, count = [], 0
    while True:
        block = file.read(_BLOCK, dtype="float32", always_2d=True)  # (frames, channels)
        count += len(block)
        if count > MAX_SECONDS * file.samplerate:
            raise ValueError(f"{name} is longer than {MAX_SECONDS} seconds; cut it in pieces")
        if not len(block):
            break
        blocks.append(block.mean(axis=1))
    if not count:
        raise ValueError(f"{name} holds no sound")
    if count < promised:
        raise ValueError(
            f"{name} is cut off: {count} of {file.frames} samples; copy it again, or leave it out"
        )
    return np.concatenate(blocks)


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
    """Change the sample rate by cutting or extending the spectrum.

    Of a long waveform that is done in pieces that overlap by a second on either side, where they
    fade out; the memory it takes beyond what is given and returned does not grow with it.

    Args:
        waveform: `(samples,)` floating.
        old_rate: Samples per second it has.
        new_rate: Samples per second it gets.

    Returns:
        `(ceil(samples * new_rate / old_rate),)` float32.
    """
    if old_rate == new_rate or not len(waveform):
        return waveform.astype(np.float32, copy=False)
    seconds = max(2, _RESAMPLED // max(old_rate, new_rate))  # whole: pieces begin at samples
    if len(waveform) <= seconds * old_rate:
        return _resample_piece(waveform.astype(np.float64), old_rate, new_rate)
    resampled = np.empty(-(-len(waveform) * new_rate // old_rate), np.float32)
    fade = 0.5 - 0.5 * np.cos(np.pi * np.arange(old_rate) / old_rate)  # from 0 to 1
    for second in range(0, -(-len(waveform) // old_rate), seconds):
        first = max(0, second - 1) * old_rate
        last = (second + seconds + 1) * old_rate
        piece = waveform[first:last].astype(np.float64)
        if first:
            piece[:old_rate] *= fade[: len(piece)]
        if last < len(waveform):
            piece[-old_rate:] *= fade[::-1]
        begin = new_rate if first else 0
        own = _resample_piece(piece, old_rate, new_rate)[begin : begin + seconds * new_rate]
        resampled[second * new_rate :][: len(own)] = own
    return resampled


def _resample_piece(
    waveform: NDArray[np.float64], old_rate: int, new_rate: int
) -> NDArray[np.float32]:
    divisor = math.gcd(old_rate, new_rate)
    old_step, new_step = old_rate // divisor, new_rate // divisor
    # Whole steps, for an exact ratio; a tenth of a second of silence, as the ends are neighbours.
    num_steps = -(-(len(waveform) + old_rate // 10) // old_step)
    spectrum = np.fft.rfft(waveform, num_steps * old_step)
    num_bins = min(len(spectrum), num_steps * new_step // 2 + 1)
    resampled = np.fft.irfft(spectrum[:num_bins], num_steps * new_step) * (new_step / old_step)
    return resampled[: -(-len(waveform) * new_step // old_step)].astype(np.float32)
