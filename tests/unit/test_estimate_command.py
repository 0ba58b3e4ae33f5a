"""`scripts/estimate.py` as users call it."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys

import pytest

from tests.jobs import ROOT, TRAIN_CONFIGS
from torchtitan_mixtures.planning.step import plan_step

SCRIPT = ROOT / "scripts" / "estimate.py"
DEBUG = TRAIN_CONFIGS / "mot" / "debugmodel.toml"
SMALL = ("--training.seq_len=512", "--training.local_batch_size=2", "--validation.no-enable")


@pytest.fixture
def estimate(monkeypatch, capsys):
    """Run the command in this process: exit code, standard output and error."""

    def run(*arguments):
        monkeypatch.setenv("TORCHTITAN_MIXTURES_DEVICE", "cpu")  # the script's own, taken back
        monkeypatch.setattr(sys, "argv", ["estimate.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return left.value.code, *capsys.readouterr()

    return run


def test_a_plan_is_printed_and_nothing_else():
    arguments = [DEBUG, "--world-size", "4", "--parallelism.tensor_parallel_degree", "2", *SMALL]
    command = [sys.executable, SCRIPT, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    plan = plan_step(
        [f"--config={DEBUG}", "--parallelism.tensor_parallel_degree=2", *SMALL], world_size=4
    )
    lines = result.stdout.splitlines()
    assert lines[0] == "mot debugmodel, 4 x h100-80g: TP 2 x FSDP 2 (rank 0)"
    said = dict(re.findall(r"^(.+?) +([\d.]+) GiB", result.stdout, flags=re.MULTILINE))
    for name in ("parameters", "gradients", "optimizer_state", "activations", "peak"):
        expected = getattr(plan.memory, name) / 2**30
        assert float(said[name.replace("_", " ")]) == pytest.approx(expected, abs=6e-4)
    assert "fits" in result.stdout
    assert len([line for line in lines if line.startswith("step ")]) == 1
    assert re.search(r"^step .* bound by (compute|memory|link \(\w+\))", lines[-1])


def test_a_machine_with_an_accelerator_plans_on_its_cpu():
    code = (
        "import runpy, sys; import torch._utils as utils; "
        "utils._get_available_device_type = lambda: 'mps'; "
        f"sys.argv = ['estimate.py', {str(DEBUG)!r}, '--world-size', '2', *{SMALL!r}]; "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("mot debugmodel, 2 x h100-80g: FSDP 2")


def test_numbers_for_programs_are_those_of_the_plan(estimate):
    code, out, err = estimate(DEBUG, "--json", "--device", "a100-40g", *SMALL)
    assert (code, err) == (0, "")
    table = json.loads(out)
    plan = plan_step([f"--config={DEBUG}", *SMALL], world_size=1)
    assert table["memory"]["peak"] == plan.memory.peak
    assert table["flops"] == plan.flops
    assert table["fits"] is True
    assert table["device"]["name"] == "a100-40g"
    assert table["seconds"]["compute"] == pytest.approx(plan.flops / 19.5e12)  # float32


def test_what_does_not_fit_is_an_exit_code_and_a_remedy(estimate):
    code, out, err = estimate(DEBUG, *SMALL, "--training.local_batch_size=8", "--reserve", 79.5)
    assert code == 1
    assert "DOES NOT FIT" in out
    assert re.search(
        r"^error: [\d.]+ GiB of rank 0 do not fit .* It fits \([\d.]+ GiB\) with "
        r"--activation_checkpoint.mode=full$",
        err.splitlines()[-1],
    )


def test_programs_get_the_remedy_too(estimate):
    tight = (*SMALL, "--training.local_batch_size=8", "--reserve", 79.5)
    code, out, _ = estimate(DEBUG, "--json", *tight)
    table = json.loads(out)
    assert (code, table["fits"]) == (1, False)
    assert table["remedy"]["overrides"] == ["--activation_checkpoint.mode=full"]
    assert table["remedy"]["world_size"] == 1
    assert table["remedy"]["peak"] <= 0.5 * 2**30 < table["memory"]["peak"]


@pytest.mark.slow
def test_the_largest_model_on_a_thousand_ranks_is_planned_within_a_minute():
    config = TRAIN_CONFIGS / "mot" / "70B_3modality.toml"
    command = [sys.executable, SCRIPT, config, "--world-size", "1024"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "1024 x h100-80g: TP 8 x FSDP 128" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((DEBUG, "--device", "gtx"), "--device gtx: must be one of a100-40g"),
        ((DEBUG, "--model.flavor=nothing"), "model.flavor = 'nothing'"),
        (("nothing.toml",), "nothing.toml: cannot be read"),
        ((DEBUG, "--world-size", 2, "--rank", 2), "--rank 2: must be from 0 to 1"),
        ((DEBUG, "--world-size", 0), "--world-size 0: must be 1 or more"),
        ((DEBUG, "--sweep"), "--sweep: needs --world-size"),
        ((DEBUG, "--sweep", "--world-size", 2, "--rank", 1), "--rank: does not go with --sweep"),
        ((DEBUG, "--config", DEBUG), "--config: the configuration is the first argument"),
        ((DEBUG, "--parallelism.tensor_parallel_degree=2"), "--world-size: is missing"),
        ((DEBUG, "--optimizer.early_step_in_backward"), "optimizer.early_step_in_backward = true"),
        ((DEBUG, "--reserve", "-1"), "--reserve -1.0: must be a number of GiB"),
    ],
)
def test_bad_input_is_one_message(arguments, message, estimate):
    code, out, err = estimate(*arguments)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
