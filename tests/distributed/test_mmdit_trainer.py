"""The trainer with prompts: sheets and losses under parallel layouts, and what follows a run.

As in `test_mom_trainer.py` weights begin away from zero, so that sheets show what prompts do, and
AdamW moves them in proportion to their gradients.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.distributed.parity import KEYS
from tests.gang import run_ranks
from tests.jobs import debug_job
from tests.runs import run_to_the_end
from tests.unit.data.tiny_encoders import save_clip, save_t5
from torchtitan_mixtures.checkpoint_loading import find_checkpoint, load_model
from torchtitan_mixtures.data.text_encoders import frozen_prompt_spec
from torchtitan_mixtures.evaluation.prompts import evaluate_prompts, format_prompts
from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.sampling.command import main
from torchtitan_mixtures.sampling.during_training import build_sampler
from torchtitan_mixtures.trainer import MixtureTrainer

pytestmark = pytest.mark.distributed

PROMPTS = ("a red fox", "fox")
BASE = (
    "--training.local_batch_size=2", "--validation.no_enable", "--ema.decay=0.5",
    "--sampling.interval=1", "--sampling.num_steps=2", "--sampling.num_samples=2",
    "--sampling.guidance=2.0", f"--sampling.prompts={','.join(PROMPTS)}",
)  # fmt: skip
STEPS = (
    "--model.flavor=debugmodel_3modality", "--training.steps=2", "--training.global_batch_size=4",
    "--optimizer.lr=0.02", "--optimizer.eps=1.0", "--lr_scheduler.warmup_steps=1",
    "--training.max_norm=1000",
)  # fmt: skip


def train(*overrides):
    """Losses as every rank logs them, and names of weights; sheets go into the run's folder."""
    job = debug_job("mmdit", *BASE, *overrides)
    trainer = MixtureTrainer(job)
    model, losses, processor = trainer.model_parts[0], {}, trainer.metrics_processor
    # The family's own are zero in so many places that no prompt would be seen.
    with torch.no_grad(), init.parameter_names(model, 5):
        for parameter in model.parameters():
            own = parameter.clone()
            init.normal_(parameter, std=0.1)
            parameter.add_(own)

    def log(scalars, step, *, original=processor.logger.log):
        names = [n for n in scalars if "loss" in n and "max" not in n]  # that is of one rank
        losses.update({f"{step} {name}": scalars[name] for name in names})
        original(scalars, step)

    processor.logger.log = log
    run_to_the_end(trainer)
    # What the sheets of the run do not say, as step 3 and 4: parameters that are no average, and
    # an average that no prompt guides.
    if trainer.parallel_dims.world_size == 1:
        trainer.sampler.sample(model, 3)
        job.sampling.guidance = 1.0
        with trainer.ema.swapped():
            build_sampler(job, trainer.model_args, processor).sample(model, 4)
    trainer.close()
    return {"losses": losses, "names": [name for name, _ in model.named_parameters()]}


def run(folder, *options, world=1):
    records = run_ranks(
        train, world, f"--job.dump_folder={folder}", *options, init=False, timeout=200
    )
    for record in records:
        assert record == records[0]
    return records[0]


def sheet(folder, step):
    (path,) = Path(folder).glob(f"**/samples/images-step-{step:05}.png")
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Folder of a run with a checkpoint, and what it logged."""
    folder = tmp_path_factory.mktemp("one")
    options = ("--checkpoint.enable", "--checkpoint.interval=2")
    return folder, run(folder, *STEPS, *options)["losses"]


# --- layouts --------------------------------------------------------------------------------------


def test_sheets_are_of_averages_and_guided_by_prompts(one_process):
    folder, losses = one_process
    sheets = [sheet(folder, step) for step in (1, 2, 3, 4)]
    for other in (0, 2, 3):
        assert abs(sheets[1] - sheets[other]).max() > 10, other
    assert {f"{step} loss_metrics/global_avg_loss" for step in (1, 2)} <= losses.keys()
    assert all(math.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("degrees", [{"dp_shard": 2}, {"tp": 2}], ids=["FSDP2", "TP2"])
def test_sheets_and_losses_are_those_of_one_process(degrees, one_process, tmp_path):
    folder, losses = one_process
    layout = [f"--parallelism.{KEYS[key]}={degree}" for key, degree in degrees.items()]
    found = run(tmp_path, *STEPS, "--checkpoint.no_enable", *layout, world=2)
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    for step in (1, 2):
        assert abs(sheet(tmp_path, step) - sheet(folder, step)).max() <= 1, step


# --- after a run ----------------------------------------------------------------------------------


def sample(checkpoint, out, *options):
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    shape = ("--num-samples", "2", "--num-steps", "2", *options)
    main(["--checkpoint", str(checkpoint), "--out", str(out), *prompts, *shape])
    table = json.loads((out / "samples.json").read_text())
    return table, [np.asarray(Image.open(path)) for path in sorted(out.glob("image*.png"))]


def test_the_command_draws_from_the_checkpoint_what_training_drew(one_process, tmp_path):
    _, pictures = sample(one_process[0], tmp_path / "a")
    assert len(pictures) == 4
    drawn = np.asarray(Image.open(tmp_path / "a" / "grid.png")).astype(int)
    assert abs(drawn - sheet(one_process[0], 2)).max() <= 1


def test_negative_prompts_and_voices_change_what_is_drawn(one_process, tmp_path):
    _, plain = sample(one_process[0], tmp_path / "a")
    against, drawn = sample(one_process[0], tmp_path / "b", "--negative-prompt", "a blue bell")
    assert against["negative_prompt"] == "a blue bell"
    assert all((x != y).any() for x, y in zip(plain, drawn, strict=True))
    spoken, drawn = sample(one_process[0], tmp_path / "c", "--speak")
    assert [entry["spoken"] for entry in spoken["samples"]] == [False, False, True, True]
    changed = [bool((x != y).any()) for x, y in zip(plain, drawn, strict=True)]
    assert changed == [False, False, True, True]


def test_the_checkpoint_can_be_asked_whether_it_answers_prompts(one_process):
    loaded = load_model(find_checkpoint(one_process[0]))
    report = evaluate_prompts(loaded, ["train", "unseen_concept"], num_items=3, num_steps=2)
    assert (report["flavor"], report["step"]) == ("debugmodel_3modality", 2)
    assert report["averaged"] and report["settings"]["guidance"] == 2.0
    for split in ("train", "unseen_concept"):
        for kind in ("concepts", "relations"):
            found = report["splits"][split][kind]
            assert found["prompts"] == 3
    assert "unseen_concept" in format_prompts(report)


# --- frozen encoders ------------------------------------------------------------------------------


def test_a_run_encodes_its_prompts_by_frozen_encoders(tmp_path):
    folders = [str(save_clip(tmp_path / "clip")), str(save_t5(tmp_path / "t5", seed=1))]
    options = ("--training.steps=1", "--checkpoint.enable", "--checkpoint.interval=1")
    joined = f"--multimodal.text_encoders={','.join(folders)}"
    found = run(tmp_path / "run", *options, joined)
    assert math.isfinite(found["losses"]["1 loss_metrics/global_avg_loss"])
    starts = {name.split(".")[0] for name in found["names"]}
    assert {"prompt_embedder", "pooled_embedder"} <= starts and "prompt_encoder" not in starts
    # Its prompts are seen, and the run's checkpoint knows their form and their folders.
    guided, unguided = sheet(tmp_path / "run", 1), sheet(tmp_path / "run", 4)
    assert abs(guided - unguided).max() > 10
    loaded = load_model(find_checkpoint(tmp_path / "run"))
    assert loaded.model_args.prompts == (frozen_prompt_spec(folders),)
    sample(tmp_path / "run", tmp_path / "out")
    drawn = np.asarray(Image.open(tmp_path / "out" / "grid.png")).astype(int)
    assert abs(drawn - guided).max() <= 1
