"""`scripts/sample.py` and `scripts/convert.py` with checkpoints of models of images."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

from tests.jobs import ROOT, debug_job
from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.checkpoint_loading import load_model
from torchtitan_mixtures.checks import check_job
from torchtitan_mixtures.models.mom.args import MoMModelArgs
from torchtitan_mixtures.models.mom.model import MoM
from torchtitan_mixtures.objectives.denoising import build_process
from torchtitan_mixtures.sampling.command import main
from torchtitan_mixtures.sampling.conditions import class_condition
from torchtitan_mixtures.sampling.images import check_image_settings, draw_images, make_denoiser

SMALL = dict(dim=16, n_layers=2, in_channels=3, num_classes=8, patch_size=8, init_seed=0)


def make_model(seed=0, **fields):
    """A model whose branches and head count."""
    model = MoM(MoMModelArgs(**{**SMALL, **fields}))
    model.init_weights()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def save(folder, model, *overrides, averaged=None):
    step = folder / "checkpoint" / "step-7"
    job = debug_job("mom", "--ema.decay=0.5", *overrides)
    checkpoint_config.write(step, job, model.model_args)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if averaged is not None:
        state |= {f"ema.{name}": p.detach() for name, p in averaged.named_parameters()}
    dcp.save(state, checkpoint_id=step, no_dist=True)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return save(folder, make_model(1), averaged=make_model(2))


def sample(checkpoint, out, *options):
    main(["--ckpt", str(checkpoint), "--out", str(out), "--num-sampling-steps", "3", *options])
    return json.loads((out / "samples.json").read_text())


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("image*.png"))}


def test_a_grid_a_png_for_each_image_and_a_table_are_written(checkpoint, tmp_path):
    out = tmp_path / "out"
    table = sample(
        checkpoint, out, "--model", "debugmodel", "--class-labels", "3", "5", "--num-samples", "2",
        "--cfg-scale", "1.5", "--seed", "4",
    )  # fmt: skip
    assert [entry["class"] for entry in table["samples"]] == [3, 3, 5, 5]
    assert all((out / entry["file"]).is_file() for entry in table["samples"])
    assert table["averaged"] and table["settings"]["guidance"] == 1.5
    assert table["settings"]["sampler"] == "ddpm" and table["settings"]["num_steps"] == 3
    assert Image.open(out / "grid.png").size[0] > 2 * 96
    assert {image.shape for image in pixels(out).values()} == {(32, 32, 3)}


def test_an_image_depends_on_its_number_and_the_seed_not_on_the_batch(checkpoint, tmp_path):
    options = ("--class-labels", "0", "1", "--num-samples", "3", "--cfg-scale", "2")
    sample(checkpoint, tmp_path / "whole", *options)
    sample(checkpoint, tmp_path / "cut", *options, "--batch-size", "2")
    sample(checkpoint, tmp_path / "other", *options, "--seed", "1")
    whole, cut, other = (pixels(tmp_path / name) for name in ("whole", "cut", "other"))
    for name, image in whole.items():
        assert np.abs(image.astype(int) - cut[name]).max() <= 1  # a rounding of batched products
        assert (image != other[name]).any()


def test_what_is_not_said_is_as_in_the_sampling_of_the_run(tmp_path):
    run = save(
        tmp_path / "run", make_model(), "--sampling.sampler=ddim", "--sampling.guidance=3",
        "--sampling.num_steps=7", "--sampling.eta=0.5", "--sampling.guided_channels=2",
    )  # fmt: skip
    main(["--ckpt", str(run), "--out", str(tmp_path / "out"), "--no-ema", "--eta", "0.25"])
    settings = json.loads((tmp_path / "out" / "samples.json").read_text())["settings"]
    assert settings == {
        "sampler": "ddim", "num_steps": 7, "eta": 0.25, "guidance": 3.0, "guided_channels": 2,
        "seed": 0, "shift": 0.0, "routing": "step",
    }  # fmt: skip


def test_the_average_is_drawn_from_unless_told_otherwise(checkpoint, tmp_path):
    averaged, raw = load_model(checkpoint), load_model(checkpoint, averaged=False)
    assert averaged.is_averaged and not raw.is_averaged
    for loaded, seed in ((averaged, 2), (raw, 1)):
        expected = dict(make_model(seed).named_parameters())
        assert all(torch.equal(p, expected[n]) for n, p in loaded.model.named_parameters())
    assert not sample(checkpoint, tmp_path / "raw", "--no-ema")["averaged"]


def test_an_average_that_the_checkpoint_lacks_is_said(tmp_path, capsys):
    options = ("--class-labels", "1", "--num-samples", "1")
    without = save(tmp_path / "run", make_model())
    assert not sample(without, tmp_path / "out", *options)["averaged"]
    said = capsys.readouterr().out
    assert "step-7 has no average (ema.decay = 0.5): drawn from weights.\n" in said
    sample(without, tmp_path / "no_ema", *options, "--no-ema")
    never = save(tmp_path / "never", make_model(), "--ema.decay=0")
    sample(never, tmp_path / "other", *options)
    assert "has no average" not in capsys.readouterr().out


WRONG = [
    (("--class-labels", "8"), "--class-labels 8: must be from 0 to 7."),
    (("--class-labels", "-1"), "--class-labels -1: must be from 0 to 7."),
    (("--model", "MoM-S/4"), "--model MoM-S/4: "),
    (("--prompt", "a fox"), "--prompt: "),
    (("--negative-prompt", "a fox"), "--negative-prompt: "),
    (("--aspect-ratio", "4:3"), "--aspect-ratio: "),
    (("--speak",), "--speak: "),
    (("--shift", "2"), "--shift = 2.0: a model of kind ddpm has no times that could be shifted"),
    (("--shift", "-1"), "--shift = -1.0: must be a finite number > 0 (0 = as trained)"),
    (("--sampler", "euler"), "--sampler = 'euler': a model of kind ddpm is drawn from with ddpm"),
    (("--num-steps", "1001"), "--num-steps = 1001: must be at most 1000"),
    (("--num-steps", "0"), "--num-steps = 0: must be 1 or more"),
    (("--eta", "2"), "--eta = 2.0: must be from 0 to 1"),
    (("--guided-channels", "4"), "--guided-channels = 4: must be from 0 (all) to 3"),
    (("--num-samples", "0"), "--num-samples 0: must be at least 1."),
    (("--num-samples", "10001"), "--num-samples 10001: must be at most 10,000."),
    (("--guidance", "1e40"), "--guidance = 1e+40: must be from 0 to 1000"),
    (("--guidance", "nan"), "--guidance = nan: must be from 0 to 1000"),
    (("--seed", "-1"), "--seed = -1: must be 0 or more"),
    (("--vae", "nowhere"), "nowhere"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_one_message(options, message, checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--ckpt", str(checkpoint), "--out", str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_checkpoint_that_diverged_is_said_in_one_line(tmp_path, capsys):
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(SystemExit) as stop:
        sample(save(tmp_path / "run", model), tmp_path / "out", "--no-ema")
    assert stop.value.code == 2
    message = "error: the model's images are not finite (did the run diverge?).\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "out").exists()


def test_finished_batches_are_kept_when_a_later_one_fails(checkpoint, tmp_path, monkeypatch):
    def fail_in_the_second_batch(model, args, process, labels, numbers, **options):
        if 3 in numbers:
            raise KeyboardInterrupt
        return draw_images(model, args, process, labels, numbers, **options)

    monkeypatch.setattr(
        "torchtitan_mixtures.sampling.image_command.draw_images", fail_in_the_second_batch
    )
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        sample(checkpoint, out, "--class-labels", "5", "--batch-size=3")
    assert sorted(path.name for path in out.iterdir()) == [
        f"image{number:04}_class0005.png" for number in range(3)
    ]


def test_guidance_of_a_model_without_null_class_is_refused(tmp_path, capsys):
    run = save(tmp_path / "run", make_model(), "--objective.class_dropout=0")
    with pytest.raises(SystemExit):
        main(["--ckpt", str(run), "--out", str(tmp_path / "out"), "--cfg-scale", "2"])
    assert "objective.class_dropout = 0 and does not know" in capsys.readouterr().err
    job = debug_job(
        "mom", "--objective.class_dropout=0", "--sampling.interval=5", "--sampling.guidance=2"
    )
    with pytest.raises(ValueError, match=r"^sampling.guidance = 2.0: the model was trained with"):
        check_job(job)


def test_a_flow_model_is_drawn_from_with_euler(tmp_path):
    flow = save(tmp_path / "run", make_model(learned_variance=False), "--objective.kind=flow")
    options = ("--class-labels", "1", "--num-samples", "1", "--no-ema")
    table = sample(flow, tmp_path / "out", *options)
    assert (table["settings"]["sampler"], table["settings"]["shift"]) == ("euler", 1.0)
    shifted = sample(flow, tmp_path / "shifted", *options, "--shift", "3")
    assert shifted["settings"]["shift"] == 3.0
    (first,), (second,) = (pixels(tmp_path / name).values() for name in ("out", "shifted"))
    assert (first != second).any()


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_guidance_is_that_of_two_predictions(kind):
    job = debug_job("mom", f"--objective.kind={kind}")
    model = make_model(learned_variance=kind == "ddpm").eval()
    args, process = model.model_args, build_process(job.objective, 3)
    job.sampling.guidance, job.sampling.guided_channels = 3.0, 2
    settings = check_image_settings(job.sampling, process, args, 0.1)
    latents, times = torch.randn(2, 3, 32, 32), torch.tensor([10.0, 10.0])
    labels = class_condition([1, 4], 8, "cpu")
    with torch.no_grad():
        guided = make_denoiser(model, args, labels, settings)(latents, times)
        settings = check_image_settings(debug_job("mom").sampling, process, args, 0.1)
        object.__setattr__(settings, "guidance", 1.0)
        conditional = make_denoiser(model, args, labels, settings)(latents, times)
        nothing = class_condition([8, 8], 8, "cpu")
        null = make_denoiser(model, args, nothing, settings)(latents, times)
    expected = conditional.clone()
    expected[:, :2] = null[:, :2] + 3 * (conditional - null)[:, :2]
    torch.testing.assert_close(guided, expected)


def test_every_sampler_of_the_settings_is_used():
    job, model = debug_job("mom"), make_model().eval()
    process = build_process(job.objective, 3)
    drawn = {}
    for name, eta in (("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)):
        job.sampling.sampler, job.sampling.eta, job.sampling.num_steps = name, eta, 4
        settings = check_image_settings(job.sampling, process, model.model_args, 0.1)
        drawn[name, eta] = draw_images(
            model, model.model_args, process, [1, 2], [0, 1], settings, "cpu"
        )
    images = list(drawn.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def convert(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "convert.py"), run_name="__main__")


def test_a_checkpoint_is_resized_and_loads_at_another_resolution(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "resized"
    convert(monkeypatch, "resize", "--checkpoint", checkpoint, "--image-size", 64, "--out", out)
    loaded, before = load_model(out), load_model(checkpoint)
    assert loaded.model_args.image_size == 64 and loaded.model_args.num_tokens == 64
    weights = dict(loaded.model.named_parameters())
    resized = [n for n, p in before.model.named_parameters() if p.shape != weights[n].shape]
    assert resized and all("token_mixers" in name for name in resized)
    for name, parameter in before.model.named_parameters():
        if name not in resized:
            assert torch.equal(parameter, weights[name])
    # A run at 64 px goes on from it; from the checkpoint as it was it does not.
    job = debug_job(
        "mom", "--multimodal.image_size=64", f"--job.dump_folder={tmp_path}/new",
        f"--checkpoint.initial_load_path={out}",
    )  # fmt: skip
    monkeypatch.setattr(
        checkpoint_config, "parameter_shapes", lambda *_: checkpoint_config.read(out)["parameters"]
    )
    fields = checkpoint_config.read(out)["model_args"]
    args = MoMModelArgs(**fields)
    checkpoint_config.check_resume(job, args)
    job.checkpoint.initial_load_path = str(checkpoint / "checkpoint" / "step-7")
    with pytest.raises(ValueError, match=r"token_mixers.* scripts/convert.py resize"):
        checkpoint_config.check_resume(job, args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--image-size", "33"), "multimodal.image_size = 33"),
        (("--out", "."), "--out .: exists and is not an empty folder"),
    ],
)
def test_what_cannot_be_resized_is_one_message(
    options, message, checkpoint, tmp_path, monkeypatch, capsys
):
    defaults = ["--image-size", 64, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        convert(monkeypatch, "resize", "--checkpoint", checkpoint, *defaults, *options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
