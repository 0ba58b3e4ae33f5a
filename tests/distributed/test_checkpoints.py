"""A run goes on from a checkpoint under another layout as if nothing had happened."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.distributed.parity import KEYS
from tests.gang import run_ranks
from tests.rows import quick
from tests.runs import train, train_until
from torchtitan_mixtures.models import FAMILIES

pytestmark = pytest.mark.distributed

BASE = (
    "--metrics.no_enable_tensorboard", "--validation.no_enable", "--training.steps=5",
    "--training.global_batch_size=4", "--lr_scheduler.warmup_steps=2", "--debug.seed=3",
    "--checkpoint.enable", "--checkpoint.interval=3",
)  # fmt: skip
STOP = 3

LAYOUTS = {
    "1 rank": {},
    "FSDP2": {"dp_shard": 2},
    "FSDP4": {"dp_shard": 4},
    "TP2": {"tp": 2},
    "TP2xFSDP2": {"dp_shard": 2, "tp": 2},
    "CP2": {"cp": 2},
    "PP2": {"pp": 2},
    "PP2 interleaved": {"pp": 2, "schedule": "Interleaved1F1B"},
    "HSDP2x2": {"dp_replicate": 2, "dp_shard": 2},
    "DDP2": {"dp_replicate": 2},
}
MATRIX = [
    ("TP2xFSDP2", "HSDP2x2"), ("FSDP2", "1 rank"), ("1 rank", "FSDP4"),
    ("PP2", "FSDP2"), ("FSDP2", "PP2 interleaved"), ("PP2", "CP2"),
    ("FSDP4", "TP2xFSDP2"), ("CP2", "TP2"), ("CP2", "DDP2"),
]  # fmt: skip
QUICK_ONES = [("TP2xFSDP2", "HSDP2x2"), ("FSDP2", "1 rank"), ("PP2", "FSDP2"), ("PP2", "CP2")]


def run(layout: str, folder: Path | str, *options: str, stop: int | None = None) -> dict:
    """Train under a layout, with the same sequences a step whatever the layout is."""
    degrees = dict(LAYOUTS[layout])
    schedule = degrees.pop("schedule", None)
    world, data_ranks = 1, degrees.get("dp_shard", 1) * degrees.get("dp_replicate", 1)
    for degree in degrees.values():
        world *= degree
    overrides = [f"--parallelism.{KEYS[key]}={n}" for key, n in degrees.items()]
    if layout == "DDP2":
        overrides.append("--parallelism.data_parallel_shard_degree=1")
    if schedule:
        overrides.append(f"--parallelism.pipeline_parallel_schedule={schedule}")
    records = run_ranks(
        train_until, world, stop, "mot", *BASE, f"--training.local_batch_size={4 // data_ranks}",
        f"--job.dump_folder={folder}", *overrides, *options, init=False, timeout=240,
    )  # fmt: skip
    assert all(record["loss"] == records[0]["loss"] for record in records)
    # Stages of a pipeline know their own weights only.
    weights = {name: total for record in records for name, total in record["weights"].items()}
    return records[0] | {"weights": weights}


@cache
def uninterrupted() -> dict:
    """What one process computes in one go."""
    with TemporaryDirectory() as folder:
        return run("1 rank", folder)


def assert_same_curve(found: dict, steps: list[int]) -> None:
    expected = uninterrupted()
    assert sorted(found["loss"]) == steps
    for step in steps:
        assert found["loss"][step] == pytest.approx(expected["loss"][step], rel=2e-5)
        assert found["grad_norm"][step] == pytest.approx(expected["grad_norm"][step], rel=2e-3)
        for name, value in expected["scalars"][step].items():
            if name.startswith("modality/") or name == "n_tokens_seen":
                assert found["scalars"][step][name] == pytest.approx(value, rel=2e-4), name


@pytest.mark.parametrize(("before", "after"), quick(QUICK_ONES, MATRIX))
def test_the_curve_goes_on_under_another_layout(before, after, tmp_path, saved):
    found = run(after, saved(before, tmp_path))
    assert_same_curve(found, [4, 5])
    expected = uninterrupted()["weights"]
    assert found["weights"].keys() == expected.keys()
    for name, total in expected.items():  # of weights of either sign, so an absolute error
        assert found["weights"][name] == pytest.approx(total, rel=1e-3, abs=0.05), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Make a copy of what a run under a layout left when it was stopped after three steps."""
    import shutil

    folders: dict[str, Path] = {}

    def copy_to(layout: str, target: Path) -> Path:
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp("run")
            assert_same_curve(run(layout, folders[layout], stop=STOP), [1, 2, 3])
        return Path(shutil.copytree(folders[layout], target / "run"))

    return copy_to


def test_an_asynchronous_checkpoint_is_of_its_step(tmp_path):
    # Every step is saved while the next ones already change the weights.
    options = (
        "--checkpoint.async_mode=async", "--checkpoint.interval=1", "--checkpoint.keep_latest_k=0",
    )  # fmt: skip
    run("FSDP2", tmp_path, *options, stop=4)
    found = run("1 rank", tmp_path, *options, "--checkpoint.load_step=2", stop=3)
    assert_same_curve(found, [3])


def test_every_layout_starts_from_a_seed_checkpoint(tmp_path):
    run_ranks(create_seed, 1, str(tmp_path), init=False)
    config = json.loads((tmp_path / "checkpoint" / "step-0" / "config.json").read_text())
    assert config["flavor"] == "debugmodel"
    # Another seed would draw other weights; those of the checkpoint are to be taken.
    found = run("TP2xFSDP2", tmp_path, "--debug.seed=11", stop=2)
    assert_same_curve(found, [1, 2])


def create_seed(folder: str) -> None:
    from tests.jobs import debug_job
    from torchtitan_mixtures.train import train as train_job

    train_job(
        debug_job(
            "mot", *BASE, "--checkpoint.create_seed_checkpoint", f"--job.dump_folder={folder}"
        )
    )


@pytest.mark.parametrize("family", quick(["mot", "mmdit"], FAMILIES))
def test_a_family_goes_on_with_fewer_ranks(family, tmp_path):
    """The least that every family owes; `mot` has the matrix above besides."""
    options = (family, *BASE, f"--job.dump_folder={tmp_path}")
    (whole,) = run_ranks(
        train, 1, family, *BASE, "--training.local_batch_size=4",
        f"--job.dump_folder={tmp_path}/whole", init=False,
    )  # fmt: skip
    run_ranks(train_until, 2, STOP, *options, "--training.local_batch_size=2", init=False)
    (found,) = run_ranks(train, 1, *options, "--training.local_batch_size=4", init=False)
    assert found["loss"][5] == pytest.approx(whole["loss"][5], rel=2e-5)
