"""scripts/submit_slurm.sh under stand-ins for Slurm that do on one machine what it does on many."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.jobs import ROOT, TRAIN_CONFIGS

pytestmark = pytest.mark.e2e

SCRIPT = str(ROOT / "scripts" / "submit_slurm.sh")
CONFIG = str(TRAIN_CONFIGS / "mot" / "debugmodel.toml")
JOB = "41234567"  # port 24567

# Each writes down how it was called, and then does what FAKE_* says.
PRELUDE = f"""#!{sys.executable}
import json, os, shutil, subprocess, sys, time
from pathlib import Path
folder, name, words = Path(__file__).parent, Path(__file__).name, sys.argv[1:]
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps([name, *words]) + "\\n")
end = next((i for i, word in enumerate(words) if not word.startswith("--")), len(words))
options = dict(word[2:].partition("=")[::2] for word in words[:end])
"""
FAKES = {
    # Runs a copy of the script with the arguments after it, on this "node".
    "sbatch": """
shutil.copy(words[end], folder / "slurm_script")
exported = dict(item.split("=", 1) for item in options["export"].split(",")[1:])
nodes = [f"node{i}" for i in range(int(options["nodes"]))]
job = {"SLURM_JOB_ID": os.environ["FAKE_JOB"], "SLURM_JOB_NUM_NODES": options["nodes"],
       "SLURM_JOB_NODELIST": ",".join(nodes), "SLURM_SUBMIT_DIR": os.getcwd()}
sys.exit(subprocess.run(["bash", folder / "slurm_script", *words[end + 1:]],
                        cwd=options["chdir"], env={**os.environ, **job, **exported}).returncode)
""",
    # Starts the command once for every node, or pretends to.
    "srun": """
if os.environ["FAKE_SRUN"] == "run":
    running = [subprocess.Popen(words[end:], env={**os.environ, "SLURM_NODEID": str(node)})
               for node in range(int(options["nodes"]))]
    sys.exit(max(process.wait() for process in running))
while os.environ["FAKE_SRUN"] == "wait" and not (folder / "finish").exists():
    time.sleep(0.05)
sys.exit(int(os.environ.get("FAKE_STATUS", 0)))
""",
    "scontrol": """
if words[0] == "requeue":
    sys.exit(int(os.environ.get("FAKE_REQUEUE", 0)))
print(words[2].replace(",", "\\n"))
""",
}


@pytest.fixture
def slurm(tmp_path):
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, body in FAKES.items():
        (folder / name).write_text(PRELUDE + body)
        (folder / name).chmod(0o755)
    shutil.copy(SCRIPT, folder / "slurm_script")
    return folder


def calls(slurm: Path) -> list[list[str]]:
    path = slurm / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def environment(slurm: Path | None, **variables: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k != "NGPU" and not k.startswith("SLURM_")}
    path = [str(slurm)] if slurm else []
    path += [str(Path(sys.executable).parent), os.environ["PATH"]]
    return inherited | {
        "PATH": ":".join(path), "VIRTUAL_ENV": sys.prefix, "FAKE_SRUN": "pretend", "FAKE_JOB": JOB,
    } | variables  # fmt: skip


def allocation(nodes: str = "gpu7", **variables: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": nodes, "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NUM_NODES": str(len(nodes.split(","))), **variables,
    }  # fmt: skip


def run(script, *words, slurm=None, cwd=ROOT, **variables) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *words], cwd=cwd, env=environment(slurm, **variables),
        capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def expected_srun(
    nodes: int, processes: int, first: str, *overrides: str, config: str = CONFIG
) -> list[str]:
    return [
        "srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--export=ALL",
        "--kill-on-bad-exit=1", "--label", "python", "scripts/launch.py", f"--nnodes={nodes}",
        f"--nproc_per_node={processes}", "--rdzv_backend=c10d", f"--rdzv_endpoint={first}:24567",
        f"--rdzv_id={JOB}", "--local-ranks-filter", "0", "--role", "rank", "--tee", "3",
        "-m", "torchtitan_mixtures.train", "--config", config, *overrides,
    ]  # fmt: skip


def test_dry_run_prints_the_command_and_does_nothing(slurm, tmp_path):
    result = run(
        SCRIPT, "mot/debugmodel.toml", "--training.steps", "5", "--nodes", "4", "--time=1-00:00:00",
        "--gpus-per-node", "8", "--account", "a b", "--partition", "gpu", "--dry-run",
        "--sbatch-arg=--comment=it's", "--sbatch-arg", "--exclusive", "--optimizer.lr", "-1e-3",
        "--job.description", "two words", slurm=slurm, cwd=TRAIN_CONFIGS,
    )  # fmt: skip
    assert result.returncode == 0 and result.stderr == ""
    assert shlex.split(result.stdout) == [
        "sbatch", "--job-name=debugmodel", "--nodes=4", "--ntasks-per-node=1", f"--chdir={ROOT}",
        "--output=outputs/slurm/%x-%j.out", "--gpus-per-node=8", "--export=ALL,NGPU=8",
        "--time=1-00:00:00", "--account=a b", "--partition=gpu", "--comment=it's", "--exclusive",
        SCRIPT, CONFIG, "--", "--training.steps", "5", "--optimizer.lr", "-1e-3",
        "--job.description", "two words",
    ]  # fmt: skip
    assert result.stdout.count("\n") == 1
    assert calls(slurm) == []


def test_dry_run_needs_no_slurm_and_takes_the_number_of_processes_of_train():
    four, no_gpus = (
        shlex.split(run(SCRIPT, CONFIG, "--dry-run", *words, **variables).stdout)
        for words, variables in (((), {"NGPU": "4"}), (("--gpus-per-node=0",), {}))
    )
    assert {"--nodes=1", "--gpus-per-node=4", "--export=ALL,NGPU=4"} <= set(four)
    assert not [word for word in no_gpus if "gpu" in word.lower()]


def test_a_submission_runs_torchrun_on_every_node_with_the_words_given(slurm, tmp_path):
    awkward = [
        "--job.description", "it's \"two\"  words, $HOME `x` \\ *\nnext; done",
        f"--job.dump_folder={tmp_path / 'a run'}", "--checkpoint.no-enable",
    ]  # fmt: skip
    result = run(
        SCRIPT, CONFIG, "--nodes=2", "--gpus-per-node=3", "--job-name", "my job", *awkward,
        slurm=slurm, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    sbatch, hostnames, srun = calls(slurm)
    assert "--job-name=my job" in sbatch
    assert hostnames == ["scontrol", "show", "hostnames", "node0,node1"]
    assert srun == expected_srun(2, 3, "node0", *awkward)
    assert result.stderr.startswith("warning: checkpoint.enable is false: ")
    assert result.stderr.count("\n") == 1
    # Nothing is left where the command was given.
    assert [path.name for path in tmp_path.iterdir()] == ["slurm"]


def test_a_mistake_in_a_key_is_told_before_submission(slurm):
    result = run(SCRIPT, CONFIG, "--training.stepz", "5", slurm=slurm)
    assert result.returncode != 0
    assert "stepz" in result.stdout + result.stderr
    assert calls(slurm) == []


@pytest.mark.parametrize("where", [".", "scripts"])
def test_given_to_sbatch_itself_it_finds_the_checkout(slurm, where):
    """Slurm runs a copy elsewhere, in the folder of the submission."""
    result = run(
        slurm / "slurm_script", CONFIG, "--training.steps", "5", slurm=slurm, cwd=ROOT / where,
        **allocation("gpu7,gpu9", SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_TASK="48"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = expected_srun(2, 8, "gpu7", "--training.steps", "5")
    expected.insert(expected.index("python"), "--cpus-per-task=48")
    assert calls(slurm)[-1] == expected
    assert shlex.split(result.stdout.splitlines()[-1]) == expected


def test_directives_of_the_file_stand_before_any_command():
    lines = Path(SCRIPT).read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    directives = {line.split()[1] for line in lines[:first] if line.startswith("#SBATCH")}
    assert {"--requeue", "--signal=B:USR1@120", "--open-mode=append"} <= directives


@pytest.mark.parametrize("refused", [False, True])
def test_near_the_time_limit_the_job_is_requeued_and_goes_on_until_slurm_ends_it(slurm, refused):
    variables = allocation(FAKE_SRUN="wait", FAKE_STATUS="7", FAKE_REQUEUE=str(int(refused)))
    job = subprocess.Popen(
        ["bash", str(slurm / "slurm_script"), CONFIG], cwd=ROOT, text=True,
        env=environment(slurm, **variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

    def wait_for(name: str) -> None:
        for _ in range(600):
            if any(call[:2] == name.split() or call[0] == name for call in calls(slurm)):
                return
            time.sleep(0.05)
        raise AssertionError(f"no {name} in {calls(slurm)}")

    wait_for("srun")
    job.send_signal(signal.SIGUSR1)
    wait_for("scontrol requeue")
    job.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    assert job.poll() is None
    (slurm / "finish").touch()
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == 7  # that of srun
    assert [c for c in calls(slurm) if c[1] == "requeue"] == [["scontrol", "requeue", JOB]]
    assert f"job {JOB} goes back into the queue" in printed
    assert ("warning: it could not be requeued" in printed) == refused


def test_a_global_batch_that_the_ranks_cannot_share_is_told_before_the_job_waits(slurm):
    batch = ["--training.global_batch_size", "24", "--training.local_batch_size", "4"]
    result = run(SCRIPT, CONFIG, "--nodes=2", "--gpus-per-node=4", *batch, slurm=slurm)
    assert result.returncode == 2 and calls(slurm) == []
    message = "x data-parallel ranks (8) = 32. Possible local_batch_size: 1, 3."
    assert "global_batch_size = 24" in result.stderr and message in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no configuration: bash scripts/submit_slurm.sh CONFIG.toml"),
        (["none.toml"], "none.toml: no such configuration"),
        ([CONFIG, "--nodez", "2"], "unknown option --nodez."),
        ([CONFIG, "-N", "2"], "--sbatch-arg=-N"),
        ([CONFIG, "--nodes", "two"], "--nodes two: must be a whole number"),
        ([CONFIG, "--nodes=0"], "--nodes 0: must be a whole number"),
        ([CONFIG, "--nodes"], "--nodes needs a value"),
        ([CONFIG, "--time", "--nodes=2"], "--time needs a value"),
        ([CONFIG, "--gpus-per-node", "-1"], "--gpus-per-node -1: must be a whole number"),
        ([CONFIG, "more.toml"], "'more.toml' after the configuration"),
        ([CONFIG], "sbatch is not on PATH"),
    ],
)
def test_bad_input_gets_one_message(words, message):
    result = run(SCRIPT, *words)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert message != "sbatch is not on PATH" or "--dry-run" in result.stderr


@pytest.mark.parametrize(
    ("words", "cwd", "message"),
    [
        (["--nodes=2"], ROOT, "--nodes, but this already runs in Slurm job"),
        ([], ROOT.parent, "is not the checkout of torchtitan_mixtures"),
    ],
)
def test_bad_input_in_a_job_gets_one_message(slurm, words, cwd, message):
    variables = allocation() | {"SLURM_SUBMIT_DIR": str(cwd)}
    result = run(slurm / "slurm_script", CONFIG, *words, slurm=slurm, cwd=cwd, **variables)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and message in result.stderr
    assert calls(slurm) == []


def test_two_nodes_meet_train_and_resume(slurm, tmp_path):
    """A rendezvous of two torchruns on this machine; the job that follows goes on."""
    words = (
        CONFIG, "--training.seq_len=128", "--training.local_batch_size=1", "--metrics.log_freq=1",
        "--training.global_batch_size=2", "--lr_scheduler.warmup_steps=1",
        "--validation.no_enable", "--sampling.interval=0", f"--job.dump_folder={tmp_path / 'run'}",
        "--metrics.no_enable_tensorboard", "--lr_scheduler.total_steps=4",
        "--checkpoint.interval=2",
    )  # fmt: skip
    steps = {}
    for last in (2, 4):
        result = run(
            slurm / "slurm_script", *words, f"--training.steps={last}", slurm=slurm,
            **allocation("localhost,localhost", FAKE_SRUN="run", NGPU="1", OMP_NUM_THREADS="1"),
        )  # fmt: skip
        printed = result.stdout + result.stderr
        assert result.returncode == 0, printed[-5000:]
        assert "Applied FSDP to the model" in printed
        steps[last] = sorted(set(re.findall(r"step: +(\d+) .*loss: ", printed)))
    assert steps == {2: ["1", "2"], 4: ["3", "4"]}
