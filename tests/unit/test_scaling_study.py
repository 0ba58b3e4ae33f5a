"""Scaling studies: their files, and runs that fail, are killed and go on."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.jobs import ROOT
from torchtitan_mixtures.models.mot import mot_args
from torchtitan_mixtures.studies import leash, scaling_runs
from torchtitan_mixtures.studies.pieces import Command, Processes, note_settings
from torchtitan_mixtures.studies.scaling_file import Facts, Metric, Run, plan_runs, read_study

LADDER = ROOT / "studies" / "mot_ladder.toml"
CONFIG = ROOT / "train_configs" / "mot" / "debugmodel.toml"
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


# --- the file -------------------------------------------------------------------------------------

GOOD = f"""
name = "tiny"
seeds = [0, 3]
overrides = ["--training.steps={STEPS}", "--validation.freq=2", "--metrics.log_freq=2"]
[metric]
tag = "{METRIC.tag}"
[[runs]]
label = "MoT"
config = "{CONFIG}"
flavors = ["ladder1", "ladder2"]
overrides = ["--optimizer.lr=0.5"]
[[runs]]
label = "dense"
config = "{CONFIG}"
flavors = ["ladder1_dense"]
"""


def study_file(folder, *changes):
    """A study's file, with texts replaced by others."""
    text = GOOD
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


def test_each_flavour_is_trained_once_for_each_seed(tmp_path):
    path = study_file(tmp_path)
    study = read_study(path)
    runs = plan_runs(path, study)
    names = ["MoT-ladder1-0", "MoT-ladder1-3", "MoT-ladder2-0", "MoT-ladder2-3"]
    assert [run.name for run in runs] == [*names, "dense-ladder1_dense-0", "dense-ladder1_dense-3"]
    assert study.folder == Path("outputs/studies/tiny")
    mot, dense = runs[1], runs[5]
    assert (mot.seed, mot.job["debug"]["seed"], mot.job["multimodal"]["seed"]) == (3, 3, 3)
    assert (mot.steps, mot.job["optimizer"]["lr"], dense.job["optimizer"]["lr"]) == (4, 0.5, 3e-3)
    # The flavour's, and the rows of 1,024 codes; a vocabulary of 3,072 is looked up.
    assert mot.facts.stored == 307_632 + 2 * 1024 * 48
    assert mot.facts.active == dense.facts.active == dense.facts.stored == 252_144 + 2 * 1024 * 48
    assert mot.facts.non_embedding == mot.facts.active - 3072 * 48
    attention = 12 * 2 * 48 * 2048
    assert mot.facts.flops_per_token == 6 * mot.facts.non_embedding + attention
    command = scaling_runs.train_command(Path("out"), mot, study, ["torchrun"])
    start = ["torchrun", "--standalone", "--nproc_per_node=1", "-m", "torchtitan_mixtures.train"]
    assert command == [*start, *mot.arguments, "--job.dump_folder=out/runs/MoT-ladder1-3"]


BAD = {
    "no TOML": (('name = "tiny"', "name = "), r"not valid TOML"),
    "an unknown key": (("seeds =", "seds ="), r"seds: unknown .*did you mean seeds, threads\?"),
    "an unknown key of an entry": (
        ("flavors = [\"ladder1_dense", "flavor = [\"ladder1_dense"),
        r"runs\[1\]\.flavor: unknown key; did you mean runs\[1\]\.flavors\?",
    ),
    "a missing key": ((f'tag = "{METRIC.tag}"', ""), r"metric\.tag: is missing; set it"),
    "no entries": (("[[runs]]", "[[other]]"), r"runs: one or more \[\[runs\]\]"),
    "a wrong type": (("[0, 3]", '"all"'), r"seeds = 'all': must be a list of an integer"),
    "equal seeds": (("[0, 3]", "[1, 1]"), r"seeds = \[1, 1\]: must be one or more different"),
    "a name that is no folder": (('"tiny"', '"a/b"'), r"name = 'a/b': must be letters"),
    "no flavours": (('["ladder1_dense"]', "[]"), r"runs\[1\]: label = 'dense', flavors = \[\]"),
    "an own key": (
        ("--optimizer.lr=0.5", "--debug.seed=1"),
        r"runs\[0\]\.overrides: '--debug\.seed=1': the study sets debug\.seed itself.*remove it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_refused(what, tmp_path):
    change, message = BAD[what]
    with pytest.raises(ValueError, match=rf"tiny\.toml: {message}"):
        read_study(study_file(tmp_path, change))


BAD_RUNS = {
    "an unknown flavour": (
        ('"ladder2"]', '"ladder9"]'),
        r"runs\[0\] \('MoT'\), flavor 'ladder9': model\.flavor = 'ladder9' is not a flavour of "
        r"'mot'; known flavours: .*ladder4",
    ),
    "an unknown key": (
        ("--optimizer.lr=0.5", "--optimizer.lrr=0.5"),
        r"runs\[0\] .*overrides: Unrecognized options: --optimizer\.lrr=0\.5; did you mean .*--opt",
    ),
    "a value of another type": (
        ("--optimizer.lr=0.5", "--optimizer.lr=fast"),
        r"overrides: Error parsing --optimizer\.lr: could not convert string to float: 'fast'",
    ),
    "a bad value": (("lr=0.5", "lr=-1"), r"'ladder1': optimizer\.lr = -1\.0: must be"),
    "no such configuration": ((str(CONFIG), "no.toml"), r"--config /.*no\.toml: cannot be read"),
    "no checkpoints": (("--optimizer.lr=0.5", "--checkpoint.no_enable"), r"checkpoint\.enable ="),
    "a last step that is not logged": (
        ("log_freq=2", "log_freq=3"),
        r"metrics\.log_freq = 3: must be a divisor of training\.steps = 4",
    ),
    "a last step that is not validated": (
        ("validation.freq=2", "validation.freq=3"),
        r"validation\.freq = 3: must be",
    ),
    "an unknown split": (
        ("unseen_concept", "unseen"),
        r"metric\.tag = 'validation/unseen/loss': must be of a split in .*unseen_concept",
    ),
    "a run that is there twice": (
        ('"dense"', '"MoT"'),
        "nothing",
    ),
    "too many processes": (
        ("seeds =", "nproc_per_node = 3\nseeds ="),
        r"runs\[0\]",
    ),
}


@pytest.mark.parametrize("what", BAD_RUNS)
def test_a_file_with_runs_that_cannot_be_is_refused(what, tmp_path):
    change, message = BAD_RUNS[what]
    changes = [change]
    if what == "a run that is there twice":
        changes.append(('"ladder1_dense"', '"ladder1"'))
        message = r"runs\[1\] .*there is a run 'MoT-ladder1-0' already; give one .* another label"
    if what == "too many processes":
        changes.append(("--optimizer.lr=0.5", "--parallelism.tensor_parallel_degree=2"))
    path = study_file(tmp_path, *changes)
    before = dict(os.environ)
    with pytest.raises(ValueError, match=rf"tiny\.toml: .*{message}"):
        plan_runs(path, read_study(path))
    assert dict(os.environ) == before


def test_the_ladder_compares_equal_active_parameters_and_flops():
    study = read_study(LADDER)
    runs = {run.name: run for run in plan_runs(LADDER, study)}
    assert len(runs) == 4 * 2 * 2
    sizes = []
    for number in range(1, 5):
        mot, dense = runs[f"MoT-ladder{number}-0"], runs[f"dense-ladder{number}_dense-0"]
        assert mot.facts.active == dense.facts.active == dense.facts.stored < mot.facts.stored
        assert mot.facts.flops_per_token == dense.facts.flops_per_token
        rate = 3e-3 * (256 / mot_args[mot.flavor].dim) ** 0.5
        assert mot.job["optimizer"]["lr"] == pytest.approx(rate, rel=2e-3)
        jobs = [mot.job, dense.job, runs["MoT-ladder1-0"].job]
        for job in jobs:
            job["model"] = job["optimizer"]["lr"] = None
        assert jobs[0] == jobs[1] == jobs[2]
        sizes.append(mot.facts.non_embedding)
    assert all(2.5 < b / a < 3.5 for a, b in pairwise(sizes))


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
        values = {METRIC.tag: (STEPS, 2.0)} if act == "train" else {"other": (STEPS, 2.0)}
        leave_events(folder, values)


def run_all(out, processes, *names):
    commands = {name: Command([], out / "never") for name in names}
    return scaling_runs.run_all(out, some_runs(*names), METRIC, commands, processes)


def test_a_run_that_fails_is_told_and_the_others_go_on_and_it_is_tried_again(tmp_path):
    first = FakeProcesses(tmp_path, b="fail", c="forget")
    failures = run_all(tmp_path, first, "a", "b", "c", "d")
    assert first.ran == ["a", "b", "c", "d"]
    assert [failure.run for failure in failures] == ["b", "c"]
    assert failures[0].message == "b: fell over"
    assert "metric.tag = 'validation/unseen_concept/loss': was not logged" in failures[1].message
    assert "there are other" in failures[1].message
    second = FakeProcesses(tmp_path)
    assert run_all(tmp_path, second, "a", "b", "c", "d") == []
    assert second.ran == ["b", "c"]


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
    log = out / "logs" / "MoT-ladder2-0.txt"
    assert last.startswith("FAILED: MoT-ladder2-0: a command ended with code 2; see")
    assert str(log) in last and last.endswith("error: out of luck")
    is_broken = False
    assert script.main([str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("5 of 6 runs are done\nMoT-ladder2-0: begins\n")
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
