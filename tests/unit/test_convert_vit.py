"""`scripts/convert.py import-vit` and `export-vit`, with transformers as the oracle."""

from __future__ import annotations

import json
import runpy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from tests.checkpoints import save_tiny_mot
from tests.jobs import ROOT, TRAIN_CONFIGS, load_job
from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.checkpoint_loading import load_model
from torchtitan_mixtures.checkpoint_writing import write_weights
from torchtitan_mixtures.checks import check_data
from torchtitan_mixtures.models.mone.capacity import Budget
from torchtitan_mixtures.models.mone.dense_vit import dense_state, dense_twin, from_timm, to_timm
from torchtitan_mixtures.models.mone.dense_vit_config import check_timm
from torchtitan_mixtures.models.mone.model import MoNE

CONFIG = TRAIN_CONFIGS / "mone" / "debugmodel.toml"
CLASSES = 8  # groups of emoji
LARGEST = Budget((0, 0, 0, 64))


def convert(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["convert.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "convert.py"), run_name="__main__")


def fails(monkeypatch, capsys, *arguments):
    """Run a command that is to fail, and return its message."""
    with pytest.raises(SystemExit) as stop:
        convert(monkeypatch, *arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A ViT of transformers, and the folder it was saved to."""
    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=32,
        patch_size=4,
        num_labels=CLASSES,
    )
    model = randomise(ViTForImageClassification(config))
    folder = tmp_path_factory.mktemp("vit")
    model.save_pretrained(folder)
    return model, folder


def mone_job(flavor, *overrides):
    job = load_job(CONFIG, f"--model.flavor={flavor}", *overrides)
    return job, check_data(job)


def save_mone(folder, flavor):
    """Save a model of random weights as a checkpoint, and averages of zero beside them."""
    job, args = mone_job(flavor)
    model = randomise(MoNE(args))
    if args.is_nested:
        torch.nn.init.zeros_(model.router_scale.alpha)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    averages = {f"ema.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    write_weights(folder, job, args, state | averages)
    return model


def draw_images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1


def importing(source, out, *options, flavor="debugmodel_cls"):
    return ["import-vit", "--from", source, "--config", CONFIG, "--out", out,
            "--model.flavor", flavor, *options]  # fmt: skip


def exporting(source, out, *options, form="timm"):
    return ["export-vit", "--checkpoint", source, "--out", out, "--format", form, *options]


def weights_in(folder):
    return load_file(folder / "model.safetensors")


def copy_with(folder, target, **changes):
    """Copy a ViT's folder and change its config.json."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_a_vit_becomes_what_a_run_begins_with_and_a_vit_again(vit, tmp_path, monkeypatch, capsys):
    theirs, folder = vit
    out = tmp_path / "imported"
    convert(monkeypatch, *importing(folder, out))
    assert f"--model.flavor debugmodel_cls --checkpoint.initial_load_path {out}" in (
        capsys.readouterr().out
    )
    model, images = load_model(out).model, draw_images()
    with torch.no_grad():
        expected = theirs(images).logits
        scale = expected.abs().max()
        logits = model(images, LARGEST).logits
        torch.testing.assert_close(logits / scale, expected / scale, atol=1e-6, rtol=0)
    # The rest is as in a new model.
    assert model.router_scale.alpha.item() == 0
    assert 0 < model.routers["0"].weight.std() < 0.03
    # A run begins with it; with another flavour it does not.
    begin = f"--checkpoint.initial_load_path={out}"
    new = f"--job.dump_folder={tmp_path}/new"
    checkpoint_config.check_resume(*mone_job("debugmodel_cls", begin, new))
    with pytest.raises(ValueError, match="is a checkpoint of mone/debugmodel_cls"):
        checkpoint_config.check_resume(*mone_job("debugmodel", begin, new))

    back = tmp_path / "back"
    convert(monkeypatch, *exporting(out, back, form="huggingface"))
    assert "expert 3 as a dense ViT" in capsys.readouterr().out
    before, after = (weights_in(f) for f in (folder, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(back.glob("*.bin"))
    again = ViTForImageClassification.from_pretrained(back).eval()
    assert again.config.num_labels == CLASSES
    with torch.no_grad():
        assert torch.equal(again(images).logits, expected)


def test_a_sub_model_is_exported_with_all_that_timm_must_know(tmp_path, monkeypatch):
    nested = save_mone(tmp_path / "run", "debugmodel")
    convert(monkeypatch, *exporting(tmp_path / "run", tmp_path / "out", "--expert", 1, "--no-ema"))
    args = nested.model_args
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"] | {"global_pool": "avg", "class_token": False, "fc_norm": False,
                                   "num_heads": 4, "depth": 4} == config["model_args"]  # fmt: skip
    check_timm(config, args)
    dense = MoNE(dense_twin(args))
    dense.load_state_dict(from_timm(weights_in(tmp_path / "out"), args))
    images = draw_images()
    with torch.no_grad():
        expected = nested(images, Budget((0, 64, 0, 0))).logits
        torch.testing.assert_close(dense(images).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_average_of_the_parameters_is_exported_if_there_is_one(tmp_path, monkeypatch):
    nested = save_mone(tmp_path / "run", "debugmodel")
    convert(monkeypatch, *exporting(tmp_path / "run", tmp_path / "averages"))
    assert not any(tensor.any() for tensor in weights_in(tmp_path / "averages").values())
    convert(monkeypatch, *exporting(tmp_path / "run", tmp_path / "out", "--no-ema"))
    assert torch.equal(weights_in(tmp_path / "out")["norm.weight"], nested.norm.weight)


def test_a_vit_of_timm_is_imported_from_a_file_or_folder(tmp_path, monkeypatch, caplog):
    nested = save_mone(tmp_path / "run", "debugmodel")
    convert(monkeypatch, *exporting(tmp_path / "run", tmp_path / "vit", "--no-ema"))
    file = tmp_path / "alone" / "vit.safetensors"
    file.parent.mkdir()
    shutil.copy(tmp_path / "vit" / "model.safetensors", file)
    for number, source in enumerate((tmp_path / "vit", file)):
        caplog.clear()
        convert(
            monkeypatch, *importing(source, tmp_path / f"in{number}", flavor="debugmodel_dense")
        )
        assert ("taken for granted" in caplog.text) == (source == file)
        model = load_model(tmp_path / f"in{number}").model
        images = draw_images()
        with torch.no_grad():
            expected = nested(images, LARGEST).logits
            torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=1e-5)


def test_weights_in_several_files_and_in_half_precision_are_read(vit, tmp_path, monkeypatch):
    target = tmp_path / "vit"
    target.mkdir()
    shutil.copy(vit[1] / "config.json", target)
    weights = weights_in(vit[1])
    names = sorted(weights)
    parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in parts.items():
        save_file({name: weights[name].bfloat16() for name in part}, target / file)
    index = {name: file for file, part in parts.items() for name in part}
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    convert(monkeypatch, *importing(target, tmp_path / "out"))
    state = dict(load_model(tmp_path / "out").model.named_parameters())
    expected = weights["vit.layernorm.weight"].bfloat16().float()
    assert torch.equal(state["norm.weight"], expected)


def test_another_size_and_another_head_are_made_if_asked(vit, tmp_path, monkeypatch, capsys):
    more = "--multimodal.class_of", "concept", "--validation.no-enable"
    message = fails(monkeypatch, capsys, *importing(vit[1], tmp_path / "out", *more))
    assert "head has 8 classes" in message and "--new-head" in message
    message = fails(
        monkeypatch, capsys, *importing(vit[1], tmp_path / "out", "--multimodal.image_size", 64)
    )
    assert "positions of images of 32 pixels" in message and "--image-size 64" in message
    options = "--new-head", "--image-size", 64, *more
    convert(monkeypatch, *importing(vit[1], tmp_path / "out", *options))
    assert "--multimodal.image_size 64" in capsys.readouterr().out
    loaded = load_model(tmp_path / "out")
    assert loaded.model_args.num_classes > CLASSES and loaded.model_args.num_tokens == 256
    assert loaded.model.head.weight.count_nonzero() == 0
    assert loaded.model.embedder.positions.shape == (257, 128)


def test_what_makes_the_model_differ_from_the_vit_is_said(vit, tmp_path, monkeypatch, caplog):
    source = copy_with(vit[1], tmp_path / "vit")
    processor = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.5] * 3}
    (source / "preprocessor_config.json").write_text(json.dumps(processor))
    convert(monkeypatch, *importing(source, tmp_path / "out", "--nested.alpha_init", 0.5))
    assert "image_mean = [0.485, 0.456, 0.406]" in caplog.text
    assert "image_std" not in caplog.text
    assert "nested.alpha_init = 0.5" in caplog.text
    convert(monkeypatch, *exporting(tmp_path / "out", tmp_path / "back"))
    assert "alpha = 0.5" in caplog.text and "timm's ViTs have 1e-06" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu' (here 'gelu')"),
        ({"qkv_bias": False}, "qkv_bias = False (here True)"),
        ({"num_attention_heads": 8}, "num_attention_heads = 8 (here 4)"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps = 1e-05 (here 1e-12)"),
        ({"image_size": [32, 64]}, "image_size = [32, 64] (here squares)"),
        ({"model_type": "deit"}, "model_type = 'deit'"),
    ],
)
def test_a_vit_that_computes_something_else_is_refused(
    changes, message, vit, tmp_path, monkeypatch, capsys
):
    source = copy_with(vit[1], tmp_path / "vit", **changes)
    assert message in fails(monkeypatch, capsys, *importing(source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"global_pool": "token"}, "global_pool = 'token' (here 'avg')"),
        ({"model_args": {"num_heads": 8}, "global_pool": "avg"}, "num_heads = 8 (here 4)"),
        (
            {"model_args": {"global_pool": "avg", "qkv_bias": False, "swish": 1}},
            "qkv_bias = False (here True), swish = 1 (not known here)",
        ),
        ({"architecture": "vit_quickgelu", "global_pool": "avg"}, "'vit_quickgelu' (here gelu)"),
    ],
)
def test_a_vit_of_timm_that_computes_something_else_is_refused(
    config, message, tmp_path, monkeypatch, capsys
):
    args = mone_job("debugmodel")[1]
    state = {name: p.detach() for name, p in randomise(MoNE(args)).named_parameters()}
    weights = to_timm(dense_state(state, args, 3), args)
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = importing(tmp_path, tmp_path / "out", flavor="debugmodel")
    assert message in fails(monkeypatch, capsys, *command)


def test_a_flavour_of_other_sizes_is_refused_with_each_of_them(vit, tmp_path, monkeypatch, capsys):
    command = importing(vit[1], tmp_path / "out", flavor="S/16")
    message = fails(monkeypatch, capsys, *command)
    for part in ("hidden_size = 128 (here 384)", "num_hidden_layers = 4 (here 12)",
                 "patch_size = 4 (here 16)", "a class token for the head"):  # fmt: skip
        assert part in message
    alone = tmp_path / "alone" / "vit.safetensors"  # without config.json, the weights tell
    alone.parent.mkdir()
    shutil.copy(vit[1] / "model.safetensors", alone)
    command = importing(alone, tmp_path / "out", flavor="S/16-cls")
    message = fails(monkeypatch, capsys, *command)
    assert "dim = 128 (model: 384)" in message and "patch_size = 4 (model: 16)" in message


def test_what_cannot_be_imported_is_one_message(vit, tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "vit", tmp_path / "out"

    def message(source, *options, **more):
        return fails(monkeypatch, capsys, *importing(source, out, *options, **more))

    assert f"--from {folder}: no such file or folder" in message(folder)
    folder.mkdir()
    assert "no model.safetensors in the folder." in message(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin would have to be unpickled" in message(folder)
    assert "only safetensors files are read" in message(folder / "pytorch_model.bin")
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert "cannot be read" in message(folder)
    save_file({"conv1.weight": torch.zeros(1)}, folder / "model.safetensors")
    assert "not a ViT of transformers or timm; it has conv1.weight" in message(folder)
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in message(folder)
    other = ["import-vit", "--from", vit[1], "--out", out, "--config",
             TRAIN_CONFIGS / "mom" / "debugmodel.toml"]  # fmt: skip
    assert "model.name = 'mom'" in fails(monkeypatch, capsys, *other)
    assert "is not a flavour of 'mone'" in message(vit[1], flavor="nothing")
    full = importing(vit[1], tmp_path)
    assert f"--out {tmp_path}: exists and is not an empty folder" in fails(
        monkeypatch, capsys, *full
    )
    assert not out.exists()


def test_what_cannot_be_exported_is_one_message(tmp_path, monkeypatch, capsys):
    save_mone(tmp_path / "run", "debugmodel")
    save_mone(tmp_path / "cls", "debugmodel_cls")
    save_tiny_mot(tmp_path / "mot")
    out = tmp_path / "out"

    def message(source, *options, **more):
        return fails(monkeypatch, capsys, *exporting(tmp_path / source, out, *options, **more))

    assert "--expert 4: the model has 4, numbered from 0" in message("run", "--expert", 4)
    assert "--expert -1" in message("run", "--expert", -1)
    assert "class token always has the largest expert" in message("cls", "--expert", 2)
    assert "reads a class token" in message("run", form="huggingface")
    assert "a checkpoint of mot; only those of mone" in message("mot")
    assert "no such folder" in message("nothing")
    assert "unrecognized arguments: --more" in message("run", "--more")
    assert not out.exists()
    out.mkdir()
    (out / "file").touch()
    assert "exists and is not an empty folder" in message("run")
