"""The accuracy of a classifier at several capacities, and the command that reports it."""

import importlib.util
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchtitan.protocols.train_spec import get_train_spec

from tests.checkpoints import save_tiny_mot
from tests.jobs import ROOT, debug_job
from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.checkpoint_loading import load_model
from torchtitan_mixtures.evaluation.classification import (
    Answers,
    answer,
    capacities_of,
    summarise,
    with_routing,
)
from torchtitan_mixtures.objectives.classification import build_classification_loss
from torchtitan_mixtures.validate_classification import build_classification_validator

SPLIT = "unseen_style"
SMALL = ("--validation.local_batch_size=64", "--validation.steps=-1")
LISTED = ("--nested.validation_capacities", "0.3", "1.0")
DENSE = (
    "--model.flavor=debugmodel_dense",
    "--nested.capacity=-1",
    "--nested.validation_capacities",
)


@pytest.fixture(scope="module")
def command():
    """`scripts/evaluate.py` as a module."""
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "scripts" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_tiny(run, *overrides):
    splits = f"--multimodal.validation_splits={SPLIT}"
    job = debug_job("mone", *SMALL, splits, *overrides)
    spec = get_train_spec("mone")
    args = spec.model_args[job.model.flavor]
    args.dim, args.n_layers = 32, 1
    args.update_from_config(job)
    torch.manual_seed(0)
    model = spec.model_cls(args)
    with torch.no_grad():
        model.init_weights()
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # the head begins at zero
    folder = run / "checkpoint" / "step-20"
    checkpoint_config.write(folder, job, args)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dcp.save(weights, checkpoint_id=folder, no_dist=True)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("run"), *LISTED)


def test_accuracies_are_those_that_validation_logs(run):
    loaded = load_model(run)
    logged = {}
    validator = build_classification_validator(
        job_config=loaded.job_config,
        dp_world_size=1,
        dp_rank=0,
        parallel_dims=SimpleNamespace(
            cp=1,
            dp_cp_enabled=False,
            pp_enabled=False,
            world_mesh=SimpleNamespace(device_type="cpu"),
        ),
        loss_fn=build_classification_loss(loaded.job_config),
        validation_context=nullcontext,
        maybe_enable_amp=nullcontext(),
        metrics_processor=SimpleNamespace(
            log_validation=lambda loss, split, shares, **rest: logged.update(
                {split: {"loss": loss, **shares}}
            ),
            restart_clock=lambda step: None,
        ),
    )
    validator.validate([loaded.model], 20)
    found = answer(loaded, SPLIT, [0.3, 1.0])
    for capacity, name in ((0.3, "capacity_0.3"), (1.0, "capacity_1")):
        report = summarise(found[capacity])
        assert report["images"] == 146  # the last batch has padding, which is none
        rates = {rate: report[rate]["share"] for rate in ("accuracy", "top_5_accuracy")}
        assert {"loss": report["loss"], **rates} == pytest.approx(logged[f"{SPLIT}/{name}"])
        assert report["effective_capacity"] == pytest.approx(capacity, abs=0.03)


def test_routing_changes_and_nothing_else_does(run):
    loaded = load_model(run)
    assert with_routing(loaded, "") is loaded
    losses = {
        routing: answer(with_routing(loaded, routing), SPLIT, [0.3], 1)[0.3]
        for routing in ("", "expert_preferred", "random", "argmax")
    }
    assert torch.equal(losses[""].losses, losses["expert_preferred"].losses)
    for routing in ("random", "argmax"):
        assert not torch.equal(losses[""].losses, losses[routing].losses)
    assert losses["random"].capacity == pytest.approx(losses[""].capacity)
    again = answer(with_routing(loaded, "random"), SPLIT, [0.3], 1)[0.3]
    assert torch.equal(losses["random"].losses, again.losses)
    assert loaded.model_args.routing == "expert_preferred"


def test_capacities_that_mean_nothing_are_refused(run, tmp_path):
    loaded = load_model(run)
    assert capacities_of(loaded, []) == [0.5]
    assert capacities_of(loaded, [0.3, 1.0, 0.3]) == [0.3, 1.0]
    with pytest.raises(ValueError, match=r"--capacities 0\.3,0\.1: .* from 0\.125 to 1"):
        capacities_of(loaded, [0.3, 0.1])
    with pytest.raises(ValueError, match=r"--capacities 0\.3: with argmax tokens choose"):
        capacities_of(with_routing(loaded, "argmax"), [0.3])
    dense = load_model(save_tiny(tmp_path, *DENSE))
    assert capacities_of(dense, []) == [1.0]
    with pytest.raises(ValueError, match=r"--capacities 0\.3: debugmodel_dense has no nested"):
        capacities_of(dense, [0.3])
    with pytest.raises(ValueError, match=r"--routing random: debugmodel_dense has no nested"):
        with_routing(dense, "random")


def test_a_summary_counts_right_answers_and_what_a_guess_would_give():
    classes = torch.tensor([[0], [0], [1], [2], [3], [4], [5], [0]])
    top_1 = torch.tensor([1, 0, 1, 0, 0, 0, 1, 1], dtype=torch.bool)
    losses = torch.arange(8, dtype=torch.float64)
    found = summarise(Answers(losses, top_1, torch.ones(8, dtype=torch.bool), classes, 0.5))
    assert (found["images"], found["loss"], found["effective_capacity"]) == (8, 3.5, 0.5)
    assert (found["accuracy"]["hits"], found["accuracy"]["chance"]) == (4, 3 / 8)
    # Wilson's interval of 4 in 8, from its formula by hand.
    low, high = found["accuracy"]["low_95"], found["accuracy"]["high_95"]
    assert (low, high) == pytest.approx((0.2152, 0.7848), abs=1e-4)
    assert found["top_5_accuracy"]["chance"] == 7 / 8  # the five commonest of six classes
    several = torch.tensor([[0, 1], [0, -1], [1, 2], [0, 2]])
    found = summarise(Answers(losses[:4], top_1[:4], None, several, 0.5), is_multi_label=True)
    assert found["precision_at_1"]["chance"] == 3 / 4
    assert "accuracy" not in found
    assert "top_5_accuracy" not in found


def test_the_command_prints_a_table_and_writes_json(run, tmp_path, command, capsys):
    out = tmp_path / "report.json"
    options = [f"--splits={SPLIT}", "--max-batches=1", "--device=cpu"]
    command.main([f"--checkpoint={run}", f"--json={out}", "--capacities=0.25,1", *options])
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert (report["family"], report["step"], report["routing"]) == ("mone", 20, "expert_preferred")
    quarter, whole = report["splits"][SPLIT]
    assert (quarter["capacity"], whole["capacity"], quarter["images"]) == (0.25, 1.0, 64)
    assert quarter["macs_per_image"] < report["dense_macs_per_image"] <= whole["macs_per_image"]
    assert (
        "| split | images | capacity | M multiply-adds | of dense | loss | accuracy (95" in printed
    )
    rate = whole["accuracy"]
    cell = f"{100 * rate['share']:.1f} % ({100 * rate['low_95']:.1f} to "
    (line,) = [line for line in printed.splitlines() if "| 1.000 |" in line]
    assert f"| {whole['loss']:.4f} | {cell}" in line


@pytest.mark.parametrize("option", ["--capacities=0.5", "--routing=random"])
def test_options_of_classifiers_are_refused_for_other_models(option, tmp_path, command, capsys):
    save_tiny_mot(tmp_path)
    with pytest.raises(SystemExit) as exit:
        command.main([f"--checkpoint={tmp_path}", "--device=cpu", option])
    assert exit.value.code == 2
    name = option.partition("=")[0]
    assert f"error: {name}: is about nested classifiers" in capsys.readouterr().err


def test_capacities_that_are_no_numbers_are_refused(command, capsys):
    with pytest.raises(SystemExit):
        command.parse(["--checkpoint=x", "--capacities=0.3,half"])
    assert "0.3,half: must be numbers with commas between" in capsys.readouterr().err
