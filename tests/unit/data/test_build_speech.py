"""The build of the spoken names, with tones in place of the synthesiser."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from torchtitan_mixtures.data.audio import resample
from torchtitan_mixtures.data.corpora import build_speech as builder
from torchtitan_mixtures.data.corpora.build_speech import SAMPLE_RATE, build_speech, trim_silence
from torchtitan_mixtures.data.corpora.espeak import Recording, speak_in_voices
from torchtitan_mixtures.data.emoji import EmojiCorpus, check_files
from torchtitan_mixtures.data.speech import LogMelCodebook
from torchtitan_mixtures.data.spoken import SPEECH_FILE, VOICES, SpokenNames

RATE = 22_050


@pytest.fixture
def few_names(monkeypatch: pytest.MonkeyPatch) -> EmojiCorpus:
    """Forty concepts, and a codebook small enough for them."""
    monkeypatch.setattr(builder, "NUM_CODES", 16)
    concepts = EmojiCorpus.load().concepts[::40]
    assert {concept.split for concept in concepts} == {"train", "unseen_concept"}
    return EmojiCorpus([*concepts], {})


def tone(text: str, voice: str, loudness: float = 1.0) -> Recording:
    """A chord with silence around it, different for every text and voice."""
    time = np.arange(RATE // 8 + 50 * len(text)) / RATE
    chord = np.sin(2 * np.pi * (200 + 30 * len(text)) * time)
    chord += np.sin(2 * np.pi * (500 + 400 * VOICES.index(voice)) * time)
    return np.pad(np.rint(8000 * loudness * chord).astype(np.int16), RATE // 10)


def build(folder: Path, corpus: EmojiCorpus, monkeypatch: pytest.MonkeyPatch, **changed) -> Path:
    def speak(texts: Sequence[str], voices: Sequence[str]) -> Iterator[tuple[int, list[Recording]]]:
        for voice in voices:
            yield (
                RATE,
                [
                    tone(
                        text, voice, changed.get("loudness", 1) if changed.get("of") == voice else 1
                    )
                    for text in texts
                ],
            )

    monkeypatch.setattr(builder, "speak_in_voices", speak)
    folder.mkdir()
    build_speech(folder, corpus)
    return folder


def test_files_hold_the_units_of_each_name_and_voice(tmp_path, few_names, monkeypatch):
    folder = build(tmp_path / "a", few_names, monkeypatch)
    check_files(folder)
    tokenizer = LogMelCodebook(folder / "codebook_speech.safetensors")
    assert tokenizer.num_codes == 16 and not tokenizer.centres[0].any()
    spoken = SpokenNames.read(folder / SPEECH_FILE)
    assert spoken.lengths.shape == (len(few_names.concepts), len(VOICES))
    for number, concept in list(enumerate(few_names.concepts))[::7]:
        for voice in range(len(VOICES)):
            recording = tone(concept.name, VOICES[voice]) / np.float32(2**15)
            waveform = trim_silence(resample(recording, RATE, SAMPLE_RATE))
            expected = tokenizer.encode(waveform)
            np.testing.assert_array_equal(spoken.find(number, voice), expected)
    entry = json.loads((folder / "manifest.json").read_text())["speech"]
    assert entry["units"] == len(spoken.units) == spoken.lengths.sum()
    assert VOICES[-1] in (folder / "README.md").read_text()


def test_the_build_repeats_and_its_codebook_hears_train_voices_only(
    tmp_path, few_names, monkeypatch
):
    first = build(tmp_path / "a", few_names, monkeypatch)
    again = build(tmp_path / "b", few_names, monkeypatch)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    codebook = "codebook_speech.safetensors"
    for voice, is_trained in ((VOICES[-1], False), (VOICES[0], True)):
        other = build(tmp_path / voice, few_names, monkeypatch, of=voice, loudness=0.3)
        differs = (other / codebook).read_bytes() != (first / codebook).read_bytes()
        assert differs == is_trained
        assert (other / SPEECH_FILE).read_bytes() != (first / SPEECH_FILE).read_bytes()


def test_silence_is_trimmed_to_blocks_of_ten_milliseconds():
    waveform = np.zeros(16_000, np.float32)
    waveform[5_000:9_000] = 0.5
    waveform[4_000] = 0.001  # softer than 0.3 % of the loudest
    trimmed = trim_silence(waveform)
    assert len(trimmed) % 160 == 0 and np.abs(trimmed).sum() == 0.5 * 4_000
    assert 160 <= np.argmax(trimmed) < 320
    assert 160 <= np.argmax(trimmed[::-1]) < 320


def test_a_missing_synthesiser_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ValueError, match=r"found None: pip install espeakng-loader==0\.2\.4"):
        next(speak_in_voices(["a"], VOICES))
