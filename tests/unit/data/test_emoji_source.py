"""Documents of the embedded corpus: with speech in all orders, without it as they always were."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.jobs import load_job
from tests.unit.data.test_loader import assert_equal, build, check_resumption, take
from torchtitan_mixtures.data.batch import check_batch
from torchtitan_mixtures.data.emoji import STYLE_WORDS, EmojiCorpus
from torchtitan_mixtures.data.emoji_source import EmojiSource
from torchtitan_mixtures.data.loader import build_multimodal_tokenizer, find_modalities
from torchtitan_mixtures.data.sources import Document, document_rng
from torchtitan_mixtures.data.speech import build_speech_tokenizer
from torchtitan_mixtures.data.spoken import VOICES
from torchtitan_mixtures.data.tokenizers import build_image_tokenizer
from torchtitan_mixtures.job_config import Multimodal

NAMES = ("text", "image", "speech")


@pytest.fixture(scope="module")
def corpus() -> EmojiCorpus:
    return EmojiCorpus.load()


@pytest.fixture(scope="module")
def speakers(corpus: EmojiCorpus) -> dict[bytes, set[str]]:
    """The voices that say some units so."""
    found = defaultdict(set)
    for concept in corpus.concepts:
        for voice in VOICES:
            found[corpus.spoken(concept, voice).tobytes()].add(voice)
    return found


def make_source(
    split: str = "train", names: tuple[str, ...] = NAMES, is_endless: bool = True, **keys: Any
) -> EmojiSource:
    tokenizer = build_image_tokenizer("emoji_32px")
    return EmojiSource(Multimodal(**keys), split, tokenizer, is_endless, names)


def order(document: Document) -> tuple[str, ...]:
    return tuple(segment.modality for segment in document.segments)


def spoken_in(document: Document) -> list[bytes]:
    return [s.payload.tobytes() for s in document.segments if s.modality == "speech"]


# --- groups ---------------------------------------------------------------------------------------


def test_all_twelve_orders_are_equally_likely_and_scenes_stay_pairs():
    found: dict[float, Counter[tuple[str, ...]]] = {}
    for share, count in ((0.0, 2400), (1.0, 20)):
        source = make_source(scene_fraction=share, max_pairs=1)
        found[share] = Counter(order(source.build_document(0, i)) for i in range(count))
    pairs = {(a, b) for a in NAMES for b in NAMES if a != b}
    triples = {(a, b, c) for a, b in pairs for c in NAMES if c not in (a, b)}
    assert found[0.0].keys() == pairs | triples and len(pairs | triples) == 12
    # 200 of each are expected, with a standard deviation of 13.5.
    assert all(abs(number - 200) < 70 for number in found[0.0].values())
    assert found[1.0].keys() == {("text", "image"), ("image", "text")}


def test_a_group_says_shows_and_speaks_one_concept(corpus: EmojiCorpus):
    source, tokenizer = (
        make_source(scene_fraction=0, max_pairs=1),
        build_image_tokenizer("emoji_32px"),
    )
    seen = Counter()
    for index in range(0, 300, 3):
        drawing = corpus.drawings("train")[index]
        for segment in source.build_document(1, index).segments:
            seen[segment.modality] += 1
            if segment.modality == "text":
                assert drawing.concept.name in segment.payload
            elif segment.modality == "image":
                expected = tokenizer.encode(corpus.images([drawing]))[0]
                np.testing.assert_array_equal(segment.payload, expected)
            else:
                voices = [corpus.spoken(drawing.concept, voice) for voice in VOICES[:-1]]
                assert any(np.array_equal(segment.payload, units) for units in voices)
    assert min(seen.values()) > 50


@pytest.mark.parametrize("split", ["train", "unseen_concept", "unseen_style", "unseen_voice"])
def test_a_document_has_one_voice_of_its_split(speakers: dict[bytes, set[str]], split: str):
    source = make_source(split, is_endless=split == "train")
    heard = Counter()
    for index in range(min(300, source.num_documents)):
        document = source.build_document(0, index)
        assert order(document) and set(order(document)) <= set(NAMES)
        if spoken := spoken_in(document):
            voices = set.intersection(*(speakers[units] for units in spoken))
            allowed = {VOICES[-1]} if split == "unseen_voice" else set(VOICES[:-1])
            assert voices & allowed
            heard.update(voices & allowed)
    assert set(heard) == allowed


def test_a_concept_that_is_unseen_is_not_heard_in_training_either(corpus: EmojiCorpus):
    names = {concept.name for concept in corpus.concepts if concept.split == "train"}
    held_out = {
        corpus.spoken(concept, voice).tobytes()
        for concept in corpus.concepts
        if concept.split == "unseen_concept" and concept.name not in names
        for voice in VOICES
    }
    source = make_source(scene_fraction=0)
    trained = {units for i in range(600) for units in spoken_in(source.build_document(0, i))}
    said_alike = held_out & trained
    assert len(trained) > 500 and not said_alike


def test_documents_of_two_modalities_draw_what_they_always_drew(corpus: EmojiCorpus):
    """Replay every draw of documents without scenes: caption, order, go on?, which drawing."""
    source = make_source(names=("text", "image"), scene_fraction=0, seed=4)
    drawings = corpus.drawings("train")
    for index in range(0, 200):
        rng = document_rng(4, 2, index)
        expected, chosen = [], index
        for number in range(3):
            if number > 0:
                if rng.random() < 0.5:
                    break
                chosen = rng.randrange(len(drawings))
            rng.random()  # a scene?
            text = corpus.caption(drawings[chosen], rng)
            pair = [("text", text), ("image", drawings[chosen].style)]
            expected += pair if rng.random() < 0.5 else pair[::-1]
        segments = source.build_document(2, index).segments
        assert [s.modality for s in segments] == [name for name, _ in expected]
        texts = [s.payload for s in segments if s.modality == "text"]
        assert texts == [payload for name, payload in expected if name == "text"]
    assert set(STYLE_WORDS) == {drawing.style for drawing in drawings}


# --- loaders --------------------------------------------------------------------------------------

TOML = """
[job]
custom_config_module = "torchtitan_mixtures.job_config"
[model]
name = "mot"
flavor = "debugmodel_3modality"
[multimodal]
validation_splits = ["unseen_voice"]
shards = 4
[training]
seq_len = 256
local_batch_size = 2
[validation]
enable = true
seq_len = 256
local_batch_size = 2
steps = 2
"""


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Any]:
    (tmp_path / "config.toml").write_text(TOML)
    return lambda *overrides: load_job(tmp_path / "config.toml", *overrides)


def test_batches_frame_speech_and_keep_the_contract(job: Callable[..., Any], corpus: EmojiCorpus):
    config = job("--multimodal.speech_weight=0.5")
    tokenizer = build_multimodal_tokenizer(config)
    ranges = find_modalities(config, tokenizer).vocab_ranges
    assert ranges == ((0, 2048), (2048, 3072), (3072, 3584))
    names = {
        tuple(corpus.spoken(concept, voice)) for concept in corpus.concepts for voice in VOICES[:-1]
    }
    start, end = tokenizer.sentinels.speech_start, tokenizer.sentinels.speech_end
    found = 0
    for inputs, labels in take(build(config), 4):
        check_batch(inputs, labels, ranges)
        is_speech_target = labels >= 3072
        assert (inputs["loss_weights"][is_speech_target] == 0.5).all()
        assert (inputs["modality_masks"][:, 2] == (inputs["input"] >= 3072)).all()
        for row in inputs["input"].tolist():
            for place in (i for i, token in enumerate(row) if token == start):
                stop = row.index(end, place)
                assert tuple(token - 3072 for token in row[place + 1 : stop]) in names
                found += 1
    assert found > 10


def test_a_loader_with_speech_resumes_exactly(job: Callable[..., Any], tmp_path: Path):
    check_resumption(lambda: build(job(), 1, 2), 3, 6, tmp_path / "checkpoint")


def test_speech_belongs_to_what_a_resumed_run_must_keep(job: Callable[..., Any]):
    config = job()
    loader = build(config)
    (batch,) = take(loader, 1)
    state = loader.state_dict()
    key = "content of multimodal.speech_tokenizer"
    content = build_speech_tokenizer("emoji_25hz").fingerprint()
    assert json.loads(state["fingerprint"])[key] == content
    dense = build(job("--model.flavor=debugmodel_3modality_dense"))
    assert_equal(take(dense, 1), [batch])
    two = build(job("--model.flavor=debugmodel"))
    assert key not in two.fingerprint
    with pytest.raises(ValueError, match=r"multimodal\.speech_tokenizer|vocabulary ranges"):
        two.load_state_dict(state)


def test_speech_without_weight_is_not_supervised(job: Callable[..., Any]):
    (plain,), (silent,) = (
        take(build(job(*keys)), 1) for keys in ((), ("--multimodal.speech_weight=0",))
    )
    assert torch.equal(plain[0]["input"], silent[0]["input"])
    is_speech = plain[1] >= 3072
    assert is_speech.any() and (silent[1][is_speech] == -100).all()
    assert torch.equal(plain[1][~is_speech], silent[1][~is_speech])
