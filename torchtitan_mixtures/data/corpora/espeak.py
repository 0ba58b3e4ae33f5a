"""Texts spoken by espeak-ng, through the library in the wheel `espeakng-loader`.

A tool of the build alone, under GPL-3.0-or-later: it is not shipped, and training never imports it.
"""

import ctypes
import importlib
import importlib.metadata
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ESPEAK_PACKAGE = "espeakng-loader"
ESPEAK_VERSION = "0.2.4"

Recording = NDArray[np.int16]

# Constants of espeak-ng's speak_lib.h.
_SYNCHRONOUS, _BY_CHARACTER, _UTF8, _OK = 2, 1, 1, 0
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


def speak_in_voices(
    texts: Sequence[str], voices: Sequence[str]
) -> Iterator[tuple[int, list[Recording]]]:
    """Speak all texts in one voice after the other, in a process of its own.

    What espeak-ng says depends a little on what it said before: only a fresh process that speaks
    the same texts in the same order, with the same seed, says them in the same way.

    Args:
        texts: What to say.
        voices: Names of voices, such as "en-us+f2".

    Yields:
        For each voice the sample rate and a `(samples,)` int16 for each text.

    Raises:
        ValueError: The library is not installed, of another version, or has no such voice.
    """
    _find_library()
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=fresh) as process:
        for voice in voices:
            yield process.submit(_speak, texts, voice).result()


def _find_library() -> tuple[str, Path]:
    """The library and the folder that holds its data."""
    try:
        loader = importlib.import_module("espeakng_loader")
        found = importlib.metadata.version(ESPEAK_PACKAGE)
    except ImportError:
        loader, found = None, None
    if loader is None or found != ESPEAK_VERSION:
        raise ValueError(
            f"rebuilding the speech needs {ESPEAK_PACKAGE} {ESPEAK_VERSION}, found {found}: "
            f"pip install {ESPEAK_PACKAGE}=={ESPEAK_VERSION}"
        )
    return loader.get_library_path(), Path(loader.get_data_path()).parent


def _speak(texts: Sequence[str], voice: str) -> tuple[int, list[Recording]]:
    library_path, data_folder = _find_library()
    library = ctypes.CDLL(library_path)
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, str(data_folder).encode(), 0)
    if library.espeak_SetVoiceByName(voice.encode()) != _OK:
        raise ValueError(f"{ESPEAK_PACKAGE} {ESPEAK_VERSION} has no voice {voice!r}")
    parts: list[Recording] = []

    def collect(samples: "ctypes._Pointer[ctypes.c_short]", count: int, _events: int) -> int:
        if count > 0:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = _CALLBACK(collect)  # a reference keeps it alive while the library calls it
    library.espeak_SetSynthCallback(callback)
    # The breath of some voices is noise, which the library would seed by the clock.
    library.espeak_ng_SetRandSeed(1)
    recordings = []
    for text in texts:
        parts.clear()
        content = text.encode()
        library.espeak_Synth(content, len(content) + 1, 0, _BY_CHARACTER, 0, _UTF8, None, None)
        library.espeak_Synchronize()
        recordings.append(np.concatenate(parts))
    return rate, recordings
