"""Update-to-weight ratios against differences of cloned weights; towers that learn nothing."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed import ParallelDims

from tests.gang import run_ranks
from tests.jobs import debug_job
from tests.runs import QUICK, run_to_the_end
from torchtitan_mixtures.telemetry import IdleTowers, UpdateMeter, last_update

DIMS = ParallelDims(1, 1, 1, 1, 1, 1, 1, 1)
TOWERS = ["text", "image", "idle"]


def make(optimizer_cls, dtype, **options):
    torch.manual_seed(0)
    model = nn.ModuleDict({
        tower: nn.Linear(9, 7).to(dtype) for tower in TOWERS
    })  # fmt: skip
    container = OptimizersContainer([model], optimizer_cls, options)
    return model, container


def step(model, container, index):
    """Random gradients of very different sizes, some of them zero; `idle` has none."""
    for name, parameter in model.named_parameters():
        gradient = torch.randn_like(parameter) * 10.0 ** (index % 3 - 4)
        gradient[0] = 0
        parameter.grad = None if name.startswith("idle") else gradient
    container.step()


@pytest.mark.parametrize("kernel", ["for-loop", "foreach", "fused"])
@pytest.mark.parametrize("optimizer_cls", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_the_last_update_is_the_difference_of_the_weights(kernel, optimizer_cls, dtype, tolerance):
    options = dict(
        lr=2e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3,
        foreach=kernel == "foreach", fused=kernel == "fused",
    )  # fmt: skip
    model, container = make(optimizer_cls, dtype, **options)
    meter = UpdateMeter(container, [model], lambda name: name.split(".")[0], TOWERS, DIMS)
    for index in range(4):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        meter.start()
        step(model, container, index)
        (optimizer,) = container
        for name, parameter in model.named_parameters():
            change, old = last_update(
                parameter, optimizer.state.get(parameter, {}), optimizer.param_groups[0]
            )
            expected = parameter.detach() - before[name]
            torch.testing.assert_close(old, before[name], rtol=1e-6, atol=1e-6)
            error = (change - expected).norm() / max(float(expected.norm()), 1e-30)
            assert error < tolerance, (index, name)
        ratios = meter.finish()
        assert ratios["idle"] == 0
        for tower in ("text", "image"):
            old = torch.cat([before[f"{tower}.{kind}"].flatten() for kind in ("weight", "bias")])
            new = torch.cat([p.detach().flatten() for p in model[tower].parameters()])
            expected = float((new - old).norm() / old.norm())
            assert ratios[tower] == pytest.approx(expected, rel=tolerance)


def test_updates_of_bfloat16_weights_are_measured_before_they_are_rounded():
    model, container = make(torch.optim.AdamW, torch.bfloat16, lr=1e-5, weight_decay=0.0)
    meter = UpdateMeter(container, [model], lambda name: name.split(".")[0], TOWERS, DIMS)
    weights = torch.cat([p.detach().float().flatten() for p in model["text"].parameters()])
    meter.start()
    step(model, container, 0)
    moved = 63 - 9 + 6  # entries with a gradient: Adam's first step moves each by lr
    expected = 1e-5 * moved**0.5 / float(weights.norm())
    assert meter.finish()["text"] == pytest.approx(expected, rel=1e-2)


def test_a_step_that_was_not_announced_is_not_measured(monkeypatch):
    model, container = make(torch.optim.AdamW, torch.float32, lr=1e-3)
    meter = UpdateMeter(container, [model], lambda name: name.split(".")[0], TOWERS, DIMS)

    def refuse(*arguments):
        raise AssertionError("measured")

    monkeypatch.setattr("torchtitan_mixtures.telemetry.last_update", refuse)
    step(model, container, 0)
    assert meter.finish() == {}
    meter.start()
    with pytest.raises(AssertionError, match="measured"):
        step(model, container, 0)


def test_a_tower_is_idle_after_three_steps_and_again_only_after_it_was_active():
    idle = IdleTowers()
    norms = [0, 0, 1, 0, 0, 0, 0, 0, 1e-30, 0, 0, 0]
    found = [idle.update({"text": 1.0, "image": norm}) for norm in norms]
    assert [step for step, towers in enumerate(found) if towers] == [5, 11]
    assert found[5] == ["image"]
    assert idle.update({}) == []  # frozen towers have no norm at all


def train_with_video(folder):
    """Warnings and scalars of a run, by the real trainer, whose third modality has no data."""
    from torchtitan_mixtures.models.mot import mot_args
    from torchtitan_mixtures.trainer import MixtureTrainer

    mot_args._table["debugmodel_3modality"].modality_names[2] = "video"
    job = debug_job(
        "mot", *QUICK, "--model.flavor=debugmodel_3modality", "--training.steps=4",
        "--training.seq_len=96", "--metrics.log_freq=2", f"--job.dump_folder={folder}",
        "--mixture.tower_lr=image=1e-2", "--mixture.tower_weight_decay=video=0.25",
        "--mixture.frozen_towers=text", "--activation_checkpoint.mode=full",
        "--compile.enable", "--compile.backend=aot_eager",
    )  # fmt: skip
    warnings, scalars = [], {}
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    trainer = MixtureTrainer(job)
    weights = {
        name.replace("_orig_mod.", ""): p.detach().clone()
        for name, p in trainer.model_parts[0].named_parameters()
        if ".text." in name
    }
    write = trainer.processor.logger.log

    def log(values, step):
        scalars[step] = values
        write(values, step)

    trainer.processor.logger.log = log
    run_to_the_end(trainer)
    kept = [torch.equal(trainer.model_parts[0].get_parameter(n), w) for n, w in weights.items()]
    trainer.close()
    return [message for message in warnings if "tower" in message], scalars, kept


def test_the_trainer_reports_towers_and_warns_once_of_an_idle_one(tmp_path):
    ((warnings, scalars, kept),) = run_ranks(train_with_video, 1, str(tmp_path), init=False)
    start, idle = warnings
    assert "has the modality 'video', of which no batch has a token" in start
    assert "'video' got no gradient in 3 logged steps running" in idle
    assert "weight decay (0.25) goes on shrinking" in idle
    assert 'mixture.frozen_towers = ["video"]' in idle
    assert len(kept) == 54 and all(kept)
    assert sorted(scalars) == [1, 2, 4]
    for values in scalars.values():
        for prefix in ("update_ratio/", "grad_norm/"):
            towers = {name.removeprefix(prefix) for name in values if name.startswith(prefix)}
            assert towers == {"image", "video", "shared"}
        rate = values["lr"]
        assert values["lr/image"] == pytest.approx(rate * 1e-2 / 3e-3)
        # Nothing but weight decay moves a tower without gradients.
        assert values["grad_norm/video"] == 0
        assert values["update_ratio/video"] == pytest.approx(rate * 0.25, rel=1e-4)
        assert values["update_ratio/image"] > 10 * values["update_ratio/video"]
