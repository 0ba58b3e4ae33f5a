"""Errors of building a tokenizer from a configuration name the key, and where files were sought."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from torchtitan_mixtures.data.speech import SPEECH_TOKENIZERS, build_speech_tokenizer
from torchtitan_mixtures.data.tokenizers import (
    IMAGE_TOKENIZERS,
    build_image_tokenizer,
    build_text_tokenizer,
)

BUILDERS: dict[str, Callable[[str], object]] = {
    "text": build_text_tokenizer,
    "image": build_image_tokenizer,
    "speech": build_speech_tokenizer,
}


@pytest.mark.parametrize("modality", BUILDERS)
def test_a_path_that_is_none_from_here_says_from_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, modality: str
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        BUILDERS[modality]("runs/mine.bin")
    said = str(caught.value)
    assert said.startswith(f"multimodal.{modality}_tokenizer = 'runs/mine.bin' is unknown; use emo")
    assert said.endswith(f"There is no such file seen from the current folder {tmp_path}.")
    with pytest.raises(ValueError, match=r"There is no such file\.$"):
        BUILDERS[modality](str(tmp_path / "mine.bin"))


@pytest.mark.parametrize("modality", BUILDERS)
def test_what_cannot_be_used_is_named_with_its_key(tmp_path: Path, modality: str):
    of_others = IMAGE_TOKENIZERS["emoji_32px"]
    if modality == "image":
        of_others = SPEECH_TOKENIZERS["emoji_25hz"]
    paths = [tmp_path / "no.bin", of_others]
    paths[0].write_bytes(b"\xff no")
    if modality != "speech":
        (tmp_path / "folder").mkdir()
        paths.append(tmp_path / "folder")
    for path in paths:
        with pytest.raises(ValueError) as caught:
            BUILDERS[modality](str(path))
        assert str(caught.value).startswith(f"multimodal.{modality}_tokenizer = ")
        assert str(caught.value).count(f"multimodal.{modality}_tokenizer") == 1
        assert str(path) in str(caught.value)
