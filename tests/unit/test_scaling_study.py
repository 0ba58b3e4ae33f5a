"""Scaling studies: runs that fail, diverge, are killed and go on, and the command."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.jobs import ROOT, TRAIN_CONFIGS
from torchtitan_mixtures.studies import leash, scaling_runs
from torchtitan_mixtures.studies.pieces import Command, Processes, note_settings
from torchtitan_mixtures.studies.scaling_file import Metric, read_study
from torchtitan_mixtures.studies.scaling_plan import Facts, Run

LADDER = ROOT / "studies" / "mot_ladder.toml"
CONFIG = TRAIN_CONFIGS / "mot" / "debugmodel.toml"
METRIC = Metric("validation/unseen_concept/loss")
STEPS = 4


@pytest.fixture(scope="module")
def script():
    """`scripts/scaling_study.py` as a module."""
    path = ROOT / "scripts" / "scaling_study.py"
    spec = importlib.util.spec_from_file_location("scaling_study", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the runs -------------------------------------------------------------------------------------


def leave_events(folder, values):
    writer = SummaryWriter(str(folder / "tb"))
    for tag, (step, value) in values.items():
        writer.add_scalar(tag, value, step)
    writer.close()


def leave_checkpoint(folder):
    path = folder / "checkpoint" / f"step-{STEPS}" / ".metadata"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")


def some_runs(*names):
    facts = Facts(2, 1, 1, 6)
    return [Run(name, "MoT", name, 0, [], STEPS, facts, {"lr": 1.0}) for name in names]


class FakeProcesses(Processes):
    """Does for each run what it is told to instead of training."""

    def __init__(self, out, **acts):
        super().__init__(out / "logs")
        self.out, self.acts, self.ran = out, acts, []

    def run(self, piece, command):
        self.ran.append(piece.name)
        folder = self.out / "runs" / piece.name
        act = self.acts.get(piece.name, "train")
        if act == "fail":
            raise ValueError(f"{piece.name}: fell over")
        assert not (folder / "checkpoint" / f"step-{STEPS}").exists()
        leave_checkpoint(folder)
        value = float("nan") if act == "diverge" else 2.0
        leave_events(folder, {"other" if act == "forget" else METRIC.tag: (STEPS, value)})


def run_all(out, processes, *names):
    commands = {name: Command([], out / "never") for name in names}
    return scaling_runs.run_all(out, some_runs(*names), METRIC, commands, processes)


def test_a_run_that_fails_is_told_and_the_others_go_on_and_it_is_tried_again(tmp_path):
    first = FakeProcesses(tmp_path, b="fail", c="diverge")
    failures = run_all(tmp_path, first, "a", "b", "c", "d")
    assert first.ran == ["a", "b", "c", "d"]
    assert [failure.run for failure in failures] == ["b", "c"]
    assert failures[0].message == "b: fell over"
    tag = "validation/unseen_concept/loss"
    assert f"c: its {tag} is nan at step 4: it has diverged; give it a" in failures[1].message
    reasons = [scaling_runs.failure_of(tmp_path, name) for name in "abcd"]
    assert reasons == [None, failures[0].message, failures[1].message, None]
    second = FakeProcesses(tmp_path)
    assert run_all(tmp_path, second, "a", "b", "c", "d") == []
    assert second.ran == ["b", "c"]
    assert [scaling_runs.failure_of(tmp_path, name) for name in "bc"] == [None, None]


def test_a_metric_that_is_not_logged_ends_the_study_with_the_first_run(tmp_path):
    said, processes = [], FakeProcesses(tmp_path, a="fail", b="forget")
    commands = {name: Command([], tmp_path / "never") for name in "abcd"}
    runs = some_runs("a", "b", "c", "d")
    failures = scaling_runs.run_all(tmp_path, runs, METRIC, commands, processes, say=said.append)
    assert processes.ran == ["a", "b"]
    assert [failure.run for failure in failures] == ["a", "b"]
    assert "metric.tag = 'validation/unseen_concept/loss': was not logged" in failures[1].message
    assert "there are other. Set one of them" in failures[1].message
    assert said[-1] == "no other run begins: they would end like this"
    # With another metric what was trained is done.
    mended, processes = Metric("other"), FakeProcesses(tmp_path, a="forget", c="forget", d="forget")
    assert scaling_runs.run_all(tmp_path, runs, mended, commands, processes) == []
    assert processes.ran == ["a", "c", "d"]


LOGS = {
    "of a run that said what is wrong": (
        "error: the first\nValueError: of a library\n\x1b[31merror: the last\x1b[0m\nmore\n",
        "it fell. error: the last",
    ),
    "of an exception": (
        "[rank0]: Traceback (most recent call last):\n[rank0]: RuntimeError: out of luck\n" * 2
        + "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n" + "====\n" * 20,
        "it fell. RuntimeError: out of luck",
    ),
    "of a process that was killed": (
        "step: 1\n  exitcode  : -9 (pid: 7)\n  traceback : Signal 9 (SIGKILL) received by PID 7\n",
        "it fell. Signal 9 (SIGKILL) received by PID 7",
    ),
    "of nothing": ("step: 1\n", "it fell."),
}  # fmt: skip


@pytest.mark.parametrize("what", LOGS)
def test_the_reason_is_the_last_word_of_this_try(what, tmp_path):
    text, reason = LOGS[what]
    log = tmp_path / "log.txt"
    assert scaling_runs.Failure("a", "it fell.", log).reason() == "it fell."
    log.write_text("error: of an earlier try\n" + text)
    begin = len("error: of an earlier try\n")
    assert scaling_runs.Failure("a", "it fell.", log, begin).reason() == reason


def test_a_run_that_was_killed_before_its_last_validation_does_its_last_steps_again(tmp_path):
    leave_checkpoint(tmp_path / "runs" / "a")
    leave_events(tmp_path / "runs" / "a", {METRIC.tag: (STEPS - 2, 5.0)})
    kept = tmp_path / "runs" / "a" / "checkpoint" / "step-2"
    kept.mkdir()
    processes = FakeProcesses(tmp_path)  # asserts that the last checkpoint is gone
    assert run_all(tmp_path, processes, "a") == []
    assert processes.ran == ["a"] and kept.exists()


def test_a_metric_without_its_checkpoint_is_no_complete_run(tmp_path):
    leave_events(tmp_path / "runs" / "a", {METRIC.tag: (STEPS, 5.0)})
    assert not scaling_runs.is_done(tmp_path, "a", STEPS, METRIC)
    leave_checkpoint(tmp_path / "runs" / "a")
    assert scaling_runs.is_done(tmp_path, "a", STEPS, METRIC)


def test_an_interrupt_ends_what_runs_and_is_no_failure(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(scaling_runs, "wait", interrupt)
    said, processes = [], Processes(tmp_path / "logs")
    sleep = Command([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "never")
    with pytest.raises(KeyboardInterrupt):
        runs = some_runs("a", "b")
        commands = {"a": sleep, "b": sleep}
        scaling_runs.run_all(tmp_path, runs, METRIC, commands, processes, say=said.append)
    assert not any("FAILED" in line for line in said)


def test_another_metric_is_no_other_study(tmp_path):
    study = read_study(LADDER)
    settings = scaling_runs.settings_of(study, some_runs("a"))
    note_settings(tmp_path, settings, changeable=["metric"])
    mended = settings | {"metric": {"tag": "validation/unseen_style/loss", "last": 1}}
    note_settings(tmp_path, mended, changeable=["metric"])
    assert json.loads((tmp_path / "protocol.json").read_text()) == mended
    with pytest.raises(ValueError, match=r"'metric\.tag': 'validation/unseen_style/loss'"):
        note_settings(tmp_path, settings)


def test_a_folder_refuses_a_study_that_differs_and_names_in_what(tmp_path):
    study = read_study(LADDER)
    note_settings(tmp_path, scaling_runs.settings_of(study, some_runs("a", "b")))
    note_settings(tmp_path, scaling_runs.settings_of(study, some_runs("a", "b")))
    other = some_runs("a", "b")
    other[1].job["lr"] = 2.0
    with pytest.raises(
        ValueError,
        match=r"a study of \{'runs\.b\.job\.lr': 1\.0\}, not of \{.*2\.0\}; name another",
    ):
        note_settings(tmp_path, scaling_runs.settings_of(study, other))
    with pytest.raises(ValueError, match=r"not of \{'runs\.c\..* and \d+ more settings; name"):
        note_settings(tmp_path, scaling_runs.settings_of(study, some_runs("a", "b", "c", "d")))


# --- the command ----------------------------------------------------------------------------------


STUDY = f"""
name = "tiny"
seeds = [0, 3]
overrides = [
    "--training.steps={STEPS}", "--training.seq_len=256", "--validation.seq_len=256",
    "--validation.freq=2", "--validation.steps=1", "--metrics.log_freq=2",
    "--checkpoint.interval=2", "--sampling.interval=0", "--lr_scheduler.warmup_steps=1",
]
[metric]
tag = "{METRIC.tag}"
[[runs]]
label = "MoT"
config = "{CONFIG}"
flavors = ["ladder1", "ladder2", "ladder1_dense"]
"""


def study_file(folder, text=STUDY):
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def strict_json(path):
    """Read a file that may hold no NaN, which JSON does not have."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_study_ends_with_code_1_where_runs_fail_and_goes_on_later(
    script, tmp_path, monkeypatch, capsys
):
    path, out = study_file(tmp_path), tmp_path / "out"
    template = tmp_path / "template"
    leave_checkpoint(template)
    leave_events(template, {METRIC.tag: (STEPS, 2.0)})
    is_broken = True

    def fake_command(out, run, study, launcher):
        code = f"import shutil; shutil.copytree({str(template)!r}, {str(out / 'runs' / run.name)!r}"
        code += ", dirs_exist_ok=True)"
        if is_broken and run.name == "MoT-ladder2-0":
            code = "print('error: out of luck'); raise SystemExit(2)"
        return Command([sys.executable, "-c", code], tmp_path / "unused")

    monkeypatch.setattr(script, "command_of", fake_command)
    monkeypatch.setattr(script, "leave_on_sigterm", lambda: None)
    assert script.main([str(path), "--out", str(out), "--jobs", "2"]) == 1
    printed = capsys.readouterr()
    assert "MoT-ladder2-0: FAILED." in printed.out and "5 of 6 runs are done." in printed.out
    (last,) = printed.err.splitlines()
    assert printed.out.index("MoT-ladder2-0: FAILED.") < printed.out.index("# tiny")
    log = out / "logs" / "MoT-ladder2-0.txt"
    assert last.startswith("FAILED: MoT-ladder2-0: a command ended with code 2; see")
    assert str(log) in last and last.endswith("error: out of luck")
    failed = strict_json(out / "report.json")["failed"]
    assert failed == {"MoT-ladder2-0": last.removeprefix("FAILED: ")}
    assert "Not done" not in printed.out and f"step: 0): {failed['MoT-ladder2-0']}" in printed.out
    is_broken = False
    assert script.main([str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("5 of 6 runs are done\nMoT-ladder2-0: begins\n")
    assert strict_json(out / "report.json")["failed"] == {}
    assert script.main([str(path), "--out", str(out), "--report"]) == 0
    assert capsys.readouterr().out.strip() == (out / "report.md").read_text().strip()
    settings = json.loads((out / "protocol.json").read_text())
    assert str(ROOT) not in json.dumps(settings)  # the checkout may be moved


def test_a_dry_run_says_what_would_run_and_leaves_nothing(script, tmp_path, capsys):
    path, out = study_file(tmp_path), tmp_path / "out"
    assert script.main([str(path), "--out", str(out), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "| MoT-ladder1-0 | 405,936 | 350,448 | 202,992 |" in printed
    assert printed.count("launch.py --standalone --nproc_per_node=1") == 6
    assert not out.exists()
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "none.toml")])
    assert "none.toml: cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_that_diverge_and_that_fail_in_the_middle_are_named_and_the_rest_goes_on(
    script, tmp_path, capfd
):
    one_seed = STUDY.replace("[0, 3]", "[0]")
    rates = '[runs.overrides_of]\nladder1 = ["--optimizer.lr=1e30"]\n'
    path, out = study_file(tmp_path, one_seed + rates), tmp_path / "out"
    blocked = out / "runs" / "MoT-ladder2-0" / "checkpoint" / "step-2"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way of the first checkpoint")
    process = [sys.executable, script.__file__, path, "--out", out]
    assert subprocess.run(process, cwd=ROOT).returncode == 1
    printed = capfd.readouterr()
    first, second = printed.err.splitlines()[-2:]
    assert first.startswith("FAILED: MoT-ladder1-0: ") and "training has diverged" in first
    assert second.startswith("FAILED: MoT-ladder2-0: ") and "FileExistsError: " in second
    assert "1 of 3 runs are done." in printed.out
    report = strict_json(out / "report.json")
    assert list(report["failed"]) == ["MoT-ladder1-0", "MoT-ladder2-0"]
    assert [run["done"] for run in report["runs"]] == [False, False, True]
    assert [run["step"] for run in report["runs"]] == [2, 2, STEPS]
    scalars = (out / "scalars.csv").read_text()
    assert "MoT-ladder1-0,MoT,ladder1,0,2,grad_norm,nan" in scalars


# --- the leash ------------------------------------------------------------------------------------


def test_a_leashed_command_has_the_code_it_ends_with():
    command = leash.leashed([sys.executable, "-c", "raise SystemExit(7)"])
    assert subprocess.run(command).returncode == 7
    process = subprocess.Popen(leash.leashed(["sleep", "60"]))
    time.sleep(0.5)
    process.terminate()
    assert process.wait(timeout=20) == 128 + signal.SIGTERM


def test_a_leashed_command_ends_when_its_owner_is_killed(tmp_path):
    # The owner begins a leash, and the command under it says its number and sleeps.
    said = tmp_path / "number"
    command = f"import os, time; open({str(said)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import os, subprocess, sys; "
        f"subprocess.run([sys.executable, {leash.__file__!r}, str(os.getpid()), "
        f"sys.executable, '-c', {command!r}])"
    )
    owner = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 20
    while not (said.exists() and said.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    owner.kill()
    owner.wait()
    while Path(f"/proc/{said.read_text()}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
