"""Sound files and resampling, against the standard library and sines of known phase."""

import io
import struct
import sys
import tracemalloc
import wave
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from torchtitan_mixtures.data import audio
from torchtitan_mixtures.data.audio import read_sound, read_wav, resample, write_wav

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


def test_a_long_waveform_is_resampled_in_pieces_that_fit(monkeypatch):
    rng = np.random.default_rng(0)
    spectrum = np.zeros(22_050 * 6 + 1, complex)  # 12 seconds
    low = slice(12 * 50, 12 * 3_500)  # what both rates hold
    spectrum[low] = np.exp(2j * np.pi * rng.random(low.stop - low.start))
    waveform = np.fft.irfft(spectrum) * np.hanning(12 * 22_050)  # a sudden end would ring
    waveform = (waveform / np.abs(waveform).max()).astype(np.float32)[:-7]
    whole = resample(waveform, 22_050, 8_000)
    monkeypatch.setattr(audio, "_RESAMPLED", 3 * 22_050)
    pieces = resample(waveform, 22_050, 8_000)
    assert pieces.shape == whole.shape == (-(-len(waveform) * 8_000 // 22_050),)
    assert np.abs(pieces - whole).max() < 1e-5
    for samples in (3 * 22_050, 3 * 22_050 + 1, 4 * 22_050 + 1, 9 * 22_050):
        assert len(resample(waveform[:samples], 22_050, 8_000)) == -(-samples * 8_000 // 22_050)


def test_resampling_a_long_file_takes_little_memory_beyond_its_result(monkeypatch):
    monkeypatch.setattr(audio, "_RESAMPLED", 2**18)
    waveform = np.zeros(8_000 * 300, np.float32)
    tracemalloc.start()
    resampled = resample(waveform, 8_000, 16_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.7 * resampled.nbytes


def test_reading_takes_a_few_times_the_file(tmp_path: Path):
    path = tmp_path / "a.wav"
    write_wav(path, np.zeros(10_000_000, np.float32), RATE)
    tracemalloc.start()
    read_wav(path, RATE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * path.stat().st_size


# --- all kinds of WAV files -----------------------------------------------------------------------

GUID_END = bytes.fromhex("000000001000800000aa00389b71")


def riff(
    sound: bytes, kind=1, channels=1, rate=RATE, bits=16, frame=None, extra=b"", size=None
) -> bytes:
    """A WAV file, whatever its header says; a chunk of odd length comes before the sound."""
    frame = channels * -(-bits // 8) if frame is None else frame
    header = struct.pack("<HHIIHH", kind, channels, rate, rate * frame % 2**32, frame, bits) + extra
    chunks = b"fmt " + struct.pack("<I", len(header)) + header
    chunks += b"LIST" + struct.pack("<I", 3) + b"abc\0"
    chunks += b"data" + struct.pack("<I", len(sound) if size is None else size) + sound
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def extensible(kind: int, bits: int) -> bytes:
    return struct.pack("<HHIH", 22, bits, 0, kind) + GUID_END


@pytest.mark.parametrize(("kind", "bits"), [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
@pytest.mark.parametrize("is_extensible", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_samples_is_read(kind, bits, is_extensible, channels):
    values = [-0.5, 0.25, 0.0, 0.5, -0.25, 0.125]
    if kind == 3:
        sound = struct.pack("<6" + {32: "f", 64: "d"}[bits], *values)
    else:
        full = 2 ** (bits - 1)
        integers = [int(value * full) + (128 if bits == 8 else 0) for value in values]
        sound = b"".join(n.to_bytes(bits // 8, "little", signed=bits > 8) for n in integers)
    extra = extensible(kind, bits) if is_extensible else b""
    content = riff(sound, 0xFFFE if is_extensible else kind, channels, bits=bits, extra=extra)
    waveform = read_sound(content, RATE, "a")
    expected = [sum(values[n : n + channels]) / channels for n in range(0, 6, channels)]
    assert waveform.dtype == np.float32
    np.testing.assert_allclose(waveform, expected, atol=1e-7)


def test_samples_of_12_bits_lie_in_two_bytes():
    assert read_sound(riff(struct.pack("<h", 2**14), bits=12), RATE, "a").tolist() == [0.5]


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000, 96_000])
def test_every_rate_is_brought_to_the_one_that_is_wanted(rate: int):
    sound = (sine(440, rate, 0.5) * 2**15).astype("<i2").tobytes()
    waveform = read_sound(riff(sound, rate=rate), RATE, "a")
    inner = slice(RATE // 10, -RATE // 10)
    assert len(waveform) == -(-(len(sound) // 2) * RATE // rate)
    ideal = sine(440, RATE, 0.51)[: len(waveform)]
    assert np.abs(waveform - ideal)[inner].max() < 2e-3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (riff(bytes(8), rate=0), "0 samples a second"),
        (riff(bytes(8), rate=4_000_000_000), "4000000000 samples a second"),
        (riff(bytes(8), channels=0, frame=0), "0 channels"),
        (riff(bytes(8), frame=7), "in 7 bytes"),
        (riff(bytes(8), bits=0), "format 0x1 of 0 bits"),
        (riff(bytes(8), bits=40), "format 0x1 of 40 bits"),
        (riff(bytes(8), kind=3, bits=16), "format 0x3 of 16 bits"),
        (riff(bytes(8), kind=7, bits=8), "format 0x7 of 8 bits"),
        (riff(bytes(8), kind=0xFFFE), "format 0xfffe of 16 bits"),
        (riff(bytes(8), kind=0xFFFE, extra=extensible(7, 8)[:-1] + b"?"), "format 0xfffe"),
        (riff(b""), "holds no sound"),
        (riff(bytes(8), size=4_000_000_000), "cut off: 8 bytes of sound, its header promises 40"),
        (riff(bytes(8))[:36], "no sound after its format"),
        (riff(bytes(8))[:30], r"no header"),
        (riff(struct.pack("<2f", 0, np.nan), kind=3, bits=32), "not finite"),
        (riff(struct.pack("<2f", 0, -np.inf), kind=3, bits=32), "not finite"),
        (riff(struct.pack("<d", 1e300), kind=3, bits=64), "not finite"),
    ],
)
def test_broken_sounds_are_named_with_what_is_wrong(content: bytes, message: str):
    with pytest.raises(ValueError, match=f"song.*{message}"):
        read_sound(content, RATE, "song")


LARGEST = 2**32 - 1


@pytest.mark.parametrize(
    ("size", "whole"),
    [
        (LARGEST, LARGEST),  # ffmpeg
        (LARGEST - 44, LARGEST - 8),
        (0x7FFFF000, 0x7FFFF024),  # sox
        (0x7FFFEFFC, 0x7FFFF020),  # the same, in frames of 6 bytes
        (2**31 - 1, LARGEST),
        (0, 0),
        (0, LARGEST),
        (0, None),
    ],
)
def test_sound_from_a_pipe_reaches_to_the_end_of_the_file(size: int, whole: int | None):
    content = bytearray(riff(struct.pack("<3h", 2**14, 0, -(2**14)), size=size))
    whole = len(content) - 6 - 8 if whole is None else whole  # as it was before the sound
    content[4:8] = struct.pack("<I", whole)
    assert read_sound(bytes(content), RATE, "a").tolist() == [0.5, 0, -0.5]
    assert len(read_sound(bytes(content[:-1]), RATE, "a")) == 2
    with pytest.raises(ValueError, match="a holds no sound"):
        read_sound(bytes(content[:-6]), RATE, "a")


@pytest.mark.parametrize("size", [1000, 2**30, 0x7FFE0000, 2**31 + 2, 3 * 2**30])
def test_a_size_that_may_be_meant_is_a_promise(size: int):
    with pytest.raises(ValueError, match=f"a is cut off: 8 bytes of sound, .* promises {size}"):
        read_sound(riff(bytes(8), size=size), RATE, "a")


def test_what_follows_an_empty_sound_is_none():
    content = riff(b"LIST" + struct.pack("<I", 4) + b"abcd", size=0)
    with pytest.raises(ValueError, match="a holds no sound: its header promises 0"):
        read_sound(content, RATE, "a")


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_no_damage_of_a_file_raises_anything_else(data):
    content = bytearray(riff(bytes(range(64)), kind=3, bits=32, channels=2))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        waveform = read_sound(content, RATE, "a")
    except ValueError as error:
        assert "a " in str(error)
    else:
        assert waveform.dtype == np.float32 and np.isfinite(waveform).all()


# --- compressed files -----------------------------------------------------------------------------

NEEDS_SOUNDFILE = 'needs soundfile: pip install "torchtitan_mixtures[audio]"'


@pytest.mark.parametrize(
    ("start", "kind"), [(b"fLaC", "FLAC"), (b"OggS", "Ogg"), (b"ID3", "MP3"), (b"\xff\xfb", "MP3")]
)
def test_the_extra_that_compressed_files_need_is_named(monkeypatch, start: bytes, kind: str):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ValueError, match=rf'a is {kind}.*install "torchtitan_mixtures\[audio\]"'):
        read_sound(start + bytes(60), RATE, "a")


def compress(kind: str, seconds: float = 0.5) -> bytes:
    soundfile = pytest.importorskip("soundfile", reason=NEEDS_SOUNDFILE)
    file = io.BytesIO()
    left = sine(440, 44_100, seconds)
    soundfile.write(file, np.stack([left, left / 2], axis=1), 44_100, format=kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3"])
def test_compressed_files_are_read(tmp_path: Path, kind: str):
    content = compress(kind)
    (tmp_path / "a").write_bytes(content)
    waveform = read_sound(tmp_path / "a", RATE, "a")
    assert (waveform == read_sound(content, RATE, "a")).all()
    inner = slice(RATE // 10, -RATE // 10)
    ideal = 0.75 * sine(440, RATE, 1.0)[: len(waveform)]
    assert len(waveform) >= RATE // 2
    if kind == "MP3":  # begins with silence that says how long it is in no header
        assert 0.9 < np.abs(waveform).max() / 0.375 < 1.1
    else:
        assert np.abs(waveform - ideal)[inner].max() < 0.02


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.5, 0.9])
def test_a_compressed_file_that_is_cut_off_is_refused(kind: str, kept: float):
    content = compress(kind, 2.0)
    with pytest.raises(ValueError, match=r"song( is cut off|.*copy it again)") as caught:
        read_sound(content[: int(kept * len(content))], RATE, "song")
    assert "object at" not in str(caught.value)


def test_an_ogg_is_cut_off_within_its_last_page_too():
    content = compress("OGG", 2.0)
    for end in (len(content) - 1, content.rindex(b"OggS") + 20, content.rindex(b"OggS") + 28):
        with pytest.raises(ValueError, match="song is cut off: its last page is not whole"):
            read_sound(content[:end], RATE, "song")


def test_what_is_no_compressed_file_is_refused():
    compress("FLAC")  # skips without soundfile
    for start in (b"fLaC", b"OggS", b"ID3"):
        with pytest.raises(ValueError, match=r"cannot read song \([^<>]+\); copy it again"):
            read_sound(start + bytes(60), RATE, "song")


def test_an_mp3_that_is_whole_is_read_whatever_its_header_says_of_its_length():
    content = compress("MP3", 2.0)
    at = max(content.find(b"Info"), content.find(b"Xing"))
    (count,) = struct.unpack_from(">I", content, at + 8)
    counts_itself = content[: at + 8] + struct.pack(">I", count + 1) + content[at + 12 :]
    assert len(read_sound(counts_itself, 44_100, "song")) >= 88_200
    tagged = b"ID3\3\0\0\0\0\2\0" + bytes(256) + content
    assert len(read_sound(tagged, 44_100, "song")) == 88_200
    with pytest.raises(ValueError, match=r"song is cut off: \d+ of 88200 samples"):
        read_sound(tagged[: len(tagged) // 2], 44_100, "song")


def test_an_mp3_without_a_count_of_its_frames_may_be_shorter_than_estimated():
    soundfile = pytest.importorskip("soundfile", reason=NEEDS_SOUNDFILE)
    loud = np.random.default_rng(0).normal(0, 0.3, 5 * RATE)
    file, options = io.BytesIO(), {"format": "MP3", "bitrate_mode": "VARIABLE"}
    soundfile.write(file, np.r_[np.zeros(5 * RATE), loud], RATE, **options, compression_level=0.5)
    content = file.getvalue()
    content = content[content.index(b"\xff\xf3", 4) :]  # without the frame of its header
    with soundfile.SoundFile(io.BytesIO(content)) as opened:
        assert opened.frames > 15 * RATE
    assert 10 * RATE <= len(read_sound(content, RATE, "song")) < 11 * RATE


def test_a_compressed_file_that_unpacks_to_hours_is_refused(monkeypatch):
    monkeypatch.setattr(audio, "MAX_SECONDS", 1)
    assert len(read_sound(compress("FLAC", 1.0), RATE, "song")) == RATE
    with pytest.raises(ValueError, match="song is longer than 1 seconds"):
        read_sound(compress("FLAC", 1.1), RATE, "song")


# --- files that cannot be read --------------------------------------------------------------------


def test_files_that_are_not_wav_are_named_with_the_remedy(tmp_path: Path):
    path = tmp_path / "a.wav"
    for content in (b"", b"hello", b"RIFF\x04\x00\x00\x00WAVE", b"<html>not a sound at all"):
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
