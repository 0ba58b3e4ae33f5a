"""`scripts/experts.py` as users call it."""

from __future__ import annotations

import runpy
import sys

import pytest

from tests.checkpoints import save_tiny_mixdiff
from tests.jobs import ROOT
from torchtitan_mixtures.expert_folder import read_mixture
from torchtitan_mixtures.sampling import command


def experts(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["experts.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "experts.py"), run_name="__main__")


@pytest.fixture
def run(tmp_path):
    save_tiny_mixdiff(tmp_path / "run")
    return tmp_path / "run"


def test_a_folder_is_made_shown_changed_and_drawn_from(run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "experts"
    experts(monkeypatch, "export", "--checkpoint", run, "--out", folder)
    experts(monkeypatch, "show", "--mixture", folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    assert lines[1].split() == ["name", "model", "parameters", "M", "multiply-adds", "routed"]
    assert lines[2].split() == ["noto", "mom/debugmodel_dit", "1,291,616", "56.2", "yes"]
    assert lines[5] == "router: transformer on prompt, latent, time; top 2"

    source = folder / "experts" / "noto"
    experts(monkeypatch, "add", "--mixture", folder, "--expert", f"sketch={source}")
    out = capsys.readouterr().out
    line = out.splitlines()[5].split()
    assert line[0] == "sketch" and line[-1] == "no"
    assert "sketch is not used until a job has taught the router: diffusers.start" in out

    experts(monkeypatch, "replace", "--mixture", folder, "--expert", f"fluent={source}")
    for name in ("sketch", "noto_v1", "fluent"):
        experts(monkeypatch, "remove", "--mixture", folder, "--name", name)
    assert "top_k was 2 and is 1 now" in capsys.readouterr().out
    assert read_mixture(folder).names == ("noto",)

    shape = ["--class-labels", "0", "--num-samples", "1", "--num-steps", "2"]
    command.main(["--checkpoint", str(folder), "--out", str(tmp_path / "out"), *shape])
    assert (tmp_path / "out" / "grid.png").is_file()
    shape[1:2] = ["0", "1"]
    command.main(["--checkpoint", str(source), "--out", str(tmp_path / "one"), *shape])
    assert (tmp_path / "one" / "grid.png").is_file()


def test_experts_are_assembled(run, tmp_path, monkeypatch, capsys):
    experts(monkeypatch, "export", "--checkpoint", run, "--out", tmp_path / "a")
    pairs = [f"--expert={name}={tmp_path}/a/experts/{name}" for name in ("fluent", "noto")]
    experts(monkeypatch, "assemble", *pairs, "--out", tmp_path / "b")
    assert "The router is new and gives all experts alike" in capsys.readouterr().out
    assert read_mixture(tmp_path / "b").names == ("fluent", "noto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "--mixture", "nowhere"], "error: nowhere: is no folder of experts"),
        (["export", "--checkpoint", "nowhere", "--out", "x"], "error: nowhere: no such folder"),
        (
            ["add", "--mixture", "x", "--expert", "noto"],
            "error: --expert noto: must be NAME=FOLDER",
        ),
        (["remove", "--mixture", "x", "--name", "noto"], "error: x: is no folder of experts"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        experts(monkeypatch, *arguments)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(message)
