"""Emoji with captions, scenes and speech: what samples hold, their order, and resumption."""

from __future__ import annotations

import itertools
import json
import logging

import pytest
import torch

from tests.unit.data.image_jobs import PATCH_SIZE, needs_fork
from tests.unit.data.prompt_jobs import (
    PROMPT_LENGTH,
    SPEECH_LENGTH,
    assert_same_batches,
    by_number,
    emoji_job,
    take,
    use_prompted_model,
    write_vae_config,
)
from torchtitan_mixtures.data.emoji import EmojiCorpus
from torchtitan_mixtures.data.image_sets import to_tensor
from torchtitan_mixtures.data.prompt_loader import (
    build_prompt_dataloader,
    build_prompt_validation_dataloader,
    check_prompt_splits,
    list_prompt_splits,
    open_prompted_images,
    prompted_image_spec,
)
from torchtitan_mixtures.data.prompts import SPEECH_UNITS
from torchtitan_mixtures.data.sources import document_rng
from torchtitan_mixtures.data.spoken import VOICES
from torchtitan_mixtures.data.tokenizers import build_text_tokenizer

NUM_EMOJI = 146  # drawings of unseen_style, the smallest split


@pytest.fixture(autouse=True)
def text_model(monkeypatch):
    use_prompted_model(monkeypatch)


@pytest.fixture
def hearing_model(monkeypatch):
    use_prompted_model(monkeypatch, "text", "speech")


def texts(batches):
    tokenizer = build_text_tokenizer("emoji")
    return [
        tokenizer.decode(row.tolist()) for inputs, _ in batches for row in inputs["prompt_text"]
    ]


# --- what a sample holds --------------------------------------------------------------------------


def test_a_batch_has_the_keys_of_the_contract():
    ((inputs, labels),) = take(emoji_job(), 1)
    assert {key: (tuple(t.shape), t.dtype) for key, t in inputs.items()} == {
        "input": ((3, 3, 16, 16), torch.float32),
        "prompt_text": ((3, PROMPT_LENGTH), torch.int64),
        "sample_index": ((3,), torch.int64),
    }
    assert inputs["input"].min() >= -1 and inputs["input"].max() == 1
    assert labels.shape == (3, (16 // PATCH_SIZE) ** 2) and not labels.any()


@pytest.mark.parametrize("size", [16, 32, 64])
def test_a_drawing_comes_with_a_caption_of_its_own(size):
    job = emoji_job(image_size=size, scene_fraction=0.0)
    corpus = EmojiCorpus.load()
    drawings = corpus.drawings("unseen_style")
    pictures = [to_tensor(corpus.image(drawing, size)) for drawing in drawings]
    batches = take(job, 3)
    for (inputs, _), row in itertools.product(batches, range(3)):
        image = inputs["input"][row]
        named = [d for d, p in zip(drawings, pictures, strict=True) if torch.equal(p, image)]
        caption = build_text_tokenizer("emoji").decode(inputs["prompt_text"][row].tolist())
        words = {word for d in named for word in (*d.concept.name.split(), *d.concept.keywords)}
        assert any(word in caption for word in words)


def test_scenes_come_with_their_captions_in_their_share():
    job = emoji_job(scene_fraction=1.0, local_batch_size=8)
    images = open_prompted_images(job, "multimodal.train_split", "unseen_style")
    rng = document_rng(0, 5, "prompt")
    item = images.read(3, document_rng(0, 5, "prompt"))
    rng.random()
    scene = EmojiCorpus.load().compose_scene(rng, "unseen_style", 16)
    assert item.caption == scene.caption and torch.equal(item.image, to_tensor(scene.image))

    images = open_prompted_images(emoji_job(), "multimodal.train_split", "unseen_style")
    pictures = {images.read(i, document_rng(0, i, "")).image.numpy().tobytes() for i in range(146)}
    plain = open_prompted_images(
        emoji_job(scene_fraction=0.0), "multimodal.train_split", "unseen_style"
    )
    drawings = {plain.read(i, document_rng(0, i, "")).image.numpy().tobytes() for i in range(146)}
    assert 20 <= len(pictures - drawings) <= 53  # a quarter of 146, by four standard deviations


def test_captions_and_scenes_are_others_in_each_epoch():
    batches = take(emoji_job(local_batch_size=NUM_EMOJI), 2)
    first, second = (
        set(zip(texts([batch]), (i.numpy().tobytes() for i in batch[0]["input"]), strict=True))
        for batch in batches
    )
    assert len(first & second) < 30  # names alone are short captions, and come again
    captions = [set(texts([batch])) for batch in batches]
    assert captions[0] != captions[1]


def test_a_drawing_is_spoken_and_a_scene_is_not(hearing_model):
    job = emoji_job(local_batch_size=60)
    ((inputs, _),) = take(job, 1)
    speech = inputs["prompt_speech"]
    assert speech.shape == (60, SPEECH_LENGTH) and speech.dtype == torch.int64
    assert speech.min() >= 0 and speech.max() == SPEECH_UNITS
    corpus = EmojiCorpus.load()
    drawings = corpus.drawings("unseen_style")
    pictures = [to_tensor(corpus.image(drawing, 16)) for drawing in drawings]
    num_silent = 0
    for image, units in zip(inputs["input"], speech, strict=True):
        shown = [d for d, p in zip(drawings, pictures, strict=True) if torch.equal(p, image)]
        if not shown:
            assert (units == SPEECH_UNITS).all()
            num_silent += 1
            continue
        # Some concepts look the same.
        names = [(voice, corpus.spoken(d.concept, voice)) for d in shown for voice in VOICES]
        said = units[units != SPEECH_UNITS].tolist()
        assert {voice for voice, name in names if name.tolist() == said} - {VOICES[-1]}
        assert (units[len(said) :] == SPEECH_UNITS).all()
    assert 4 <= num_silent <= 26


def test_the_voice_that_is_left_out_speaks_in_its_split_alone(hearing_model):
    job = emoji_job(validation_splits=["unseen_voice"], scene_fraction=0.0)
    job.validation.steps = 1
    check_prompt_splits(job)
    loader = build_prompt_validation_dataloader(1, 0, job, "unseen_voice")
    ((inputs, _),) = loader
    corpus = EmojiCorpus.load()
    drawings = corpus.drawings("unseen_voice")
    for index, units in zip(inputs["sample_index"].tolist(), inputs["prompt_speech"], strict=True):
        name = torch.from_numpy(corpus.spoken(drawings[index].concept, VOICES[-1]))
        assert torch.equal(units[: len(name)], name)
    assert list_prompt_splits(job) == ["unseen_style", "train", "unseen_concept", "unseen_voice"]


def test_a_model_that_does_not_hear_has_no_unseen_voice():
    assert list_prompt_splits(emoji_job()) == ["unseen_style", "train", "unseen_concept"]
    with pytest.raises(ValueError, match=r"validation_splits = 'unseen_voice': .*text, image"):
        check_prompt_splits(emoji_job(validation_splits=["unseen_voice"]))


def test_pictures_for_a_vae_are_larger_than_what_the_model_sees(tmp_path):
    vae = write_vae_config(tmp_path / "vae")
    job = emoji_job(image_size=8, vae=vae)
    spec = prompted_image_spec(job)
    assert (spec.channels, spec.size) == (4, 8)
    ((inputs, labels),) = take(job, 1)
    assert inputs["input"].shape == (3, 3, 16, 16) and labels.shape == (3, (8 // PATCH_SIZE) ** 2)


# --- prompts that are too long --------------------------------------------------------------------


def test_texts_that_are_cut_are_counted_ever_more_seldom(caplog):
    job = emoji_job(prompt_length=4)
    with caplog.at_level(logging.WARNING):
        take(job, 2 * NUM_EMOJI // 3)
    lines = [r.message for r in caplog.records if "were cut" in r.message]
    assert 5 <= len(lines) <= 12  # of nearly 300 that are cut
    assert any("at the end of a pass" in line for line in lines)
    assert 'split "unseen_style"' in lines[0] and "long_prompts" in lines[0]


@needs_fork
def test_cut_texts_are_counted_in_workers_and_in_validation(caplog):
    totals = []
    for num_workers in (0, 2):
        caplog.clear()
        job = emoji_job(prompt_length=4, num_workers=num_workers)
        with caplog.at_level(logging.WARNING):
            list(build_prompt_validation_dataloader(1, 0, job, "unseen_style"))
        totals.append([r.message for r in caplog.records if "end of a pass" in r.message])
    assert totals[0] == totals[1] and len(totals[0]) == 1
    assert f"in {NUM_EMOJI} samples" in totals[0][0]


def test_a_long_text_can_be_refused():
    job = emoji_job(prompt_length=4, long_prompts="refuse")
    with pytest.raises(ValueError, match=r"the prompt '.*' has \d+ tokens, the model takes 2"):
        take(job, 3)


def test_a_spoken_name_that_is_too_long_is_cut_and_counted(monkeypatch, caplog):
    use_prompted_model(monkeypatch, "text", "speech", speech_length=5)
    with caplog.at_level(logging.WARNING):
        ((inputs, _),) = take(emoji_job(scene_fraction=0.0), 1)
    assert inputs["prompt_speech"].shape == (3, 5)
    assert "3 prompts in 3 samples" in caplog.text


# --- order and resumption -------------------------------------------------------------------------


def test_every_epoch_has_each_drawing_once_in_an_order_of_its_own():
    job = emoji_job(scene_fraction=0.0, local_batch_size=NUM_EMOJI)
    orders = [[i.numpy().tobytes() for i in inputs["input"]] for inputs, _ in take(job, 2)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1] and len(set(orders[0])) > 140


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 12), (2, 3), (3, 2), (4, 3)])
def test_a_step_has_the_same_samples_on_any_number_of_ranks(hearing_model, ranks, batch_size):
    expected = by_number(take(emoji_job(local_batch_size=4), 6))  # 2 steps of 12
    job = emoji_job(local_batch_size=batch_size)
    microbatches = 12 // (ranks * batch_size)
    of_ranks = [take(job, 2 * microbatches, rank, ranks) for rank in range(ranks)]
    assert by_number([batch for batches in of_ranks for batch in batches]) == expected


def test_a_resumed_run_continues_to_the_bit_with_other_ranks_and_batches():
    job = emoji_job(local_batch_size=8)
    whole = take(job, 40)
    loader = build_prompt_dataloader(1, 0, None, job)
    list(itertools.islice(loader, 20))  # past the first epoch
    state = json.loads(json.dumps(loader.state_dict()))
    assert_same_batches(take(job, 20, state=state), whole[20:])
    of_ranks = [take(emoji_job(local_batch_size=2), 40, rank, 2, state) for rank in range(2)]
    found = by_number([batch for batches in of_ranks for batch in batches])
    assert found == by_number(whole[20:])


@needs_fork
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(hearing_model, num_workers):
    batches = take(emoji_job(), 12)
    assert_same_batches(take(emoji_job(num_workers=num_workers), 12), batches)


def test_the_seed_decides_what_is_drawn():
    first, again, other = (by_number(take(emoji_job(seed=seed), 4)) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=needs_fork)])
@pytest.mark.parametrize("ranks", [1, 3])
def test_validation_has_each_drawing_once_and_is_always_the_same(ranks, num_workers):
    job = emoji_job(num_workers=num_workers, local_batch_size=8)
    seen = {}
    for rank in range(ranks):
        loader = build_prompt_validation_dataloader(ranks, rank, job, "unseen_style")
        batches = list(loader)
        assert len(batches) == len(loader) == -(-NUM_EMOJI // (8 * ranks))
        again = build_prompt_validation_dataloader(
            ranks, rank, emoji_job(seed=7, local_batch_size=8), "unseen_style"
        )
        assert_same_batches(batches, list(again))
        for inputs, labels in batches:
            for row in (labels == 0).all(1).nonzero().flatten().tolist():
                seen[int(inputs["sample_index"][row])] = inputs["prompt_text"][row].tolist()
    assert sorted(seen) == list(range(NUM_EMOJI))
    images = open_prompted_images(job, "multimodal.train_split", "unseen_style")
    for index in (0, 100):
        item = images.read(index, document_rng(0, index, "validation prompt"))
        assert item.prompts["prompt_text"].tolist() == seen[index]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"seed": 1}, "multimodal.seed"),
        ({"train_split": "train"}, "multimodal.train_split"),
        ({"image_size": 32}, "multimodal.image_size"),
        ({"scene_fraction": 0.5}, "multimodal.scene_fraction"),
        ({"prompt_length": 20}, "prompts"),
    ],
)
def test_a_state_of_other_data_is_refused(values, key):
    state = build_prompt_dataloader(1, 0, None, emoji_job()).state_dict()
    changed = build_prompt_dataloader(1, 0, None, emoji_job(**values))
    with pytest.raises(ValueError, match=rf"{key} is .*exclude_from_loading"):
        changed.load_state_dict(state)


def test_a_state_of_other_prompts_is_refused(monkeypatch):
    state = build_prompt_dataloader(1, 0, None, emoji_job()).state_dict()
    use_prompted_model(monkeypatch, "text", "speech")
    changed = build_prompt_dataloader(1, 0, None, emoji_job())
    with pytest.raises(ValueError, match=r"prompts is .*'speech'.*, but"):
        changed.load_state_dict(state)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 20}, r"image_size = 20: emoji have 16, 32, 64 pixels"),
        ({"random_flip": True}, r"random_flip = true: mirrored emoji would lie"),
        ({"aspect_ratios": ["4:3"]}, r"aspect_ratios = \['4:3'\]: .* emoji are square"),
        ({"aspect_ratios": ["9:1"]}, r"aspect_ratios: '9:1' is no aspect ratio"),
        ({"text_embeddings": "somewhere"}, r"text_embeddings = .*new in each epoch"),
        ({"train_split": "test"}, r'train_split = .*no split "test"; its splits are train'),
        ({"source": "folder"}, r'path = "": holds no latents .*encode-latents'),
        ({"source": "folder", "path": "/"}, r'path = "/": holds no latents of images with'),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(values, message):
    with pytest.raises(ValueError, match=message):
        check_prompt_splits(emoji_job(**values))
