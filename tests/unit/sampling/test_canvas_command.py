"""`scripts/sample.py --canvas` with checkpoints of models of classes and of prompts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.data.image_jobs import save_tiny_vae
from tests.unit.sampling import prompted
from tests.unit.sampling.prompted import TinyArgs
from tests.unit.sampling.test_image_command import make_model, save
from torchtitan_mixtures.models.mixdiff import mixdiff_args
from torchtitan_mixtures.sampling.canvas import Canvas, Rectangle, Region
from torchtitan_mixtures.sampling.canvas_command import side_multiple
from torchtitan_mixtures.sampling.canvas_report import draw_places
from torchtitan_mixtures.sampling.command import main

FOX, HOUSE = "a red fox", "a house"


@pytest.fixture(autouse=True)
def family(monkeypatch):
    prompted.register(monkeypatch)


@pytest.fixture(scope="module")
def of_classes(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run"), make_model())


@pytest.fixture
def of_prompts(tmp_path):
    return prompted.save(tmp_path / "run", TinyArgs())


def toml(regions, **top):
    lines = [f"{key} = {json.dumps(value)}" for key, value in top.items()]
    for region in regions:
        lines += ["[[regions]]", *(f"{key} = {json.dumps(v)}" for key, v in region.items())]
    return "\n".join(lines)


def run(checkpoint, folder, text, *options, name="out"):
    """Draw; returns the table and the picture."""
    (folder / f"{name}.toml").write_text(text)
    steps = () if "num_steps" in text else ("--num-steps", "3")
    main([
        "--checkpoint", str(checkpoint), "--canvas", str(folder / f"{name}.toml"), "--out",
        str(folder / name), *steps, *options,
    ])  # fmt: skip
    table = json.loads((folder / name / "canvas.json").read_text())
    return table, np.asarray(Image.open(folder / name / "canvas.png")).astype(int)


def at(left, subject, top=0, **fields):
    key = "prompt" if isinstance(subject, str) else "class_label"
    return {"left": left, "top": top, key: subject, **fields}


def test_a_picture_its_places_and_all_that_was_used_are_written(of_prompts, tmp_path, capsys):
    text = toml(
        [at(0, FOX, guidance=3.0), at(16, HOUSE, weight=2, seed=5, negative_prompt="x")],
        width=48, height=32, kernel="quartic",
    )  # fmt: skip
    text += "\n[[rerolls]]\nleft = 4\ntop = 0\nwidth = 8\nheight = 8\nseed = 2\n"
    Image.new("RGB", (9, 9), "red").save(tmp_path / "guide.png")
    text += '[[images]]\nleft = 40\ntop = 0\nwidth = 8\nheight = 8\npath = "guide.png"\n'
    table, picture = run(of_prompts, tmp_path, text, "--guidance", "4", "--seed", "6")
    assert picture.shape == (32, 48, 3)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "canvas.png", "canvas.json", "regions.png",
    }  # fmt: skip
    assert (table["width"], table["height"], table["pixels_per_cell"]) == (48, 32, 1)
    settings = table["settings"]
    assert (settings["sampler"], settings["seed"], settings["guidance"]) == ("euler", 6, 4.0)
    first, second = table["regions"]
    shares = [region.pop("share") for region in (first, second)]
    assert sum(shares) == pytest.approx(1) and shares[1] > shares[0]
    same = {"top": 0, "width": 32, "height": 32, "kernel": "quartic"}
    assert first == {
        "name": "regions[0]", "left": 0, "prompt": FOX, "guidance": 3.0, "weight": 1.0,
        "seed": None, "negative_prompt": "", **same,
    }  # fmt: skip
    assert second == {
        "name": "regions[1]", "left": 16, "prompt": HOUSE, "guidance": 4.0, "weight": 2.0,
        "seed": 5, "negative_prompt": "x", **same,
    }  # fmt: skip
    assert table["rerolls"] == [
        {"left": 4, "top": 0, "width": 8, "height": 8, "seed": 2, "epsilon": None}
    ]
    assert table["images"][0]["strength"] == 0.8
    assert table["seams"]["ratio"] == table["seams"]["across"] / table["seams"]["inside"]
    assert "a canvas of 2 regions in " in capsys.readouterr().out


def test_one_region_is_the_image_that_is_drawn_without_a_canvas(of_classes, of_prompts, tmp_path):
    for name, checkpoint, subject, options in (
        ("classes", of_classes, 5, ("--class-labels", "5")),
        ("prompts", of_prompts, FOX, ("--prompt", FOX)),
    ):
        shared = ("--guidance", "2.5", "--seed", "3")
        text = toml([at(0, subject)], width=32, height=32)
        _, picture = run(checkpoint, tmp_path, text, *shared, name=name)
        out = tmp_path / f"{name}_plain"
        main([
            "--checkpoint", str(checkpoint), "--out", str(out), "--num-steps", "3",
            "--num-samples", "1", *options, *shared,
        ])  # fmt: skip
        (plain,) = out.glob("image*.png")
        assert np.array_equal(picture, np.asarray(Image.open(plain)))


def test_the_command_line_goes_before_the_file_and_that_before_the_run(tmp_path):
    checkpoint = save(
        tmp_path / "run", make_model(), "--sampling.guidance=3", "--sampling.num_steps=7",
        "--sampling.sampler=ddim", "--sampling.eta=0.5",
    )  # fmt: skip
    text = toml([at(0, 1)], width=32, height=32, num_steps=4, guidance=2, seed=9)
    table, _ = run(checkpoint, tmp_path, text, "--num-steps", "5", "--eta", "0")
    settings = table["settings"]
    assert (settings["num_steps"], settings["guidance"], settings["seed"]) == (5, 2.0, 9)
    assert (settings["sampler"], settings["eta"]) == ("ddim", 0.0)
    table, _ = run(checkpoint, tmp_path, text, "--seed", "8", "--guidance", "1", name="other")
    settings = table["settings"]
    assert (settings["num_steps"], settings["guidance"], settings["seed"]) == (4, 1.0, 8)
    assert table["regions"][0]["guidance"] == 1.0 and settings["eta"] == 0.5


def test_negative_prompts_are_those_of_the_regions(of_prompts, tmp_path):
    """Each region as on a canvas of its own; also where others are guided away from nothing."""

    def draw(name, *regions, width=32):
        text = toml(regions, width=width, height=32, seed=1, kernel="constant")
        return run(of_prompts, tmp_path, text, name=name)[1]

    looks = [
        dict(guidance=3.0), dict(guidance=3.0, negative_prompt=HOUSE),
        dict(guidance=3.0, negative_prompt="x"), dict(guidance=1.0),
    ]  # fmt: skip
    regions = [at(32 * i, FOX, seed=4, **look) for i, look in enumerate(looks)]
    together = draw("all", *regions, width=128)
    parts = [together[:, 32 * i : 32 * (i + 1)] for i in range(4)]
    for i, look in enumerate(looks):
        alone = draw(f"alone{i}", at(0, FOX, seed=4, **look))
        assert np.abs(parts[i] - alone).max() <= 1
        assert all(np.abs(parts[i] - other).max() > 1 for other in parts[:i])


def test_a_negative_prompt_of_the_command_line_is_for_regions_with_guidance(of_prompts, tmp_path):
    text = toml([at(0, FOX, guidance=3.0), at(32, FOX, guidance=1.0)], width=64, height=32)
    table, _ = run(of_prompts, tmp_path, text, "--guidance", "1", "--negative-prompt", "blurry")
    assert [region["negative_prompt"] for region in table["regions"]] == ["blurry", ""]


def test_latents_are_drawn_on_a_canvas_of_their_cells(tmp_path):
    vae = save_tiny_vae(tmp_path / "vae")
    model = make_model(in_channels=4)
    checkpoint = save(tmp_path / "run", model)
    config = json.loads((vae / "config.json").read_text())
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    assert config["latent_channels"] == 4 and factor > 1
    side = 32 * factor
    text = toml([at(0, 1), at(side // 2, 2)], width=side + side // 2, height=side)
    table, picture = run(checkpoint, tmp_path, text, "--vae", str(vae))
    assert picture.shape == (side, side + side // 2, 3) and table["pixels_per_cell"] == factor
    with pytest.raises(SystemExit):
        run(checkpoint, tmp_path, text.replace(f"left = {side // 2}", "left = 13"), "--vae",
            str(vae), name="off")  # fmt: skip


WRONG = [
    (("--prompt", "x"), "--prompt: the file of --canvas says what is drawn; leave it out."),
    (("--aspect-ratio", "4:3"), "--aspect-ratio: the file of --canvas says what is drawn"),
    (("--speak",), "--speak: the file of --canvas says what is drawn"),
    (("--num-samples", "2"), "--num-samples 2: there is one canvas; leave it out"),
    (("--batch-size", "0"), "--batch-size 0: must be at least 1."),
    (("--sampler", "ddpm"), "--sampler = 'ddpm': a model of kind flow is drawn from with euler."),
    (("--canvas", "nowhere.toml"), "--canvas nowhere.toml: cannot be read as text (No such file"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_one_message(options, message, of_prompts, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(of_prompts, tmp_path, toml([at(0, FOX)], width=32, height=32), *options)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


WRONG_FILES = [
    (toml([at(0, FOX)], width=32, height=32, sampler="ddim"),
     "out.toml: sampler = 'ddim': a model of kind flow is drawn from with euler."),
    (toml([at(0, FOX, guidance=1.0, negative_prompt="x")], width=32, height=32),
     "out.toml: regions[0].negative_prompt = 'x': there is no guidance away from it with "
     "FILE: regions[0].guidance = 1; set that to more"),
    (toml([at(0, FOX)], width=36, height=32), "out.toml: no region with a weight covers 128 of 36"),
    (toml([at(0, FOX, width=30)], width=32, height=32),
     "out.toml: regions[0].width = 30: must be a multiple of 4 pixels"),
    (toml([at(0, 3)], width=32, height=32), "out.toml: regions[0].class_label: the model draws"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WRONG_FILES)
def test_what_is_wrong_in_the_file_is_one_message(text, message, of_prompts, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(of_prompts, tmp_path, text)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message.replace("FILE", str(tmp_path / "out.toml")) in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_guidance_that_the_model_did_not_learn_is_refused_by_region(tmp_path, capsys):
    checkpoint = prompted.save(tmp_path / "run", TinyArgs(), "--objective.prompt_dropout=0")
    text = toml([at(0, FOX, guidance=1.0), at(32, FOX, guidance=2.0)], width=64, height=32)
    with pytest.raises(SystemExit):
        run(checkpoint, tmp_path, text)
    error = capsys.readouterr().err
    assert "out.toml: regions[1].guidance = 2.0: the model was trained with objective.prom" in error


def test_classes_that_the_model_does_not_have_are_refused(of_classes, tmp_path, capsys):
    for text, message in (
        (toml([at(0, 8)], width=32, height=32), "regions[0].class_label = 8: must be from 0 to 7."),
        (toml([at(0, 1, width=24)], width=32, height=32), "the model takes squares of 32 pixels"),
        (toml([at(0, 1)], width=32, height=32, num_steps=1001), "out.toml: num_steps = 1001: must"),
    ):
        with pytest.raises(SystemExit):
            run(of_classes, tmp_path, text)
        assert message in capsys.readouterr().err


def test_sides_are_multiples_of_all_patches_of_a_model():
    mixture = mixdiff_args["debugmodel_mmdit"]
    assert (mixture.patch_size, mixture.router_patch_size) == (4, 8)
    assert side_multiple(mixture) == 8
    assert side_multiple(replace(mixture, router="linear")) == 4
    assert side_multiple(mixdiff_args["debugmodel"]) == 0
    assert side_multiple(TinyArgs(patch_size=2)) == 2
    assert side_multiple(make_model().model_args) == 0


def test_a_model_that_diverged_is_said_in_one_line(tmp_path, capsys):
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(SystemExit):
        run(save(tmp_path / "run", model), tmp_path, toml([at(0, 1)], width=32, height=32))
    assert capsys.readouterr().err == (
        "error: the model's images are not finite (did the run diverge?).\n"
    )
    assert not (tmp_path / "out").exists()


def test_places_are_drawn_with_borders_where_regions_are():
    regions = (
        Region("first", Rectangle(0, 0, 16, 16), 1, 1.0),
        Region("second", Rectangle(8, 4, 16, 12), 2, 1.0),
    )
    picture = np.zeros((16, 24, 3), np.uint8)
    found = draw_places(picture, Canvas(24, 16, regions)).astype(int)
    assert found.shape == (256, 384, 3)
    red, green = np.array([0xE6, 0x19, 0x4B]), np.array([0x3C, 0xB4, 0x4B])
    assert (found[0, :256] == red).all() and (found[:, 255] == red).any(0).all()
    assert (found[4 * 16 + 2, 8 * 16 + 2 : 382] == green).all()
    assert (found[200, 300] == found[200, 310]).all(), "pale and empty elsewhere"
    assert 150 < found[200, 300].mean() < 200
