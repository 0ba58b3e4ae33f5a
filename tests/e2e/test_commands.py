"""The commands of the README, as a user gives them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gang import free_port
from tests.jobs import ROOT, TRAIN_CONFIGS
from tests.rows import quick
from torchtitan_mixtures.models import FAMILIES

pytestmark = pytest.mark.e2e

SMALL = (
    "--training.seq_len=256", "--validation.seq_len=256", "--metrics.log_freq=1",
    "--training.steps=3", "--lr_scheduler.warmup_steps=1", "--validation.steps=1",
)  # fmt: skip


def run(command: list[str], timeout: float = 240, **environment: str) -> str:
    """Run a command in the environment of this interpreter; return all it printed."""
    result = subprocess.run(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=timeout, stdin=subprocess.DEVNULL,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout


def torchrun(processes: int, *arguments: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
        f"--master-port={free_port()}", "--local-ranks-filter=0", "--tee=3",
        "-m", "torchtitan_mixtures.train", *arguments,
    ]  # fmt: skip


@pytest.mark.parametrize("family", quick(["mot"], FAMILIES))
def test_torchrun_trains_on_two_processes_and_writes_metrics(family, tmp_path):
    config = str(TRAIN_CONFIGS / family / "debugmodel.toml")
    output = run(
        torchrun(2, "--config", config, *SMALL, f"--job.dump_folder={tmp_path}"),
        OMP_NUM_THREADS="1",
    )
    assert "Applied FSDP to the model" in output
    assert re.search(r"step:  3 .*loss: .*grad_norm: .*tps: ", output)
    assert re.search(r"validate step:  1 .*loss: ", output)
    assert list(tmp_path.glob("tb/*/events.out.tfevents*"))
    assert (tmp_path / "checkpoint" / "step-3" / "config.json").is_file()
    assert (tmp_path / "checkpoint" / "step-3" / ".metadata").is_file()


def test_a_run_goes_on_with_other_ranks_and_workers(tmp_path):
    """Processes of a launcher, because only those may have workers of their own."""
    config = str(TRAIN_CONFIGS / "mot" / "debugmodel.toml")
    common = (
        "--config", config, *SMALL, "--training.seq_len=128", "--validation.no_enable",
        "--metrics.no_enable_tensorboard", "--training.global_batch_size=4",
        "--lr_scheduler.total_steps=4",
    )  # fmt: skip

    def losses(processes: int, workers: int, folder: str, steps: int) -> dict[str, float]:
        output = run(
            torchrun(
                processes, *common, f"--training.steps={steps}",
                f"--training.local_batch_size={4 // processes}",
                f"--training.dataloader.num_workers={workers}",
                f"--job.dump_folder={tmp_path / folder}",
            ),
            OMP_NUM_THREADS="1",
        )  # fmt: skip
        found = re.findall(r"step: +(\d+) .*?loss: +([\d.]+)", output)
        return {step: float(loss) for step, loss in found}

    whole = losses(1, 0, "whole", 4)
    first, second = losses(2, 2, "parts", 2), losses(1, 3, "parts", 4)
    assert list(first) == ["1", "2"] and list(second) == ["3", "4"]
    assert first | second == pytest.approx(whole, abs=2e-4)


def test_the_unmodified_trainer_of_the_host_trains_too(tmp_path):
    config = str(TRAIN_CONFIGS / "mot" / "debugmodel.toml")
    command = torchrun(
        1, "--job.config_file", config, *SMALL, f"--job.dump_folder={tmp_path}",
    )  # fmt: skip
    output = run(["torchtitan.train" if word == "torchtitan_mixtures.train" else word
                  for word in command])  # fmt: skip
    assert "step:  3" in output


def test_the_unmodified_trainer_refuses_what_only_ours_does_right(tmp_path):
    config = str(TRAIN_CONFIGS / "mot" / "debugmodel.toml")
    command = torchrun(
        1, "--job.config_file", config, *SMALL, f"--job.dump_folder={tmp_path}",
        "--multimodal.image_weight=0.5",
    )  # fmt: skip
    command[command.index("torchtitan_mixtures.train")] = "torchtitan.train"
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "launch with -m torchtitan_mixtures.train" in result.stdout + result.stderr


def test_train_script_takes_a_configuration_and_overrides(tmp_path):
    config = str(TRAIN_CONFIGS / "mot" / "debugmodel_dense.toml")
    output = run(
        ["bash", "scripts/train.sh", config, *SMALL, f"--job.dump_folder={tmp_path}"],
        VIRTUAL_ENV=sys.prefix,
    )
    assert "step:  3" in output
    assert "debugmodel_dense" in output


def test_train_script_shows_one_clear_message_for_bad_input():
    command = ["bash", "scripts/train.sh", "--model.flavor", "9B"]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                          "VIRTUAL_ENV": sys.prefix},
    )  # fmt: skip
    printed = result.stdout + result.stderr
    assert result.returncode != 0
    assert printed.count("error: model.flavor = '9B'") == 1
    assert "Traceback" not in printed


def test_scripts_are_clean_shell():
    scripts = [str(p) for p in (ROOT / "scripts").glob("*.sh")] + [str(ROOT / ".ci" / "run")]
    run(["shellcheck", "-x", *scripts])
