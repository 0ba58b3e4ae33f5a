"""`scripts/sample.py` with checkpoints of models of prompted images."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.data.tiny_encoders import save_clip, save_t5
from tests.unit.sampling import prompted
from tests.unit.sampling.prompted import SPEECH, TEXT, TinyArgs, TinyModel
from torchtitan_mixtures.data import text_encoders
from torchtitan_mixtures.data.emoji import EmojiCorpus
from torchtitan_mixtures.data.prompt_spec import EncoderSpan, PromptSpec
from torchtitan_mixtures.data.prompts import PromptTokens
from torchtitan_mixtures.data.tokenizers import build_text_tokenizer
from torchtitan_mixtures.objectives.flow import RectifiedFlow
from torchtitan_mixtures.sampling.command import main
from torchtitan_mixtures.sampling.images import check_image_settings, draw_images, make_denoiser
from torchtitan_mixtures.sampling.prompt_encoding import PromptEncoder, choose_text_encoders

FOX, APPLES = "a red fox", "two foxes above a red apple"


@pytest.fixture(autouse=True)
def family(monkeypatch):
    prompted.register(monkeypatch)


@pytest.fixture
def checkpoint(tmp_path):
    return prompted.save(tmp_path / "run", TinyArgs())


def sample(checkpoint, out, *options):
    steps = () if "--num-steps" in options else ("--num-steps", "3")
    main(["--checkpoint", str(checkpoint), "--out", str(out), *steps, *options])
    return json.loads((out / "samples.json").read_text())


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("image*.png"))}


def settings_of(job, **changes):
    for name, value in changes.items():
        setattr(job.sampling, name, value)
    return check_image_settings(job.sampling, RectifiedFlow(), TinyArgs(), 0.1)


def encoded(*texts, specs=(TEXT,), **options):
    return PromptEncoder(prompted.job_of(), specs, "cpu", **options).encode(texts)


# --- guidance -------------------------------------------------------------------------------------


def test_guidance_of_one_is_the_plain_model():
    model, prompts = TinyModel(TinyArgs()), encoded(FOX, APPLES)
    latents, times = torch.randn(2, 3, 32, 32), torch.full((2,), 400.0)
    condition = prompts.condition([0, 1], "cpu")
    settings = settings_of(prompted.job_of(), guidance=1.0)
    found = make_denoiser(model, model.model_args, condition, settings)(latents, times)
    ids, parts = prompts.tensors["text"], []
    for row in range(2):
        word = (ids[row] * torch.arange(1, 17)).float().sum().sin()
        parts.append(0.5 * latents[row] * 1.4 + word)
    torch.testing.assert_close(found, torch.stack(parts))


@pytest.mark.parametrize("negative", [None, "a dull picture"])
def test_guidance_goes_away_from_nothing_or_from_the_negative_prompt(negative):
    model, prompts = TinyModel(TinyArgs()), encoded(FOX, APPLES)
    latents, times = torch.randn(3, 3, 32, 32), torch.full((3,), 400.0)
    against = None if negative is None else encoded(negative)
    rows = [1, 0, 1]

    def predict(tensors, kept):
        return make_denoiser(
            model,
            model.model_args,
            SimpleNamespace(given={"prompts": tensors, "kept": kept}),
            settings_of(prompted.job_of(), guidance=1.0),
        )(latents, times)

    given = predict({"text": prompts.tensors["text"][rows]}, torch.ones(3, 1, dtype=torch.bool))
    if against is None:
        without = predict({"text": prompts.tensors["text"][rows]}, torch.zeros(3, 1).bool())
    else:
        without = predict({"text": against.tensors["text"][[0, 0, 0]]}, torch.ones(3, 1).bool())
    settings = settings_of(prompted.job_of(), guidance=4.0)
    condition = prompts.condition(rows, "cpu", against)
    found = make_denoiser(model, model.model_args, condition, settings)(latents, times)
    torch.testing.assert_close(found, without + 4 * (given - without))


def test_the_shift_is_that_of_the_process_unless_another_is_asked_for():
    model, condition = TinyModel(TinyArgs()), encoded(FOX).condition([0], "cpu")
    job = prompted.job_of()

    def draw(process, **changes):
        settings = settings_of(job, num_steps=3, **changes)
        settings = check_image_settings(job.sampling, process, TinyArgs(), 0.1)
        return draw_images(model, TinyArgs(), process, condition, [0], settings, "cpu")

    trained = draw(RectifiedFlow(shift=3.0), shift=0.0)
    assert torch.equal(draw(RectifiedFlow(), shift=3.0), trained)
    assert not torch.equal(draw(RectifiedFlow(), shift=0.0), trained)


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_are_tokens_of_their_texts():
    found = encoded(FOX, APPLES)
    tokens = PromptTokens(build_text_tokenizer("emoji"), TEXT.length)
    assert torch.equal(found.tensors["text"][1], tokens.encode(APPLES))
    assert found.kept.tolist() == [[True], [True]]
    assert found.condition([0], "cpu").without["kept"].tolist() == [[False]]


def test_only_names_are_spoken_and_only_if_asked_to():
    texts = ("fox", "a fox", "a fox with a hat")
    silent = encoded(*texts, specs=(TEXT, SPEECH))
    assert silent.kept.tolist() == [[True, False]] * 3
    assert (silent.tensors["speech"] == SPEECH.null_token).all()
    spoken = encoded(*texts, specs=(TEXT, SPEECH), speaks=True)
    assert spoken.kept.tolist() == [[True, True], [True, True], [True, False]]
    assert spoken.is_spoken == (True, True, False)
    corpus = EmojiCorpus.load()
    (fox,) = (concept for concept in corpus.concepts if concept.name == "fox")
    units = corpus.spoken(fox, "en-us+f2")[: SPEECH.length].tolist()
    expected = units + [SPEECH.null_token] * (SPEECH.length - len(units))
    assert spoken.tensors["speech"][0].tolist() == expected


SPAN = EncoderSpan("letters", (0, 4), (0, 2), (0, 3))
LETTERS = PromptSpec("text", "embeddings", 4, dim=2, pooled_dim=3, spans=(SPAN,))


class FakeTokenizers:
    """Letters of at most four."""

    def __init__(self, folders, long_prompts="truncate"):
        self.truncated = [0]

    def tokenize(self, text):
        self.truncated[0] += len(text) > 4
        return [torch.tensor([ord(letter) for letter in text[:4].ljust(4)])]


class FakeEncoders:
    """Letters as numbers."""

    def __init__(self, folders, device, long_prompts="truncate", dtype=torch.float32):
        self.tokenizers = FakeTokenizers(folders, long_prompts)

    def encode_ids(self, ids):
        (letters,) = ids
        return letters[:, :, None].repeat(1, 1, 2).float(), letters[:, :3].float()


@pytest.fixture
def frozen(monkeypatch):
    monkeypatch.setattr(text_encoders, "FrozenTextEncoders", FakeEncoders)
    monkeypatch.setattr(text_encoders, "PromptTokenizers", FakeTokenizers)
    monkeypatch.setattr(text_encoders, "frozen_prompt_spec", lambda folders: LETTERS)


def test_prompts_of_frozen_encoders_are_their_embeddings(frozen):
    warnings = []
    encoder = PromptEncoder(prompted.job_of(), (LETTERS,), "cpu", ["clip"], warn=warnings.append)
    found = encoder.encode(["ab", "abcdef"])
    assert found.tensors["text"][1, :, 0].tolist() == [97, 98, 99, 100]
    assert found.tensors["text_pooled"][0].tolist() == [97, 98, 32]
    assert found.kept.shape == (2, 1)
    assert warnings == ["The prompt 'abcdef' is too long for the model: its end is cut off."]


def test_embeddings_are_those_that_a_run_with_the_same_encoders_trains_on(tmp_path):
    save_clip(tmp_path / "clip", seed=1)
    save_t5(tmp_path / "t5", seed=2)
    folders = [str(tmp_path / name) for name in ("clip", "t5")]
    job, texts = prompted.job_of(), [FOX, 40 * "apple "]
    job.multimodal.text_encoders = folders
    specs = (text_encoders.frozen_prompt_spec(folders),)
    assert choose_text_encoders(job, specs, [], "--text-encoders") == folders
    warnings = []
    found = PromptEncoder(job, specs, "cpu", folders, warn=warnings.append).encode(texts)
    embeddings, pooled = text_encoders.FrozenTextEncoders(folders, "cpu").encode(texts)
    torch.testing.assert_close(found.tensors["text"], embeddings)
    torch.testing.assert_close(found.tensors["text_pooled"], pooled)
    assert found.kept.tolist() == [[True, True]] * 2
    assert len(warnings) == 1 and "apple" in warnings[0]
    job.multimodal.text_encoder_dtype = "bfloat16"
    rough = PromptEncoder(job, specs, "cpu", folders, warn=warnings.append).encode(texts)
    half = text_encoders.FrozenTextEncoders(folders, "cpu", dtype=torch.bfloat16)
    assert rough.tensors["text"].dtype == torch.float32
    assert not torch.equal(rough.tensors["text"], embeddings)
    for row, text in enumerate(texts):
        assert torch.equal(rough.tensors["text"][row], half.encode([text])[0][0])
    with pytest.raises(ValueError, match=r"^--text-encoders .*t5 .*clip: they make"):
        choose_text_encoders(job, specs, folders[::-1], "--text-encoders")


def test_the_encoders_are_those_of_the_run_or_those_that_are_named(frozen):
    job = prompted.job_of("--multimodal.text_encoders=clip")
    assert choose_text_encoders(job, (LETTERS,), [], "--text-encoders") == ["clip"]
    assert choose_text_encoders(job, (LETTERS,), ["x"], "--text-encoders") == ["x"]
    job = prompted.job_of("--multimodal.text_embeddings=there")
    with pytest.raises(ValueError, match=r"^--text-encoders: the run had embeddings .*'there'"):
        choose_text_encoders(job, (LETTERS,), [], "--text-encoders")
    other = PromptSpec("text", "embeddings", 4, dim=8, pooled_dim=3, spans=(SPAN,))
    with pytest.raises(ValueError, match=r"^--text-encoders x: they make 4 x 2 .* takes 4 x 8"):
        choose_text_encoders(job, (other,), ["x"], "--text-encoders")
    with pytest.raises(ValueError, match=r"^--text-encoders x: the model encodes texts itself"):
        choose_text_encoders(job, (TEXT,), ["x"], "--text-encoders")


# --- the command ----------------------------------------------------------------------------------


def test_a_grid_a_png_for_each_image_and_a_table_are_written(checkpoint, tmp_path, capsys):
    (tmp_path / "more.txt").write_text("a house\n")
    out = tmp_path / "out"
    table = sample(
        checkpoint, out, "--prompt", FOX, "--prompt", APPLES, "--prompt-file",
        str(tmp_path / "more.txt"), "--num-samples", "2", "--guidance", "4", "--seed", "4",
        "--negative-prompt", "blurry", "--shift", "3",
    )  # fmt: skip
    prompts = [entry["prompt"] for entry in table["samples"]]
    assert prompts == [FOX] * 2 + [APPLES] * 2 + ["a house"] * 2
    assert [entry["number"] for entry in table["samples"]] == list(range(6))
    assert table["samples"][3]["file"] == "image0003_prompt001.png"
    files = {entry["file"] for entry in table["samples"]}
    assert {path.name for path in out.iterdir()} == files | {"grid.png", "samples.json"}
    assert table["settings"] == {
        "sampler": "euler", "num_steps": 3, "eta": 0.0, "guidance": 4.0, "guided_channels": 0,
        "seed": 4, "shift": 3.0, "routing": "step",
    }  # fmt: skip
    assert (table["negative_prompt"], table["aspect_ratio"]) == ("blurry", "1:1")
    grid = np.asarray(Image.open(out / "grid.png"))
    first = pixels(out)["image0000_prompt000.png"]
    assert np.array_equal(grid[4:100, 180:276], first.repeat(3, 0).repeat(3, 1))
    assert (grid[:100, :180] < 128).any(), "no prompt"
    assert "6 images in" in capsys.readouterr().out


def test_an_image_depends_on_its_number_and_the_seed_not_on_the_batch(checkpoint, tmp_path):
    options = ("--prompt", FOX, "--prompt", APPLES, "--num-samples", "3", "--guidance", "3")
    sample(checkpoint, tmp_path / "whole", *options)
    sample(checkpoint, tmp_path / "cut", *options, "--batch-size", "2")
    sample(checkpoint, tmp_path / "other", *options, "--seed", "1")
    sample(checkpoint, tmp_path / "away", *options, "--negative-prompt", "a house")
    whole, cut, *others = (pixels(tmp_path / n) for n in ("whole", "cut", "other", "away"))
    for name, image in whole.items():
        assert np.array_equal(image, cut[name])
        assert all((image != other[name]).any() for other in others)


def test_what_is_not_said_is_as_in_the_sampling_of_the_run(tmp_path):
    run = prompted.save(
        tmp_path / "run", TinyArgs(), "--sampling.guidance=3", "--sampling.num_steps=7",
        "--sampling.negative_prompt=blurry", "--objective.time_shift=2",
    )  # fmt: skip
    main(["--ckpt", str(run), "--out", str(tmp_path / "out"), "--prompt", FOX])
    table = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert table["settings"]["guidance"] == 3.0 and table["settings"]["num_steps"] == 7
    assert table["settings"]["shift"] == 2.0 and table["negative_prompt"] == "blurry"
    assert len(table["samples"]) == 4
    plain = sample(run, tmp_path / "plain", "--prompt", FOX, "--negative-prompt", "")
    assert plain["negative_prompt"] == ""


def test_images_have_the_aspect_ratio_that_is_asked_for(tmp_path):
    ratios = "--multimodal.aspect_ratios=1:1,4:3,1:2"
    run = prompted.save(tmp_path / "run", TinyArgs(), ratios)
    shapes = {}
    for name in ("1:1", "4:3", "1:2"):
        out = tmp_path / name.replace(":", "_")
        sample(run, out, "--prompt", FOX, "--aspect-ratio", name, "--num-samples", "2")
        (shapes[name],) = {image.shape for image in pixels(out).values()}
    assert shapes == {"1:1": (32, 32, 3), "4:3": (28, 36, 3), "1:2": (44, 24, 3)}
    grid = Image.open(tmp_path / "1_2" / "grid.png")
    assert grid.size == (180 + 2 * 100 + 4, 4 * 44 + 8)


def test_names_are_spoken_to_a_model_that_hears(tmp_path, monkeypatch):
    args = TinyArgs(prompts=(TEXT, SPEECH))
    prompted.register(monkeypatch, args)
    run = prompted.save(tmp_path / "run", args)
    options = ("--prompt", "fox", "--prompt", "a fox with a hat", "--num-samples", "1")
    silent = sample(run, tmp_path / "silent", *options)
    spoken = sample(run, tmp_path / "spoken", *options, "--speak")
    assert "spoken" not in silent["samples"][0]
    assert [entry["spoken"] for entry in spoken["samples"]] == [True, False]
    first, second = pixels(tmp_path / "silent").values(), pixels(tmp_path / "spoken").values()
    assert [(a != b).any() for a, b in zip(first, second, strict=True)] == [True, False]


def test_a_long_prompt_is_cut_with_a_warning_or_refused(tmp_path, capsys):
    long = "a red fox left of two green apples above a house with a blue roof and a dog"
    for name, rule in (("cut", "truncate"), ("no", "refuse")):
        prompted.save(tmp_path / name, TinyArgs(), f"--multimodal.long_prompts={rule}")
    sample(tmp_path / "cut", tmp_path / "out", "--prompt", FOX, "--prompt", long)
    said = capsys.readouterr().out
    assert f"The prompt {long!r} is too long for the model: its end is cut off.\n" in said
    assert said.count("is cut off") == 1
    with pytest.raises(SystemExit):
        sample(tmp_path / "no", tmp_path / "out2", "--prompt", long)
    assert f"error: the prompt {long[:80]!r} has" in capsys.readouterr().err
    assert not (tmp_path / "out2").exists()


WRONG = [
    ((), "nothing to draw: pass --prompt TEXT, --prompt-file."),
    (("--prompt", " "), "--prompt ' ': is blank"),
    (("--prompt", "x", "--class-labels", "1"), "is a model of images of prompts (tiny_prompted)"),
    (("--prompt", "x", "--image", "x.png"), "--image: "),
    (("--prompt", "x", "--into", "text"), "--into: "),
    (("--prompt", "x", "--top-k", "5"), "--top-k: "),
    (("--prompt", "x", "--sampler", "ddim"), "--sampler = 'ddim': a model of kind flow is drawn"),
    (("--prompt", "x", "--negative-prompt", "y", "--guidance", "1"), "--negative-prompt = 'y': "),
    (("--prompt", "x", "--shift", "nan"), "--shift = nan: must be a finite number > 0"),
    (("--prompt", "x", "--aspect-ratio", "4:3"), '--aspect-ratio "4:3": unknown aspect ratio'),
    (("--prompt", "x", "--speak"), "--speak: the model does not hear prompts"),
    (("--prompt", "x", "--text-encoders", "y"), "--text-encoders y: the model encodes texts"),
    (("--prompt", "x", "--num-samples", "0"), "--num-samples 0: must be at least 1."),
    (("--prompt", "x", "--vae", "nowhere"), "nowhere"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_one_message(options, message, checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--ckpt", str(checkpoint), "--out", str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_speaking_where_nothing_is_a_name_is_refused(tmp_path, monkeypatch, capsys):
    args = TinyArgs(prompts=(TEXT, SPEECH))
    prompted.register(monkeypatch, args)
    with pytest.raises(SystemExit):
        sample(prompted.save(tmp_path / "run", args), tmp_path / "out", "--prompt=x", "--speak")
    assert "--speak: no prompt is the name of an emoji" in capsys.readouterr().err


def test_guidance_of_a_model_that_always_had_prompts_needs_a_negative_one(tmp_path, capsys):
    run = prompted.save(tmp_path / "run", TinyArgs(), "--objective.prompt_dropout=0")
    with pytest.raises(SystemExit):
        sample(run, tmp_path / "out", "--prompt", FOX, "--guidance", "2")
    assert "objective.prompt_dropout = 0 and does not know" in capsys.readouterr().err
    sample(run, tmp_path / "out", "--prompt", FOX, "--guidance", "2", "--negative-prompt", "y")
