"""Who draws what: shared weights, weights that are kept, and the trace of both."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints import save_tiny_mixdiff
from tests.jobs import debug_job
from tests.unit.models.mixdiff.helpers import make_model
from torchtitan_mixtures.models.mixdiff import mixdiff_args
from torchtitan_mixtures.objectives.ddpm import DDPM
from torchtitan_mixtures.sampling.command import main
from torchtitan_mixtures.sampling.conditions import class_condition
from torchtitan_mixtures.sampling.images import ImageSettings, draw_images, make_denoiser
from torchtitan_mixtures.sampling.images_during_training import build_image_sampler
from torchtitan_mixtures.sampling.routing import RoutingTrace


def draw_twice(guidance=1.0, routing="step", **fields):
    """Two calls of a denoiser at different times; its results, the trace and the model."""
    model = make_model(dtype=torch.float32, **fields)
    args = model.model_args
    settings = ImageSettings("ddim", 2, 0.0, guidance, 0, 0, routing=routing)
    trace = RoutingTrace(args.names)
    condition = class_condition([1, 2, 3], args.num_classes, "cpu")
    denoiser = make_denoiser(model, args, condition, settings, trace=trace)
    latents = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    calls = []
    model.router.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        results = [denoiser(latents, torch.full((3,), time)) for time in (900.0, 100.0)]
    return model, condition, latents, results, trace, len(calls)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_trace_has_the_weights_of_each_step_of_the_told_half(guidance):
    model, condition, latents, _, trace, calls = draw_twice(guidance)
    assert calls == 2 and [time for time, _ in trace.steps] == [900.0, 100.0]
    for time, gates in trace.steps:
        with torch.no_grad():
            expected = model(latents, torch.full((3,), time), **condition.given).gates
        torch.testing.assert_close(gates, expected)
    assert not torch.equal(trace.steps[0][1], trace.steps[1][1])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_weights_can_be_those_of_the_first_step_for_all(guidance):
    *_, trace, calls = draw_twice(guidance, "once")
    assert calls == 1
    assert torch.equal(trace.steps[0][1], trace.steps[1][1])


def test_a_router_that_reads_the_prompt_alone_is_asked_once():
    *_, results, _, calls = draw_twice(router_inputs=("prompt",))
    assert calls == 1 and len(results) == 2


def test_images_of_a_trace_are_in_the_order_they_were_drawn():
    trace = RoutingTrace(["a", "b"])
    for batch in (2, 1):
        for step in range(3):
            gates = torch.stack([torch.tensor([10.0 * batch + step, n]) for n in range(batch)])
            trace.steps.append((100.0 * step, gates))
    times, weights = trace.table([2, 1])
    assert times == [0.0, 100.0, 200.0] and weights.shape == (3, 3, 2)
    assert weights[:, :, 0].tolist() == [[20, 21, 22], [20, 21, 22], [10, 11, 12]]
    assert weights[1, 0].tolist() == [20, 1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_tiny_mixdiff(folder)
    return folder


def sample(checkpoint, out, *options):
    main(["--checkpoint", str(checkpoint), "--out", str(out), "--num-steps", "3", *options])
    return json.loads((out / "routing.json").read_text())


def test_the_command_writes_who_was_used_when(checkpoint, tmp_path, capsys):
    options = ("--class-labels", "0", "5", "--num-samples", "2", "--batch-size", "3")
    table = sample(checkpoint, tmp_path / "a", *options)
    assert table["experts"] == ["noto", "noto_v1", "fluent"]
    assert len(table["times"]) == 3 and table["times"] == sorted(table["times"], reverse=True)
    assert [image["number"] for image in table["images"]] == [0, 1, 2, 3]
    assert table["images"][2]["subject"] == table["images"][3]["subject"]
    weights = np.array([image["weights"] for image in table["images"]])
    assert weights.shape == (4, 3, 3)
    assert np.allclose(weights.sum(2), 1, atol=1e-5) and ((weights > 0).sum(2) == 2).all()
    assert Image.open(tmp_path / "a" / "routing.png").width == 2 * 400
    assert "Weights of the experts: noto" in capsys.readouterr().out
    alone = sample(checkpoint, tmp_path / "b", *options[:-1], "1")
    assert np.allclose(weights, [image["weights"] for image in alone["images"]], atol=1e-5)


def test_the_command_keeps_the_first_weights_if_told_to(checkpoint, tmp_path):
    table = sample(checkpoint, tmp_path / "a", "--class-labels", "0", "--routing", "once")
    weights = np.array([image["weights"] for image in table["images"]])
    assert (weights == weights[:, :1]).all()
    settings = json.loads((tmp_path / "a" / "samples.json").read_text())["settings"]
    assert settings["routing"] == "once"


def test_as_many_prompts_as_images_are_needed():
    model = make_model(dtype=torch.float32)
    args = model.model_args
    settings = ImageSettings("ddim", 2, 0.0, 1.0, 0, 0)
    for subjects in ([1, 2], class_condition([1, 2], args.num_classes, "cpu")):
        with pytest.raises(ValueError, match="2 conditions for 3 images: give one for each"):
            draw_images(model, args, DDPM(channels=3), subjects, [0, 1, 2], settings, "cpu")


CANVAS = """
width = 48
height = 32
num_steps = 2

[[regions]]
left = 0
top = 0
class_label = 3

[[regions]]
left = 16
top = 0
class_label = 9
guidance = 2.0
"""


def test_a_canvas_says_who_drew_its_regions(checkpoint, tmp_path):
    (tmp_path / "canvas.toml").write_text(CANVAS)
    out = tmp_path / "out"
    main(
        [
            "--checkpoint",
            str(checkpoint),
            "--canvas",
            str(tmp_path / "canvas.toml"),
            "--out",
            str(out),
        ]
    )
    table = json.loads((out / "routing.json").read_text())
    assert [image["subject"] for image in table["images"]] == ["regions[0] 3", "regions[1] 9"]
    weights = np.array([image["weights"] for image in table["images"]])
    assert weights.shape == (2, 2, 3) and np.allclose(weights.sum(2), 1, atol=1e-5)
    assert not np.allclose(weights[0], weights[1])
    assert Image.open(out / "routing.png").width == 2 * 400


def test_a_router_alone_draws_nothing_and_says_so(tmp_path, capsys):
    save_tiny_mixdiff(tmp_path / "run", "--diffusers.training=router")
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(tmp_path / "run"), "--class-labels", "0"])
    assert "is a router without experts" in capsys.readouterr().err
    job = debug_job("mixdiff", "--diffusers.training=router", "--sampling.interval=2")
    args = mixdiff_args["debugmodel"]
    args.update_from_config(job)
    assert build_image_sampler(job, args, None) is None
