"""The trainer with experts: losses by domain, sheets, validation and frozen experts under layouts.

Weights begin away from zero, so that sheets show what routers do, and AdamW moves them in
proportion to their gradients.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.distributed.parity import KEYS
from tests.gang import run_ranks
from tests.jobs import debug_job
from tests.runs import run_to_the_end
from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.trainer import MixtureTrainer

pytestmark = pytest.mark.distributed

BASE = (
    "--training.local_batch_size=2", "--training.global_batch_size=8", "--training.steps=2",
    "--ema.decay=0.5", "--optimizer.lr=0.02", "--optimizer.eps=1.0",
    "--lr_scheduler.warmup_steps=1", "--training.max_norm=1000", "--checkpoint.no_enable",
    "--validation.freq=1", "--validation.steps=1", "--validation.local_batch_size=4",
    "--objective.validation_levels=2",
    "--sampling.interval=2", "--sampling.num_steps=2", "--sampling.num_samples=1",
    "--sampling.guidance=2.0", "--sampling.class_labels", "0", "9", "21",
    "--mixture.frozen_towers=noto_v1",
)  # fmt: skip


def train(*overrides):
    """Every scalar that is no time and no norm of one rank, and what the frozen expert is."""
    trainer = MixtureTrainer(debug_job("mixdiff", *BASE, *overrides))
    model, scalars, processor = trainer.model_parts[0], {}, trainer.metrics_processor
    with torch.no_grad(), init.parameter_names(model, 5):
        for parameter in model.parameters():
            own = parameter.clone()
            init.normal_(parameter, std=0.1)
            parameter.add_(own)

    def whole(parameter):
        return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter

    def norms():
        return {name: float(whole(p).norm()) for name, p in model.named_parameters()}

    def log(found, step, *, original=processor.logger.log):
        kinds = ("loss", "domain/", "router/", "grad_norm/")
        names = [n for n in found if any(kind in n for kind in kinds) and "max" not in n]
        scalars.update({f"{step} {name}": float(found[name]) for name in names})
        original(found, step)

    processor.logger.log = log
    before = norms()
    run_to_the_end(trainer)
    after = norms()
    trainer.close()
    changed = {name.split(".")[1] for name in after if after[name] != before[name]}
    return {"scalars": scalars, "changed": changed}


def run(folder, *options, world=1):
    records = run_ranks(
        train, world, f"--job.dump_folder={folder}", *options, init=False, timeout=240
    )
    assert all(record["scalars"] == records[0]["scalars"] for record in records)
    (path,) = Path(folder).glob("**/samples/images-step-00002.png")
    return records[0], np.asarray(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), "--metrics.enable_tensorboard")


def test_a_run_reports_domains_and_leaves_frozen_experts_alone(one_process):
    record, _ = one_process
    scalars = record["scalars"]
    for step in (1, 2):
        assert 0 <= scalars[f"{step} router/accuracy"] <= 1
        assert scalars[f"{step} domain/noto/loss"] > 0
        assert scalars[f"{step} grad_norm/router"] > 0 and scalars[f"{step} grad_norm/fluent"] > 0
        assert f"{step} grad_norm/noto_v1" not in scalars
        for split in ("unseen_concept", "unseen_style"):
            prefix = f"{step} validation/{split}"
            assert f"{prefix}/router/accuracy" in scalars and f"{prefix}/loss" in scalars
            weights = [
                scalars[f"{prefix}/router/weight/{n}"] for n in ("noto", "noto_v1", "fluent")
            ]
            assert sum(weights) == pytest.approx(1)
    assert "noto_v1" not in record["changed"] and {"noto", "fluent"} <= record["changed"]


@pytest.mark.parametrize(
    "degrees", [{"dp_shard": 2}, {"dp_replicate": 2}, {"tp": 2}], ids=["FSDP2", "DDP2", "TP2"]
)
def test_what_is_reported_and_drawn_is_that_of_one_process(degrees, one_process, tmp_path):
    record, sheet = one_process
    layout = [f"--parallelism.{KEYS[key]}={degree}" for key, degree in degrees.items()]
    found, drawn = run(tmp_path, *layout, world=2)
    # Each rank validates as many images again, so these numbers are of others.
    expected = record["scalars"]
    if "tp" not in degrees:
        expected = {k: v for k, v in expected.items() if "validation" not in k}
        assert expected.keys() < found["scalars"].keys()
    same = {key: found["scalars"][key] for key in expected}
    assert same == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert abs(drawn - sheet).max() <= 1
    assert found["changed"] == record["changed"]


def test_context_parallelism_reports_the_same(one_process, tmp_path):
    record, _ = one_process
    layout = (f"--parallelism.{KEYS['cp']}=2", "--sampling.interval=0")
    records = run_ranks(train, 2, f"--job.dump_folder={tmp_path}", *layout, init=False, timeout=240)
    assert records[0]["scalars"] == pytest.approx(record["scalars"], rel=1e-4, abs=1e-6)
