"""Adds speech to an emoji corpus: the name of every concept in several voices, as units.

Run through `python scripts/prepare_data.py speech`; needs `espeakng-loader`. The same version on
the same platform gives byte-identical files.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from torchtitan_mixtures.data.audio import resample
from torchtitan_mixtures.data.codebooks import nearest_centres
from torchtitan_mixtures.data.corpora.emoji_folder import describe_folder
from torchtitan_mixtures.data.corpora.espeak import Recording, speak_in_voices
from torchtitan_mixtures.data.emoji import EmojiCorpus
from torchtitan_mixtures.data.kmeans import kmeans
from torchtitan_mixtures.data.speech import SPEECH_TOKENIZERS, split_stretches
from torchtitan_mixtures.data.spoken import SPEECH_FILE, VOICES, SpokenNames, voices_of

SEED = 20
SAMPLE_RATE = 16_000
FRAMES_PER_UNIT = 2  # of 20 ms each: 25 units a second
NUM_BANDS = 40
NUM_CODES = 512
SILENCE = 0.003  # of the loudest sample: what is nowhere louder in a block is cut off at the ends
BLOCK = SAMPLE_RATE // 100


def build_speech(folder: Path, corpus: EmojiCorpus) -> None:
    """Speak the names of a corpus, and describe the folder with them.

    Args:
        folder: Folder of the corpus; files of an earlier build are replaced.
        corpus: What is in it.

    Raises:
        ValueError: espeak-ng is not installed in the pinned version.
    """
    names = [concept.name for concept in corpus.concepts]
    stretches = [
        [stretch_of(recording, rate) for recording in recordings]
        for rate, recordings in speak_in_voices(names, VOICES)
    ]  # [voice][concept]
    centres = build_codebook(
        [
            stretches[VOICES.index(voice)][index]
            for voice in voices_of("train")
            for index, concept in enumerate(corpus.concepts)
            if concept.split == "train"
        ]
    )
    units = [
        [nearest_centres(stretches[voice][concept], centres) for voice in range(len(VOICES))]
        for concept in range(len(names))
    ]
    spoken = SpokenNames(
        np.concatenate([spoken for voices in units for spoken in voices]).astype(np.uint16),
        np.array([[len(spoken) for spoken in voices] for voices in units], np.uint16),
    )
    spoken.write(folder / SPEECH_FILE)
    tensors = {
        "centres": centres.reshape(NUM_CODES, FRAMES_PER_UNIT, NUM_BANDS),
        "sample_rate": np.array([SAMPLE_RATE], np.int64),
    }
    (folder / SPEECH_TOKENIZERS["emoji_25hz"].name).write_bytes(save(tensors))
    describe_folder(folder, corpus, spoken)


def stretch_of(recording: Recording, rate: int) -> NDArray[np.uint8]:
    """The `(units, frames * bands)` levels of a recording without the silence around it."""
    waveform = resample(recording / np.float32(2**15), rate, SAMPLE_RATE)
    return split_stretches(trim_silence(waveform), SAMPLE_RATE, FRAMES_PER_UNIT, NUM_BANDS)


def trim_silence(waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut off the silent blocks at both ends; one block on either side stays."""
    loudness = np.abs(waveform)
    padded = np.pad(loudness, (0, -len(loudness) % BLOCK)).reshape(-1, BLOCK).max(axis=1)
    (loud,) = np.nonzero(padded > SILENCE * loudness.max())
    return waveform[max(0, loud[0] - 1) * BLOCK : (loud[-1] + 2) * BLOCK]


def build_codebook(stretches: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Centres of the stretches, `(512, frames * bands)` uint8; code 0 is silence."""
    unique, counts = np.unique(np.concatenate(stretches), axis=0, return_counts=True)
    silence = np.zeros(unique.shape[1], np.uint8)
    return kmeans(unique, counts, silence, NUM_CODES, iterations=25, seed=SEED)
