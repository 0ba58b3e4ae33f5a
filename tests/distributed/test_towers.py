"""Frozen towers, their learning rates, weight decay and telemetry under parallel layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchtitan.distributed import ParallelDims

from tests.distributed.parity import (
    BATCHES,
    LAYOUTS,
    Layout,
    Run,
    make_args,
    make_batch,
    make_job,
    relative_error,
    use_float64,
    whole,
)
from tests.gang import run_ranks
from tests.runs import train_until
from torchtitan_mixtures.optimizer import build_tower_optimizers
from torchtitan_mixtures.telemetry import UpdateMeter
from torchtitan_mixtures.towers import tower_namer

pytestmark = pytest.mark.distributed

ALONE = dict(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
TOWERS = ("text", "image", "shared")


def tower_of(name: str) -> str:
    """Which tower a parameter of a fully untied model is of, by its name alone."""
    return next((tower for tower in ("text", "image") if f".{tower}." in name), "shared")


def make_run(layout: Layout, dims: ParallelDims, **keys: Any) -> Run:
    job = make_job(layout, "debugmodel")
    job.optimizer.lr, job.optimizer.eps, job.optimizer.weight_decay = 0.1, 0.1, 0.2
    for key, value in keys.items():
        setattr(job.mixture, key, value)
    return Run(layout, job, make_args(job, "2 modalities"), dims)


def ratios(before: dict, after: dict) -> dict[str, float]:
    """Update-to-weight ratios of towers from two copies of all weights."""
    result = {}
    for tower in TOWERS:
        names = [name for name in before if tower_of(name) == tower]
        change = torch.cat([(after[name] - before[name]).flatten() for name in names])
        result[tower] = float(
            change.norm() / torch.cat([before[n].flatten() for n in names]).norm()
        )
    return result


def compare(layout: str, frozen: str) -> tuple[dict[str, float], dict[str, float]]:
    """Three steps alone and in a layout: errors by what is compared, and sums of final weights."""
    use_float64()
    dims = LAYOUTS[layout].dims()
    keys = dict(
        tower_lr={"image": 0.3, "shared": 0.02}, tower_weight_decay={"image": 0.7},
        frozen_towers=[frozen],
    )  # fmt: skip
    alone = ParallelDims(**ALONE)
    whole_run = make_run(Layout({}), alone)
    runs = [make_run(LAYOUTS[layout], dims, **keys), make_run(Layout({}), alone, **keys)]
    initial = {name: p.detach().clone() for name, p in runs[1].parameters().items()}
    optimizers = [build_tower_optimizers(r.parts, r.job.optimizer, r.dims) for r in runs]
    args = runs[0].parts[0].model_args
    meter = UpdateMeter(optimizers[0], runs[0].parts, tower_namer(args), TOWERS, dims)
    errors: dict[str, float] = {}
    for index, kind in enumerate(BATCHES[:3]):
        batch = make_batch(args, kind, seed=index)
        losses = [run.backward(batch) for run in runs]
        errors[f"loss {index}"] = relative_error(*losses)
        if index == 0:  # freezing changes nothing about the gradients of the others
            whole_run.backward(batch)
            for name, parameter in whole_run.parameters().items():
                found = runs[0].parameters().get(name)
                if found is not None and tower_of(name) != frozen:
                    errors[f"gradient {name}"] = relative_error(whole(found.grad), parameter.grad)
        before = {name: p.detach().clone() for name, p in runs[1].parameters().items()}
        meter.start()
        for run, optimizer in zip(runs, optimizers, strict=True):
            run.clip(0.5)
            optimizer.step()
        expected = ratios(before, runs[1].parameters())
        assert expected.pop(frozen) == 0
        found = meter.finish()
        assert found.keys() == expected.keys()
        for tower, ratio in expected.items():
            errors[f"ratio {tower} {index}"] = abs(found[tower] / ratio - 1)
    weights = {}
    for name, parameter in runs[0].parameters().items():
        expected = runs[1].parameters()[name].detach()
        if tower_of(name) == frozen:
            assert parameter.grad is None and not any(parameter in o.state for o in optimizers[0])
            assert torch.equal(whole(parameter), initial[name]) and torch.equal(
                expected, initial[name]
            )
        else:
            moved = expected - initial[name]
            errors[f"weight {name}"] = relative_error(whole(parameter) - initial[name], moved)
        weights[name] = float(whole(parameter).sum())
    return errors, weights


CASES = [
    ("FSDP2xTP2", "text"), ("PP2", "text"), ("PP2 ZBVZeroBubble", "text"), ("CP2", "text"),
    ("DDP2", "text"), ("FSDP2", "shared"), ("TP2", "shared"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "frozen"), CASES)
def test_a_layout_takes_the_steps_of_one_process(layout, frozen):
    results = run_ranks(compare, LAYOUTS[layout].world, layout, frozen)
    everywhere: dict[str, float] = {}
    for errors, weights in results:
        assert max(errors.values()) < 1e-9, max(errors.items(), key=lambda item: item[1])
        for name, value in weights.items():
            assert everywhere.setdefault(name, value) == value, f"ranks disagree about {name}"
    assert {tower_of(name) for name in everywhere} == set(TOWERS)


BASE = (
    "--metrics.no_enable_tensorboard", "--validation.no_enable", "--training.seq_len=96",
    "--training.global_batch_size=4", "--lr_scheduler.warmup_steps=2", "--debug.seed=3",
    "--training.steps=4", "--checkpoint.enable", "--checkpoint.interval=2",
)  # fmt: skip
# Shared parameters have a group of their own, text is frozen: TorchTitan's group is empty.
KEYS = (
    "--mixture.tower_lr=image=1e-2,shared=1e-4,text=1", "--mixture.frozen_towers=text",
    "--mixture.tower_weight_decay=image=0.5",
)  # fmt: skip
TWO_STAGES = ("--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=4")


def run(folder, world: int, *options: str, stop: int | None = None) -> dict:
    records = run_ranks(
        train_until, world, stop, "mot", *BASE, f"--job.dump_folder={folder}", *options, init=False
    )
    return records[0] | {"weights": {k: v for r in records for k, v in r["weights"].items()}}


def test_rates_and_frozen_towers_survive_a_resume_under_another_layout(tmp_path):
    expected = run(tmp_path / "whole", 1, *KEYS)
    run(tmp_path / "run", 2, *KEYS, *TWO_STAGES, stop=2)
    # What is the host's own of these keys is the checkpoint's too: another rate has no effect.
    found = run(tmp_path / "run", 2, *KEYS, "--optimizer.lr=1")
    for step in (3, 4):
        assert found["loss"][step] == pytest.approx(expected["loss"][step], rel=2e-5)
        scalars = expected["scalars"][step]
        names = ["lr", "lr/image", "lr/shared", "update_ratio/image", "update_ratio/shared"]
        assert {n for n in scalars if n.startswith(("lr", "update_ratio"))} == set(names)
        for name in names:
            assert found["scalars"][step][name] == pytest.approx(scalars[name], rel=2e-3), name
    assert found["weights"].keys() == expected["weights"].keys()
    for name, total in expected["weights"].items():
        assert found["weights"][name] == pytest.approx(total, rel=1e-3, abs=0.05), name
