"""`[sampling]` of models of images: what is refused, where sheets go, when there are none."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchtitan.components.metrics import LoggerContainer

from tests.jobs import debug_job
from tests.unit.sampling import prompted
from tests.unit.sampling.prompted import TinyArgs, TinyModel
from tests.unit.sampling.test_image_command import make_model
from torchtitan_mixtures.checks import check_job
from torchtitan_mixtures.data.emoji import EmojiCorpus
from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.media import Media, write_pictures
from torchtitan_mixtures.sampling.during_training import build_sampler, check_sampling
from torchtitan_mixtures.sampling.images_during_training import EMOJI_PROMPTS

ON = ("--sampling.interval=2", "--sampling.num_steps=2", "--sampling.num_samples=1")


class FakeProcessor:
    """Keeps what is logged."""

    loggers = (LoggerContainer(),)

    def __init__(self):
        self.media = {}

    def log_media(self, media, step):
        self.media[step] = media

    def restart_clock(self, step):
        pass


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--sampling.class_labels=8", r"^sampling.class_labels: class 8: must be from 0 to 7"),
        ("--sampling.prompts=a fox", r"^sampling.prompts = \['a fox'\]: .* sampling.class_labels"),
        ("--sampling.sampler=euler", r"^sampling.sampler = 'euler': .* ddpm or ddim"),
        ("--sampling.num_steps=1001", r"^sampling.num_steps = 1001: must be at most 1000"),
        ("--sampling.guided_channels=4", r"^sampling.guided_channels = 4: must be from 0"),
        ("--sampling.vae=nowhere", r"nowhere"),
        ("--sampling.shift=3", r"^sampling.shift = 3.0: a model of kind ddpm"),
        ("--sampling.negative_prompt=a", r"^sampling.negative_prompt = 'a': .* images of classes"),
    ],
)
def test_what_could_not_be_drawn_is_refused_at_start_up(option, message):
    with pytest.raises(ValueError, match=message):
        check_job(debug_job("mom", *ON, option))


def test_a_sheet_has_a_row_for_each_class_and_leaves_the_model_as_it_was():
    job = debug_job("mom", *ON, "--sampling.class_labels", "1", "2", "5")
    model, processor = make_model(), FakeProcessor()
    model.train()
    before = [parameter.clone() for parameter in model.parameters()]
    state = torch.random.get_rng_state()
    sampler = build_sampler(job, model.model_args, processor)
    assert [step for step in range(1, 7) if sampler.is_due(step)] == [2, 4, 6]
    sampler.sample(model, 2)
    sampler.sample(model, 4)
    assert model.training and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    first, second = (processor.media[step].images["samples/images"] for step in (2, 4))
    assert np.array_equal(first, second)  # the same noise, and the model has not moved
    assert first.shape[0] > 3 * 96


@pytest.mark.parametrize(
    ("options", "fields", "reason"),
    [
        (("--parallelism.context_parallel_degree=2",), {}, "context_parallel_degree = 2"),
        ((), {"in_channels": 4}, "4 channels: latents, which the VAE that sampling.vae names"),
    ],
)
def test_where_no_picture_can_be_drawn_training_goes_without(options, fields, reason, caplog):
    args = make_model(**fields).model_args
    assert build_sampler(debug_job("mom", *ON, *options), args, SimpleNamespace()) is None
    assert reason in caplog.text


# --- of prompts -----------------------------------------------------------------------------------

LONG = "a red fox left of two green apples above a house with a blue roof and a dog"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sampling.class_labels=1",), r"^sampling.class_labels = \[1\]: .* sampling.prompts"),
        (("--sampling.prompts= ",), r"^sampling.prompts = \[' '\]: a prompt is blank"),
        (("--multimodal.source=datasets",), r"^sampling.prompts = \[\]: .* at least one prompt"),
        (
            ("--sampling.negative_prompt=x", "--sampling.guidance=1"),
            r"^sampling.negative_prompt = 'x': there is no guidance away from it",
        ),
        (
            ("--objective.prompt_dropout=0", "--sampling.guidance=2"),
            r"^sampling.guidance = 2.0: .*prompt_dropout = 0 .* name a sampling.negative_prompt",
        ),
        (
            ("--multimodal.long_prompts=refuse", f"--sampling.prompts={LONG}"),
            r"^\[sampling\]: the prompt 'a red fox left .* tokens",
        ),
        (
            ("--multimodal.long_prompts=refuse", f"--sampling.negative_prompt={LONG}"),
            r"^\[sampling\]: the prompt 'a red fox left .* tokens",
        ),
    ],
)
def test_prompts_that_could_not_be_drawn_are_refused_at_start_up(options, message):
    with pytest.raises(ValueError, match=message):
        check_sampling(prompted.job_of(*ON, *options), TinyArgs())


def test_a_sheet_has_a_row_for_each_prompt():
    job = prompted.job_of(
        *ON, "--sampling.prompts", "a fox", "--sampling.guidance=3",
        "--sampling.negative_prompt=a dog",
    )  # fmt: skip
    job.sampling.prompts.append("a dog left of a fox")
    model, processor = TinyModel(TinyArgs()), FakeProcessor()
    model.train()
    state = torch.random.get_rng_state()
    sampler = build_sampler(job, model.model_args, processor)
    sampler.sample(model, 2)
    sampler.sample(model, 4)
    assert model.training and torch.equal(state, torch.random.get_rng_state())
    first, second = (processor.media[step].images["samples/images"] for step in (2, 4))
    assert np.array_equal(first, second)
    assert first.shape[0] == 2 * 100 + 4
    shifted = prompted.job_of(*ON, "--sampling.prompts=a fox", "--sampling.shift=5")
    for step, job in ((6, shifted), (8, prompted.job_of(*ON, "--sampling.prompts=a fox"))):
        build_sampler(job, model.model_args, processor).sample(model, step)
    drawn = [processor.media[step].images["samples/images"] for step in (6, 8)]
    assert (drawn[0] != drawn[1]).any()


def test_without_prompts_some_emoji_are_drawn():
    known = {concept.name: concept.split for concept in EmojiCorpus.load().concepts}
    for text, split in (("red apple", "train"), ("cat", "train"), ("fox", "unseen_concept")):
        assert any(text in prompt for prompt in EMOJI_PROMPTS) and known[text] == split
    processor = FakeProcessor()
    build_sampler(prompted.job_of(*ON), TinyArgs(), processor).sample(TinyModel(TinyArgs()), 2)
    sheet = processor.media[2].images["samples/images"]
    assert sheet.shape[0] == len(EMOJI_PROMPTS) * 100 + 4


def test_where_new_texts_have_no_embeddings_training_goes_without(caplog):
    spec = PromptSpec("text", "embeddings", 4, dim=2)
    job = prompted.job_of(*ON, "--multimodal.text_embeddings=there")
    assert build_sampler(job, TinyArgs(prompts=(spec,)), SimpleNamespace()) is None
    assert "--text-encoders" in caplog.text


def test_sheets_are_files_too(tmp_path):
    image = np.full((4, 6, 3), 200, np.uint8)
    write_pictures(tmp_path, Media({"samples/images": image}), 50)
    with Image.open(tmp_path / "samples" / "images-step-00050.png") as written:
        assert np.array_equal(np.asarray(written), image)
