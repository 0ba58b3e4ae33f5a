"""WAV files and resampling, against the standard library and sines of known phase."""

import struct
import wave
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from torchtitan_mixtures.data.audio import read_wav, resample, write_wav

RATE = 16_000


def sine(hertz: float, rate: int, seconds: float) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype("f4")


def write_pcm(path: Path, samples: list[tuple[int, ...]], width: int, rate: int = RATE) -> Path:
    """Write integer samples, a tuple of channels each, one by one."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(samples[0]))
        file.setsampwidth(width)
        file.setframerate(rate)
        for frame in samples:
            for value in frame:
                file.writeframesraw(value.to_bytes(width, "little", signed=width > 1))
    return path


@pytest.mark.parametrize(
    ("width", "values", "expected"),
    [
        (1, [0, 64, 128, 255], [-1, -0.5, 0, 127 / 128]),
        (2, [-(2**15), -1, 0, 2**15 - 1], [-1, -(2.0**-15), 0, 1 - 2.0**-15]),
        (3, [-(2**23), 1, 2**22, 2**23 - 1], [-1, 2.0**-23, 0.5, 1 - 2.0**-23]),
        (4, [-(2**31), 2**30, 0, -(2**30)], [-1, 0.5, 0, -0.5]),
    ],
)
def test_every_width_is_read_at_full_scale(tmp_path: Path, width, values, expected):
    path = write_pcm(tmp_path / "a.wav", [(value,) for value in values], width)
    waveform = read_wav(path, RATE)
    assert waveform.dtype == np.float32
    assert waveform.tolist() == expected


def test_channels_are_averaged(tmp_path: Path):
    path = write_pcm(tmp_path / "a.wav", [(2**14, 0), (-(2**14), 2**13)], 2)
    assert read_wav(path, RATE).tolist() == [0.25, -0.125]


def test_a_waveform_survives_16_bits_and_what_is_too_loud_is_clipped(tmp_path: Path):
    waveform = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
    write_wav(tmp_path / "a.wav", waveform, RATE)
    assert np.abs(read_wav(tmp_path / "a.wav", RATE) - waveform).max() < 1.01 / 2**15 * 2
    write_wav(tmp_path / "a.wav", np.array([3.0, -3.0]), RATE)
    np.testing.assert_allclose(read_wav(tmp_path / "a.wav", RATE), [1, -1], atol=1e-4)


@pytest.mark.parametrize(("old", "new"), [(22_050, RATE), (8_000, RATE), (44_100, 16_000)])
def test_a_sine_keeps_pitch_loudness_and_phase(tmp_path: Path, old: int, new: int):
    write_wav(tmp_path / "a.wav", sine(440, old, 0.5), old)
    waveform = read_wav(tmp_path / "a.wav", new)
    assert len(waveform) == new // 2
    inner = slice(new // 10, -new // 10)  # the ends of a cut-off sine ring
    assert np.abs(waveform - sine(440, new, 0.5))[inner].max() < 2e-3


def test_what_the_new_rate_cannot_hold_vanishes():
    high = resample(sine(7_000, 32_000, 0.5), 32_000, 8_000)
    assert np.abs(high[800:-800]).max() < 2e-3
    assert resample(np.zeros(0), 8_000, RATE).shape == (0,)


def test_files_that_are_not_wav_are_named_with_the_remedy(tmp_path: Path):
    path = tmp_path / "a.wav"
    floats = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 44, b"WAVE", b"fmt ", 16, 3, 1, RATE,
                         4 * RATE, 4, 32, b"data", 8) + bytes(8)  # fmt: skip
    for content in (b"", b"hello", b"RIFF\x04\x00\x00\x00WAVE", floats):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.wav.*8, 16, 24 or 32 bit integers.*ffmpeg"):
            read_wav(path, RATE)
    with pytest.raises(ValueError, match=r"nowhere\.wav.*No such file"):
        read_wav(tmp_path / "nowhere.wav", RATE)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path):
    path = write_pcm(tmp_path / "a.wav", [(1,)] * 100, 2)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"a\.wav is cut off: 150 bytes .* promises 200"):
        read_wav(path, RATE)


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (np.zeros((2, 3)), r"shape \(2, 3\)"),
        (np.zeros(3, np.int16), "dtype int16"),
        (np.array([0.0, np.nan]), "not finite"),
    ],
)
def test_what_is_no_waveform_is_refused(tmp_path: Path, waveform, message):
    with pytest.raises(ValueError, match=message):
        write_wav(tmp_path / "a.wav", waveform, RATE)


def test_files_without_sound_are_named_with_a_reason(tmp_path: Path):
    (tmp_path / "empty.wav").touch()
    write_wav(tmp_path / "silent.wav", np.zeros(0, np.float32), 16_000)
    for name, reason in (
        ("empty.wav", r"empty.wav \(no header\); expected an uncompressed"),
        ("silent.wav", "silent.wav holds no sound"),
        ("missing.wav", r"missing.wav \(No such file or directory\)$"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_wav(tmp_path / name, 16_000)
