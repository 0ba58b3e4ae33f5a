"""The speech tokenizer against naive loops, and the spoken names of the embedded corpus."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from torchtitan_mixtures.data.emoji import EMBEDDED_FOLDER, SPLITS, EmojiCorpus
from torchtitan_mixtures.data.speech import (
    SPEECH_TOKENIZERS,
    LogMelCodebook,
    build_speech_tokenizer,
    griffin_lim,
    log_mel_levels,
    short_spectra,
)
from torchtitan_mixtures.data.spoken import UNSEEN_VOICE, VOICES, voices_of

RATE, STEP, BANDS = 16_000, 320, 40


@pytest.fixture(scope="module")
def corpus() -> EmojiCorpus:
    return EmojiCorpus.load()


@pytest.fixture(scope="module")
def tokenizer() -> LogMelCodebook:
    return build_speech_tokenizer("emoji_25hz")


def sample_units(corpus: EmojiCorpus, count: int) -> list[NDArray[np.int64]]:
    rng = random.Random(3)
    return [corpus.spoken(rng.choice(corpus.concepts), rng.choice(VOICES)) for _ in range(count)]


# --- the tokenizer --------------------------------------------------------------------------------


def naive_levels(waveform: list[float]) -> list[list[int]]:
    """Levels of each frame by sums over samples, bins and bands."""
    mel = [2595 * math.log10(1 + RATE / 2 / 700) * i / (BANDS + 1) for i in range(BANDS + 2)]
    corners = [700 * (10 ** (m / 2595) - 1) for m in mel]
    window = [math.sin(math.pi * n / (2 * STEP)) ** 2 for n in range(2 * STEP)]
    silence = [0.0] * (STEP // 2)
    padded = [*silence, *waveform, *silence]
    turns = np.exp(-2j * np.pi * np.arange(2 * STEP) / (2 * STEP))
    levels = []
    for start in range(0, len(waveform), STEP):
        frame = [padded[start + n] * window[n] for n in range(2 * STEP)]
        bands = [0.0] * BANDS
        for k in range(STEP + 1):
            hertz = k * RATE / (2 * STEP)
            power = abs(sum(frame[n] * turns[n * k % (2 * STEP)] for n in range(2 * STEP))) ** 2
            for band in range(BANDS):
                low, middle, high = corners[band : band + 3]
                if low < hertz <= middle:
                    bands[band] += power * (hertz - low) / (middle - low)
                elif middle < hertz < high:
                    bands[band] += power * (high - hertz) / (high - middle)
        decibels = [10 * math.log10(max(band / (sum(window) / 2) ** 2, 1e-12)) for band in bands]
        levels.append([round(min(max((db + 90) / 90, 0), 1) * 255) for db in decibels])
    return levels


def test_units_are_the_nearest_centres_of_naive_spectra(tokenizer: LogMelCodebook):
    rng = np.random.default_rng(0)
    tone = 0.3 * np.sin(2 * np.pi * 300 * np.arange(1500) / RATE)
    waveform = (tone + rng.normal(0, 0.02, 1500)).astype(np.float32)
    levels = naive_levels([*map(float, waveform), *[0.0] * (-1500 % (2 * STEP))])
    padded = np.pad(waveform.astype(np.float64), (0, -1500 % (2 * STEP)))
    assert log_mel_levels(padded, RATE, BANDS).tolist() == levels
    expected = []
    for unit in range(len(levels) // 2):
        stretch = [*levels[2 * unit], *levels[2 * unit + 1]]
        distances = [
            sum((a - b) ** 2 for a, b in zip(stretch, centre, strict=True))
            for centre in tokenizer.centres.tolist()
        ]
        expected.append(distances.index(min(distances)))
    units = tokenizer.encode(waveform)
    assert units.dtype == np.int64
    assert units.tolist() == expected == tokenizer.encode(waveform).tolist()


def test_a_full_scale_sine_has_the_level_of_0_decibels():
    sine = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    # A band sums the three bins of the Hann window's peak, weighted 1/4, 1, 1/4 at most.
    assert 250 <= log_mel_levels(sine, RATE, BANDS)[5:-5].max() <= 255


def test_shapes_and_silence(tokenizer: LogMelCodebook):
    assert (tokenizer.num_codes, tokenizer.sample_rate) == (512, RATE)
    assert tokenizer.units_per_second == 25
    for samples, units in ((0, 0), (1, 1), (640, 1), (641, 2)):
        assert tokenizer.encode(np.zeros(samples, np.float32)).tolist() == [0] * units
    decoded = tokenizer.decode(np.zeros(3, np.int64))
    assert decoded.shape == (3 * 640,) and decoded.dtype == np.float32
    assert np.abs(decoded).max() < 1e-3
    assert tokenizer.decode(np.zeros(0, np.int64)).shape == (0,)


def test_decoded_units_are_heard_as_nearly_the_same(corpus, tokenizer: LogMelCodebook):
    centres = tokenizer.centres.astype(float)
    differences, shuffled, are_equal = [], [], []
    rng = np.random.default_rng(0)
    for units in sample_units(corpus, 20):
        waveform = tokenizer.decode(units)
        assert len(waveform) == len(units) * 640 and np.abs(waveform).max() <= 1
        assert (waveform == tokenizer.decode(units)).all()
        heard = tokenizer.encode(waveform)
        assert len(heard) == len(units)
        differences.append(np.abs(centres[heard] - centres[units]).mean())
        shuffled.append(np.abs(centres[rng.permutation(units)] - centres[units]).mean())
        are_equal += (heard == units).tolist()
    # Measured: 0.3 of 255 levels (0.1 dB) on average, 2.0 at worst, 98 % equal; 44 shuffled.
    assert np.mean(differences) < 1 and max(differences) < 4
    assert np.mean(are_equal) > 0.9
    assert np.mean(shuffled) > 20


def test_griffin_lim_comes_near_the_magnitudes(corpus, tokenizer: LogMelCodebook):
    hop = 160
    for units in sample_units(corpus, 5):
        # Magnitudes of a real signal can be reached, so what is left is Griffin-Lim's own error.
        wanted = np.abs(short_spectra(tokenizer.decode(units).astype(np.float64), hop))

        def error(waveform: NDArray[np.float64], wanted: NDArray = wanted) -> float:
            found = np.abs(short_spectra(waveform, hop))
            return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

        noise = np.random.default_rng(1).normal(0, 1, (len(wanted) - 1) * hop)
        noise *= np.linalg.norm(wanted) / np.linalg.norm(np.abs(short_spectra(noise, hop)))
        assert error(griffin_lim(wanted, hop)) < 0.2 < 0.8 < error(noise)


def test_units_and_waveforms_that_do_not_fit_are_refused(tokenizer: LogMelCodebook):
    for units, message in (
        (np.array([0, 512]), r"span \[0, 512\].*codes 0 to 511"),
        (np.array([-1]), r"span \[-1, -1\]"),
        (np.zeros((1, 2), np.int64), r"shape \(1, 2\)"),
        (np.array([0.5]), "dtype float64"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.decode(units)
    with pytest.raises(ValueError, match="dtype int16"):
        tokenizer.encode(np.zeros(5, np.int16))


@pytest.mark.parametrize(
    "tensors",
    [
        {"centres": np.zeros((4, 2, 40), np.uint8)},
        {"centres": np.zeros((4, 80), np.uint8), "sample_rate": np.array([RATE])},
        {"centres": np.zeros((4, 2, 40), np.int8), "sample_rate": np.array([RATE])},
        {"centres": np.zeros((0, 2, 40), np.uint8), "sample_rate": np.array([RATE])},
        {"centres": np.zeros((4, 2, 40), np.uint8), "sample_rate": np.array([16_050])},
    ],
)
def test_a_wrong_codebook_file_is_named_with_what_is_expected(tmp_path: Path, tensors: dict):
    path = tmp_path / "codebook.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"codebook\.safetensors.*expected a speech codebook"):
        build_speech_tokenizer(str(path))


def test_a_codebook_file_of_another_shape_serves(tmp_path: Path):
    path = tmp_path / "codebook.safetensors"
    centres = np.arange(3 * 4 * 20, dtype=np.uint8).reshape(3, 4, 20)
    save_file({"centres": centres, "sample_rate": np.array([8_000])}, path)
    tokenizer = build_speech_tokenizer(str(path))
    assert (tokenizer.num_codes, tokenizer.units_per_second) == (3, 12.5)
    assert tokenizer.decode(np.array([2, 0])).shape == (2 * 640,)
    assert tokenizer.encode(np.zeros(1281, np.float32)).shape == (3,)


def test_unknown_names_and_broken_files_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"speech_tokenizer = 'mimi' is unknown; use emoji_25hz"):
        build_speech_tokenizer("mimi")
    (tmp_path / "a.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"cannot read .*a\.safetensors"):
        build_speech_tokenizer(str(tmp_path / "a.safetensors"))


# --- the corpus -----------------------------------------------------------------------------------


def test_every_concept_is_spoken_in_every_voice(corpus: EmojiCorpus):
    used = np.zeros(512, np.int64)
    for voice in VOICES:
        for concept in corpus.concepts:
            units = corpus.spoken(concept, voice)
            assert units.dtype == np.int64 and 5 <= len(units) <= corpus.longest_speech
            assert 0 <= units.min() <= units.max() < 512
            used += np.bincount(units, minlength=512)
    assert used.all()
    entry = json.loads((EMBEDDED_FOLDER / "manifest.json").read_text())["speech"]
    assert entry["voices"] == list(VOICES) and entry["units"] == used.sum()
    assert entry["withheld_voice"] == VOICES[-1]
    assert SPEECH_TOKENIZERS["emoji_25hz"].parent == EMBEDDED_FOLDER


def test_speech_is_small_and_says_where_it_comes_from():
    assert (EMBEDDED_FOLDER / "speech.safetensors").stat().st_size < 500_000
    for name in ("NOTICE", "README.md"):
        text = (EMBEDDED_FOLDER / name).read_text()
        assert "espeak-ng" in text and "not" in text.split("espeak-ng")[1]


def test_the_withheld_voice_speaks_in_no_other_split(corpus: EmojiCorpus):
    (withheld,) = voices_of(UNSEEN_VOICE)
    for split in SPLITS:
        assert withheld not in voices_of(split) and len(voices_of(split)) == 5
    assert corpus.drawings(UNSEEN_VOICE) == corpus.drawings("train")


def test_unknown_voices_and_missing_speech_are_named(corpus: EmojiCorpus):
    with pytest.raises(ValueError, match=r"voice = 'kal' is unknown; allowed: en-us"):
        corpus.spoken(corpus.concepts[0], "kal")
    silent = EmojiCorpus(corpus.concepts[:1], {})
    assert silent.longest_speech == 0
    with pytest.raises(ValueError, match=r"no speech\.safetensors.*prepare_data\.py speech"):
        silent.spoken(corpus.concepts[0], VOICES[0])


def warped_distance(distances: NDArray[np.float64]) -> float:
    """Cost of the best monotone path from corner to corner of a matrix."""
    rows, columns = distances.shape
    costs = np.full((rows + 1, columns + 1), np.inf)
    costs[0, 0] = 0
    for i in range(rows):
        for j in range(columns):
            costs[i + 1, j + 1] = distances[i, j] + min(
                costs[i, j], costs[i, j + 1], costs[i + 1, j]
            )
    return float(costs[-1, -1] / (rows + columns))


def test_words_are_recognised_in_the_unseen_voice(corpus: EmojiCorpus, tokenizer):
    centres = tokenizer.centres.astype(float)
    between = np.sqrt(((centres[:, None] - centres) ** 2).sum(-1))
    concepts = random.Random(0).sample(corpus.concepts, 20)
    hits = 0
    for number, concept in enumerate(concepts):
        heard = corpus.spoken(concept, VOICES[-1])
        distances = [
            warped_distance(between[np.ix_(heard, corpus.spoken(other, VOICES[0]))])
            for other in concepts
        ]
        hits += int(np.argmin(distances)) == number
    assert hits >= 16  # by chance 1; 59 of 60 measured among 40, over four pairs of voices
