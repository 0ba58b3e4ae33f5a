"""`scripts/convert.py import-sd3` and `export-sd3`, with diffusers as the oracle."""

from __future__ import annotations

import json
import runpy
import shutil
import sys

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from tests.checkpoints import save_tiny_mot
from tests.jobs import ROOT, TRAIN_CONFIGS, load_job
from tests.unit.models.mmdit.sd3_oracle import make_theirs, run_both
from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.checkpoint_loading import load_model
from torchtitan_mixtures.checkpoint_writing import write_weights
from torchtitan_mixtures.checks import check_data
from torchtitan_mixtures.models.mmdit import sd3
from torchtitan_mixtures.models.mmdit.model import MMDiTDenoiser

CONFIG = TRAIN_CONFIGS / "mmdit" / "debugmodel.toml"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def convert(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["convert.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "convert.py"), run_name="__main__")


def fails(monkeypatch, capsys, *arguments):
    """Run a command that is to fail, and return its message."""
    with pytest.raises(SystemExit) as stop:
        convert(monkeypatch, *arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a text encoder, of which nothing but the sizes is read."""
    folder = tmp_path_factory.mktemp("encoder")
    config = {
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_size": 24,
        "projection_dim": 12,
        "max_position_embeddings": 7,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def saved(encoder, tmp_path_factory):
    """A transformer of diffusers with the sizes of the debug flavour, and a pipeline with it."""
    args = debug_job(encoder)[1]
    assert args.qk_norm == "shared"
    side = args.image_size // args.patch_size
    theirs = make_theirs(
        std=0.05,
        sample_size=args.patch_size * (args.position_grid or side),
        pos_embed_max_size=side,
        patch_size=args.patch_size,
        in_channels=args.in_channels,
        out_channels=None,
        num_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        attention_head_dim=args.dim // args.n_heads,
        caption_projection_dim=args.dim,
        qk_norm="rms_norm",
    )
    pipeline = tmp_path_factory.mktemp("pipeline")
    (pipeline / "model_index.json").write_text("{}")
    theirs.save_pretrained(pipeline / "transformer")
    return theirs, pipeline


def debug_job(encoder, *overrides):
    job = load_job(CONFIG, "--multimodal.text_encoders", str(encoder), *overrides)
    return job, check_data(job)


def importing(source, out, encoder, *options):
    return ["import-sd3", "--from", source, "--config", CONFIG, "--out", out,
            "--multimodal.text_encoders", encoder, *options]  # fmt: skip


def copy_with(folder, target, **changes):
    """Copy a transformer's folder and change its config.json."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_a_pipeline_becomes_what_a_run_begins_with_and_a_transformer_again(
    saved, encoder, tmp_path, monkeypatch, capsys
):
    theirs, pipeline = saved
    out, back = tmp_path / "imported", tmp_path / "back"
    convert(monkeypatch, *importing(pipeline, out, encoder))
    printed = capsys.readouterr().out
    assert f"--multimodal.text_encoders {encoder} --checkpoint.initial_load_path {out}" in printed
    ours = load_model(out).model
    with torch.no_grad():
        expected, found = run_both(theirs, ours, 32, 16, torch.tensor([0.0, 500.0, 1000.0]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    begin = f"--checkpoint.initial_load_path={out}"
    checkpoint_config.check_resume(*debug_job(encoder, begin, f"--job.dump_folder={tmp_path}/new"))

    convert(monkeypatch, "export-sd3", "--checkpoint", out, "--out", back)
    assert "SD3Transformer2DModel.from_pretrained" in capsys.readouterr().out
    before, after = (load_file(f / WEIGHTS) for f in (pipeline / "transformer", back))
    assert before.keys() == after.keys()
    del after[sd3.POSITIONS]  # another excerpt of the same
    assert all(torch.equal(before[name], after[name]) for name in after)
    again = SD3Transformer2DModel.from_pretrained(back).eval()
    with torch.no_grad():
        expected, _ = run_both(again, ours, 32, 16, torch.tensor([0.0, 500.0, 1000.0]))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        expected, found = run_both(again, ours, 64, 40, torch.tensor([0.0, 500.0, 1000.0]))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    convert(monkeypatch, *importing(back, tmp_path / "again", encoder))
    state, other = (dict(load_model(f).model.named_parameters()) for f in (out, tmp_path / "again"))
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_weights_in_several_files_and_in_half_precision_are_read_without_diffusers(
    saved, encoder, tmp_path, monkeypatch
):
    source, target = saved[1] / "transformer", tmp_path / "transformer"
    target.mkdir()
    shutil.copy(source / "config.json", target)
    weights = load_file(source / WEIGHTS)
    parts = {"a.safetensors": sorted(weights)[:20], "b.safetensors": sorted(weights)[20:]}
    for file, names in parts.items():
        save_file({name: weights[name].bfloat16() for name in names}, target / file)
    index = {name: file for file, names in parts.items() for name in names}
    (target / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it fails
    convert(monkeypatch, *importing(target, tmp_path / "out", encoder))
    state = dict(load_model(tmp_path / "out").model.named_parameters())
    assert torch.equal(
        state["final_layer.linear.weight"], weights["proj_out.weight"].bfloat16().float()
    )


def test_the_average_of_the_parameters_is_exported_if_there_is_one(encoder, tmp_path, monkeypatch):
    job, args = debug_job(encoder)
    state = {name: torch.ones(p.shape) for name, p in MMDiTDenoiser(args).named_parameters()}
    averages = {f"ema.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    write_weights(tmp_path / "run", job, args, state | averages)
    for name, options, value in (("averages", (), 0), ("out", ("--no-ema",), 1)):
        convert(monkeypatch, "export-sd3", "--checkpoint", tmp_path / "run", "--out",
                tmp_path / name, *options)  # fmt: skip
        weights = load_file(tmp_path / name / WEIGHTS)
        del weights[sd3.POSITIONS]
        assert all((tensor == value).all() for tensor in weights.values())


def test_another_objective_is_warned_of(saved, encoder, tmp_path, monkeypatch, caplog):
    options = ("--objective.kind", "ddpm", "--objective.time_density", "uniform",
               "--objective.no-learned_variance")  # fmt: skip
    convert(monkeypatch, *importing(saved[1], tmp_path / "out", encoder, *options))
    assert "objective.kind = 'ddpm': Stable Diffusion 3 predicts the velocity" in caplog.text


def test_what_cannot_be_converted_is_one_message(saved, encoder, tmp_path, monkeypatch, capsys):
    folder, out, whole = tmp_path / "model", tmp_path / "out", saved[1] / "transformer"

    def message(source, *options):
        return fails(monkeypatch, capsys, *importing(source, out, encoder, *options))

    assert f"--from {folder}: there is no" in message(folder)
    copy_with(whole, folder, dual_attention_layers=[0])
    assert "Stable Diffusion 3.5 medium" in message(folder)
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in message(folder)
    shutil.copy(whole / "config.json", folder)
    (folder / WEIGHTS).write_bytes(b"no weights")
    assert "cannot be read" in message(folder) and "cannot be read" in message(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    assert "diffusion_pytorch_model.bin would have to be unpickled" in message(folder)
    assert "pickled ones can run code" in message(folder / "diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.bin").unlink()
    assert f"no {WEIGHTS} in the folder." in message(folder)
    other = ["import-sd3", "--from", whole, "--out", out, "--config",
             TRAIN_CONFIGS / "mom" / "debugmodel.toml"]  # fmt: skip
    assert "model.name = 'mom'" in fails(monkeypatch, capsys, *other)
    tokens = ["import-sd3", "--from", whole, "--out", out, "--config", CONFIG]
    assert "multimodal.text_encoders or text_embeddings" in fails(monkeypatch, capsys, *tokens)
    save_tiny_mot(tmp_path / "mot")
    exporting = ["export-sd3", "--checkpoint", tmp_path / "mot", "--out", out]
    assert "a checkpoint of mot; only those of mmdit" in fails(monkeypatch, capsys, *exporting)
    assert not out.exists()
    full = importing(whole, tmp_path, encoder)
    assert "exists and is not an empty folder" in fails(monkeypatch, capsys, *full)
