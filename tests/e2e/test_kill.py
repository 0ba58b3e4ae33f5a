"""Runs that are killed with SIGKILL: nothing corrupt, nothing lost but steps since a checkpoint."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gang import free_port
from tests.jobs import ROOT, TRAIN_CONFIGS
from tests.unit.data.file_fakes import make_tar, picture

pytestmark = pytest.mark.e2e

STEPS, INTERVAL = 8, 2
OPTIONS = (
    "--training.seq_len=128", "--training.local_batch_size=1", f"--training.steps={STEPS}",
    "--metrics.log_freq=1", "--metrics.no_enable_tensorboard", "--validation.no_enable",
    "--lr_scheduler.warmup_steps=2", "--checkpoint.enable", f"--checkpoint.interval={INTERVAL}",
)  # fmt: skip


class Run:
    """Two ranks, started without a launcher so that a kill hits them and nothing else."""

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self._log = folder / f"log-{len(list(folder.glob('log-*')))}"
        port = str(free_port())
        environment = {
            "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
            "TORCHELASTIC_RUN_ID": "test",
        }  # fmt: skip
        command = [
            sys.executable, "-m", "torchtitan_mixtures.train",
            "--config", str(TRAIN_CONFIGS / "mot" / "debugmodel.toml"), *OPTIONS,
            f"--job.dump_folder={folder}", *options,
        ]  # fmt: skip
        self.processes = []
        for rank in range(2):
            with Path(self._log if rank == 0 else f"{self._log}.1").open("w") as log:
                self.processes.append(subprocess.Popen(
                    command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                    env=os.environ | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                ))  # fmt: skip

    def output(self) -> str:
        """What rank 0 has printed so far."""
        return self._log.read_text(errors="replace")

    def outputs(self) -> str:
        """What both ranks have printed, rank 0 last."""
        return Path(f"{self._log}.1").read_text(errors="replace")[-3000:] + self.output()[-3000:]

    def wait_until(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Look often; the run must not end before the condition holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            alive = all(process.poll() is None for process in self.processes)
            assert alive and time.monotonic() < deadline, self.output()[-3000:]
            time.sleep(0.002)

    def kill(self, rank: int) -> None:
        """Kill one rank at once; the other must notice by itself."""
        self.processes[rank].send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait(timeout=120)

    def finish(self) -> None:
        """Wait for the end of the training."""
        for process in self.processes:
            assert process.wait(timeout=240) == 0, self.outputs()

    def losses(self) -> dict[int, str]:
        """Loss of each step, as printed."""
        found = re.findall(r"step: *(\d+) .*?loss: *([\d.]+)", self.output())
        return {int(step): loss for step, loss in found}

    def started_at(self) -> int:
        """The first step that was trained."""
        (step,) = re.findall(r"Training starts at step (\d+)", self.output())
        return int(step)


def complete_steps(folder: Path) -> list[int]:
    """Steps whose checkpoint is complete."""
    done = (folder / "checkpoint").glob("step-*/.metadata")
    return sorted(int(path.parent.name.partition("-")[2]) for path in done)


def wait_for_save(run: Run, step: int) -> None:
    """Wait until a checkpoint is begun, and for its first weights if they come soon.

    Between those and its end there may be less time than it takes to look again.
    """
    path = run.folder / "checkpoint" / f"step-{step}"
    run.wait_until(path.exists)
    deadline = time.monotonic() + 0.1
    while time.monotonic() < deadline and not any(path.glob("*.distcp")):
        time.sleep(0.001)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[int, str]:
    """The losses of a run that nobody disturbs."""
    run = Run(tmp_path_factory.mktemp("whole"), "--checkpoint.no_enable")
    run.finish()
    assert sorted(run.losses()) == list(range(1, STEPS + 1))
    return run.losses()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("mode", "moments"),
    [
        ("disabled", ("in save 2", "after 3", "while loading 2", "in save 8")),
        ("async", ("in save 4", "after 5")),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(mode, moments, expected, tmp_path):
    rng = random.Random(mode)
    for moment in (*moments, "the end"):
        finished = max(complete_steps(tmp_path), default=0)
        run = Run(tmp_path, f"--checkpoint.async_mode={mode}")
        if moment == "the end":
            run.finish()
        else:
            wait_for(moment, run, rng)
            run.kill(rng.randrange(2))
        if moment.startswith("while loading"):
            continue  # no step was trained
        losses = run.losses()
        assert losses and run.started_at() == finished + 1
        assert losses == {step: expected[step] for step in losses}
    assert max(losses) == STEPS


def wait_for(moment: str, run: Run, rng: random.Random) -> None:
    """Wait until a step is being saved, or for some time after it was trained."""
    step = int(moment.rpartition(" ")[2])
    if moment.startswith("while loading"):
        return run.wait_until(lambda: f"Loading the checkpoint from {run.folder}" in run.output())
    if moment.startswith("in save"):
        wait_for_save(run, step)
    else:
        run.wait_until(lambda: step in run.losses())
        time.sleep(rng.random() * 0.3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_mixture_of_files_goes_on_as_if_nothing_had_happened(tmp_path):
    """Own data of three kinds, read by two workers of each rank, one bad sample among them."""
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for number in range(40):
        (data / "images" / f"{number}.png").write_bytes(picture(6 * number))
        (data / "images" / f"{number}.txt").write_text(f"grey number {number}")
    lines = [json.dumps({"text": f"a line of text, number {n}. " * 8}) for n in range(200)]
    (data / "texts.jsonl").write_text("\n".join([*lines, "{broken"]))
    members = [(f"{n}.{end}", content) for n in range(60) for end, content in
               (("png", picture(4 * n)), ("txt", f"shade {n}".encode()))]  # fmt: skip
    (data / "pairs.tar").write_bytes(make_tar(members))
    sources = [
        {"name": "texts", "kind": "jsonl", "path": str(data), "weight": 0.5},
        {"name": "images", "kind": "folder", "path": str(data / "images"), "weight": 0.3},
        {"name": "pairs", "kind": "webdataset", "path": str(data / "*.tar"), "weight": 0.2},
    ]
    options = (
        "--multimodal.source=mixture",
        f"--multimodal.sources={json.dumps(sources)}",
        "--multimodal.condition_dropout=0.1",
        "--training.dataloader.num_workers=2",
    )
    whole = Run(tmp_path / "whole", "--checkpoint.no_enable", *options)
    whole.finish()
    expected = whole.losses()
    for moment in ("in save 4", "after 5", "the end"):
        finished = max(complete_steps(tmp_path / "killed"), default=0)
        run = Run(tmp_path / "killed", *options)
        if moment == "the end":
            run.finish()
        else:
            wait_for(moment, run, random.Random(moment))
            run.kill(1)
        assert run.started_at() == finished + 1
        assert run.losses() == {step: expected[step] for step in run.losses()}
    assert max(run.losses()) == STEPS
