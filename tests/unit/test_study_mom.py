"""The study of MoM beside DiT: work that can be stopped, and its report of made-up numbers."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from tests.jobs import ROOT, load_job
from torchtitan_mixtures.data.emoji import SPLITS
from torchtitan_mixtures.models.mom import mom_args
from torchtitan_mixtures.studies import comparison, mom_vs_dit
from torchtitan_mixtures.studies.pieces import (
    Command,
    Piece,
    Processes,
    note_settings,
    only_one,
    run_pieces,
)


@pytest.fixture(scope="module")
def study():
    """`scripts/study_mom.py` as a module."""
    path = ROOT / "scripts" / "study_mom.py"
    spec = importlib.util.spec_from_file_location("study_mom", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["study_mom"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class FakeProcesses(Processes):
    """Notes commands instead of running them, and is interrupted at some of them."""

    def __init__(self, folder, broken=(), error=ValueError):
        super().__init__(folder / "logs")
        self.ran, self.broken, self.error, self.is_ended = [], broken, error, False

    def run(self, piece, command):
        self.ran.append(command.done.name)
        if command.done.name in self.broken:
            raise self.error(f"{command.done.name} fell over")
        command.done.write_text("done")

    def stop(self):
        self.is_ended = True


def pieces_of(folder, count=3):
    return [
        Piece(
            f"p{n}",
            [Command(["train"], folder / f"train{n}"), Command(["test"], folder / f"test{n}")],
        )
        for n in range(count)
    ]


def test_a_study_goes_on_with_the_command_it_was_stopped_in(tmp_path):
    first = FakeProcesses(tmp_path, ["test1"])
    with pytest.raises(ValueError, match="test1 fell over"):
        run_pieces(pieces_of(tmp_path), 1, first)
    assert first.ran == ["train0", "test0", "train1", "test1"]  # no other piece is begun
    second = FakeProcesses(tmp_path)
    said = []
    run_pieces(pieces_of(tmp_path), 1, second, said.append)
    assert second.ran == ["test1", "train2", "test2"]
    assert said[0] == "1 of 3 pieces are done"
    third = FakeProcesses(tmp_path)
    run_pieces(pieces_of(tmp_path), 2, third)
    assert third.ran == []


def test_a_command_that_leaves_nothing_is_no_success(tmp_path):
    processes = FakeProcesses(tmp_path)
    processes.run = lambda piece, command: None
    with pytest.raises(ValueError, match=r"p0: .*train.* left no .*train0"):
        run_pieces(pieces_of(tmp_path), 1, processes)


def test_an_interrupt_ends_what_is_running(tmp_path, monkeypatch):
    processes = FakeProcesses(tmp_path)

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("torchtitan_mixtures.studies.pieces.wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_pieces(pieces_of(tmp_path), 1, processes)
    assert processes.is_ended


def test_processes_log_what_they_print_and_failures_name_the_log(tmp_path):
    processes = Processes(tmp_path / "logs")
    done = tmp_path / "done"
    code = f"import os; print(os.environ['WORD']); open({str(done)!r}, 'w')"
    good = Command([sys.executable, "-c", code], done, {"WORD": "hello"})
    run_pieces([Piece("good", [good])], 1, processes)
    assert (tmp_path / "logs" / "good.txt").read_text() == "hello\n"
    bad = Command([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "never")
    with pytest.raises(ValueError, match=r"bad: a command ended with code 3; see .*bad\.txt"):
        run_pieces([Piece("bad", [bad])], 1, processes)


def test_processes_that_are_stopped_end_and_none_begins(tmp_path):
    processes = Processes(tmp_path)
    sleep = Command([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "never")
    original = subprocess.Popen.wait

    def wait_stopped(self, *arguments):
        processes.stop()
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(subprocess.Popen, "wait", wait_stopped)
        with pytest.raises(ValueError, match="code -15"):
            processes.run(Piece("asleep", [sleep]), sleep)
    with pytest.raises(ValueError, match="asleep: stopped"):
        processes.run(Piece("asleep", [sleep]), sleep)


def test_a_folder_holds_one_study_at_a_time_and_of_one_protocol(tmp_path):
    with only_one(tmp_path / "out"):
        note_settings(tmp_path / "out", {"steps": 3})
        note_settings(tmp_path / "out", {"steps": 3})
        with (
            pytest.raises(ValueError, match="another study works in it"),
            only_one(tmp_path / "out"),
        ):
            pass
    with (
        only_one(tmp_path / "out"),
        pytest.raises(ValueError, match=r"study of \{'steps': 3\}, not of \{'steps': 4\}"),
    ):
        note_settings(tmp_path / "out", {"steps": 4})


def test_trainings_differ_in_flavour_and_seed_alone(study, tmp_path):
    protocol = study.Protocol(steps=7)
    pieces = study.make_pieces(tmp_path, protocol, [0, 4])
    assert [piece.name for piece in pieces[:2]] == ["references", "debugmodel-0"]
    assert len({piece.name for piece in pieces}) == 7
    jobs = {}
    for piece in pieces[1:]:
        train, measure = piece.commands
        assert train.done == tmp_path / "runs" / piece.name / "checkpoint/step-7/.metadata"
        assert measure.arguments[-2:] == ["--run", piece.name]
        assert study.parse(measure.arguments[2:]).run == piece.name
        start = train.arguments.index("--config") + 2
        job = load_job(study.CONFIG, *train.arguments[start:]).to_dict()
        flavor, seed = job["model"].pop("flavor"), job["debug"].pop("seed")
        assert job["multimodal"].pop("seed") == seed
        assert job["job"].pop("dump_folder") == str(tmp_path / "runs" / piece.name)
        job["job"].pop("custom_config_module", None)
        assert job["training"]["steps"] == 7 and job["ema"]["decay"] == 0.995
        jobs[flavor, seed] = job
    assert {flavor for flavor, _ in jobs} == set(mom_vs_dit.FLAVORS)
    first = jobs["debugmodel_dit", 0]
    assert all(job == first for job in jobs.values())


def test_the_matched_model_costs_what_the_baseline_costs():
    costs = {flavor: mom_args[flavor].total_macs_per_image() for flavor in mom_vs_dit.FLAVORS}
    assert costs["debugmodel_matched"] == costs["debugmodel_dit"]


def test_differences_are_of_equal_seeds():
    measured = {"dit": {0: {"x": 1.0}, 1: {"x": 5.0}}, "mom": {1: {"x": 4.0}, 2: {"x": 0.0}}}
    gaps = comparison.differences(measured, ["x"], "dit")
    assert gaps == {"mom": {"x": comparison.Summary(-1.0, None, {1: -1.0})}}
    assert comparison.differences({"mom": measured["mom"]}, ["x"], "dit") == {}
    found = comparison.summarise(measured, ["x"])["dit"]["x"]
    assert (found.mean, found.deviation) == (3.0, pytest.approx(8**0.5))
    assert str(found) == "3.0000 +- 2.8284"


@pytest.fixture
def finished(tmp_path):
    """A study with made-up numbers: the matched model is better by 0.1, 0.2 and 0.3."""
    rng = np.random.default_rng(0)
    (tmp_path / "results").mkdir()
    for flavor, offset in (("debugmodel_dit", 0.0), ("debugmodel_matched", -0.1)):
        for seed in range(3):
            loss = 1.0 + seed + offset * (1 + seed)
            levels = {"0.25": {"loss": loss - 0.5}, "0.75": {"loss": loss + 0.5}}
            content = {
                "flavor": flavor,
                "seed": seed,
                "macs_per_image": 5e7,
                "parameters": 2_000_000,
                "active_parameters": 1_000_000,
                "splits": {split: {"loss": loss, "levels": levels} for split in SPLITS},
                "frechet": 10 * loss,
            }
            name = f"{flavor}-{seed}"
            (tmp_path / "results" / f"{name}.json").write_text(json.dumps(content))
            images = rng.integers(0, 256, (4, 32, 32, 3), np.uint8)
            np.save(tmp_path / "results" / f"{name}.npy", images)
    references = {
        "classes": [2, 0, 2, 1],
        "accuracy": {split: {"group": 0.66, "style": 0.87} for split in SPLITS},
        "rows": {"uniform noise": {"frechet": 77.125, "images": 4}},
    }
    (tmp_path / "references.json").write_text(json.dumps(references))
    np.save(tmp_path / "references.npy", rng.integers(0, 256, (4, 32, 32, 3), np.uint8))
    return tmp_path


def test_the_report_compares_by_seed(study, finished, capsys):
    study.main(["report", "--out", str(finished)])
    printed = capsys.readouterr().out
    assert printed.strip() == (finished / "report.md").read_text().strip()
    assert "| debugmodel_dit | 50.0 | 2.00 (1.00) | 3 | 2.0000 +- 1.0000 |" in printed
    row = "| debugmodel_matched | loss, train | -0.2000 +- 0.1000 | -0.1000, -0.2000, -0.3000 |"
    assert row in printed
    assert "| uniform noise | 4 | 77.125 |" in printed
    assert "| 0.75 | 2.5000 +- 1.0000 | 2.3000 +- 0.9000 |" in printed
    report = json.loads((finished / "report.json").read_text())
    gap = report["differences to debugmodel_dit"]["debugmodel_matched"]["frechet"]
    assert gap["mean"] == pytest.approx(-2.0)
    assert set(report["models"]) == {"debugmodel_dit", "debugmodel_matched"}
    assert len(report["results"]) == 6
    assert (finished / "samples.png").is_file()


def test_the_sheet_has_an_image_of_each_class_and_a_row_for_each_model(finished, monkeypatch):
    rows = []
    monkeypatch.setattr(mom_vs_dit, "contact_sheet", rows.extend)
    results = [json.loads(path.read_text()) for path in (finished / "results").glob("*.json")]
    mom_vs_dit.draw_sheet(finished, results, [2, 0, 2, 1])
    labels = ["real drawings", "debugmodel_dit, seed 0", "debugmodel_matched, seed 0"]
    assert [row.label for row in rows] == labels
    drawn = np.load(finished / "results" / "debugmodel_dit-0.npy")
    assert (np.stack(rows[1].images) == drawn[[1, 3, 0]]).all()


def test_a_report_of_nothing_says_so(study, tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main(["report", "--out", str(tmp_path)])
    assert "holds no finished piece of a study" in capsys.readouterr().err
