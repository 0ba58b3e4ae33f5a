"""The loss of a denoising model by noise level, and the command that reports it."""

import importlib.util
import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.jobs import ROOT, debug_job
from tests.unit.data.image_jobs import make_job, write_folder
from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.checkpoint_loading import load_model
from torchtitan_mixtures.data import image_data
from torchtitan_mixtures.evaluation.denoising import level_losses, splits_of, summarise
from torchtitan_mixtures.models.mom.args import MoMModelArgs
from torchtitan_mixtures.models.mom.model import MoM
from torchtitan_mixtures.objectives.denoising import build_denoising_loss
from torchtitan_mixtures.validate_denoising import build_denoising_validator

SMALL = (
    "--validation.local_batch_size=64",
    "--validation.steps=3",
    "--objective.validation_levels=3",
    "--multimodal.validation_splits=unseen_style",
)


@pytest.fixture(scope="module")
def command():
    """`scripts/evaluate.py` as a module."""
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "scripts" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_tiny_mom(run, *overrides):
    job = debug_job("mom", *SMALL, *overrides)
    args = MoMModelArgs(dim=16, n_layers=1, n_heads=2, mixer="attention")
    args.update_from_config(job)
    torch.manual_seed(0)
    model = MoM(args)
    with torch.no_grad():
        model.init_weights()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # as it begins, its output is zero
    folder = run / "checkpoint" / "step-20"
    checkpoint_config.write(folder, job, args)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dcp.save(weights, checkpoint_id=folder, no_dist=True)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_tiny_mom(tmp_path_factory.mktemp("run"))


def test_losses_are_those_that_validation_logs(run):
    loaded = load_model(run)
    found = summarise(level_losses(loaded, "unseen_style", 3))
    logged = {}
    dims = SimpleNamespace(
        cp_enabled=False,
        dp_cp_enabled=False,
        pp_enabled=False,
        world_mesh=SimpleNamespace(device_type="cpu"),
    )
    validator = build_denoising_validator(
        job_config=loaded.job_config,
        dp_world_size=1,
        dp_rank=0,
        parallel_dims=dims,
        loss_fn=build_denoising_loss(loaded.job_config),
        validation_context=nullcontext,
        maybe_enable_amp=nullcontext(),
        metrics_processor=SimpleNamespace(
            log_validation=lambda **scalars: logged.update(scalars),
            restart_clock=lambda step: None,
        ),
    )
    validator.validate([loaded.model], 20)
    assert found["images"] == 146  # the last batch has padding, which is none
    assert found["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    assert {level: row["loss"] for level, row in found["levels"].items()} == pytest.approx(
        {level: loss for level, (loss, _) in logged["losses"].items()}, rel=1e-6
    )


def test_a_limit_takes_the_first_batches_and_leaves_the_configuration_alone(run):
    loaded = load_model(run)
    whole = level_losses(loaded, "unseen_style")
    first = level_losses(loaded, "unseen_style", 1)
    assert torch.equal(first, whole[:64])
    assert loaded.job_config.validation.steps == 3


def test_a_summary_has_means_and_their_standard_errors():
    found = summarise(torch.tensor([[1.0, 3.0], [2.0, 8.0], [3.0, 4.0]], dtype=torch.float64))
    assert (found["images"], found["loss"]) == (3, 3.5)
    means = [2.0, 5.0, 3.5]
    variance = sum((mean - 3.5) ** 2 for mean in means) / 2
    assert found["standard_error"] == pytest.approx((variance / 3) ** 0.5)
    assert list(found["levels"]) == ["0.25", "0.75"]
    assert found["levels"]["0.25"] == pytest.approx({"loss": 2.0, "standard_error": 3**-0.5})
    assert summarise(torch.ones(1, 2))["standard_error"] is None


def test_the_command_prints_a_table_and_writes_json(run, tmp_path, command, capsys):
    out = tmp_path / "report.json"
    options = ["--splits", "unseen_style", "unseen_concept", "--max-batches=1", "--device=cpu"]
    command.main([f"--checkpoint={run}", f"--json={out}", *options])
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert (report["family"], report["step"], report["averaged"]) == ("mom", 20, False)
    style, concept = (report["splits"][split] for split in ("unseen_style", "unseen_concept"))
    assert (style["images"], concept["images"]) == (64, 64)
    assert list(style["levels"]) == ["0.1667", "0.5", "0.8333"]
    assert "| noise level | unseen_style, 64 images | unseen_concept, 64 images |" in printed
    cells = [f"{found['loss']:.4f} +- {found['standard_error']:.4f}" for found in (style, concept)]
    assert f"| mean | {cells[0]} | {cells[1]} |" in printed


def test_all_splits_that_have_the_models_classes_are_evaluated(run, tmp_path):
    loaded = load_model(run)
    assert splits_of(loaded, []) == ["train", "unseen_concept", "unseen_style"]
    assert splits_of(loaded, ["train", "train"]) == ["train"]
    loaded.job_config.multimodal.class_of = "concept"
    assert splits_of(loaded, []) == ["train", "unseen_style"]


def test_all_splits_of_a_folder_are_those_that_it_has(tmp_path):
    write_folder(tmp_path / "train", count=1)
    write_folder(tmp_path / "val", count=1)
    write_folder(tmp_path / "others", count=1, classes=("cow",))  # which the model does not know
    job = make_job(source="folder", path=str(tmp_path), image_size=8)
    assert job.multimodal.validation_splits == ["unseen_concept", "unseen_style"]  # validation off
    assert splits_of(SimpleNamespace(job_config=job, model_args=None), []) == ["train", "val"]
    job.multimodal.train_split = "val"
    image_data._class_folders.cache_clear()
    assert splits_of(SimpleNamespace(job_config=job, model_args=None), []) == ["val", "train"]
    with pytest.raises(ValueError, match=r'--splits: split "others" .* has the class "cow"'):
        splits_of(SimpleNamespace(job_config=job, model_args=None), ["others"])


def test_a_split_that_is_not_there_is_said_in_one_line(run, command, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main([f"--checkpoint={run}", "--splits", "tests"])
    assert exit.value.code == 2
    error = capsys.readouterr().err.strip()
    assert re.fullmatch(r'error: --splits: the emoji corpus has no split "tests".*', error)
