"""Notebooks of `scripts/examples`: in git as they are before anyone runs them, and they run."""

import ast
import contextlib
import io
import json

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

from tests.jobs import ROOT, debug_job
from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.models.mone import mone_args
from torchtitan_mixtures.models.mone.model import MoNE

FOLDER = ROOT / "scripts" / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_of(path):
    return ["".join(c["source"]) for c in read(path)["cells"] if c["cell_type"] == "code"]


def execute(path, last_cell=None):
    """Run cells as a kernel would; return the names, what each cell shows, what is printed."""
    names, shown, printed = {"__name__": "__main__"}, [], io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, source in enumerate(code_of(path)[:last_cell]):
            tree, where = ast.parse(source), f"{path.name}[{number}]"
            is_shown = isinstance(tree.body[-1], ast.Expr)
            last = ast.Expression(tree.body.pop().value) if is_shown else ast.Constant(None)
            exec(compile(tree, where, "exec"), names)
            shown.append(eval(compile(last, where, "eval"), names) if is_shown else None)
    return names, shown, printed.getvalue()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_valid_and_hold_no_outputs(path):
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert isinstance(cell["source"], list) and isinstance(cell["metadata"], dict)
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
        else:
            assert cell["cell_type"] == "markdown" and "outputs" not in cell
    text = json.dumps(notebook, indent=1) + "\n"
    assert path.read_text(encoding="utf-8") == text  # as tools write it: small differences in git


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """All of the notebook, in an empty folder, after a training of a few steps."""
    folder = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.delenv("CHECKPOINT", raising=False)
        patched.setenv("STEPS", "8")
        result = execute(FOLDER / "mone.ipynb")
    assert not list(folder.iterdir())
    return result


def test_the_notebook_shows_eight_pictures_and_their_routing(executed):
    _, shown, _ = executed
    pictures = [value for value in shown if isinstance(value, Image.Image)]
    side = 3 * 32 + 8
    assert [picture.size for picture in pictures] == [(8 * side, 4 * side)]


def test_experts_of_a_picture_are_as_many_as_the_table_says(executed):
    names, _, printed = executed
    row = next(line for line in printed.splitlines() if line.split()[:1] == ["0.4"])
    assert row.split() == ["0.4", "21,", "18,", "15,", "10", "24.0", "44%"]
    for experts in names["experts_of"](names["test_images"][:5], 0.4):
        assert np.bincount(experts.ravel(), minlength=4).tolist() == [21, 18, 15, 10]


def test_the_overlay_puts_the_colour_of_an_expert_over_its_patch(executed):
    names, _, _ = executed
    experts = np.zeros((1, 8, 8), np.int64)
    experts[0, 2, 5] = 3
    drawn = names["overlay"](np.zeros((1, 32, 32, 3)), experts)
    red = (drawn[0] == 0.5 * names["COLORS"][3]).all(-1)
    assert red[8:12, 20:24].all() and red.sum() == 16


def test_the_notebook_counts_right_answers_at_each_capacity(executed):
    names, _, printed = executed
    assert "loss of the last of 8 steps" in printed
    assert [row[0] for row in names["results"]] == list(names["CAPACITIES"])
    images, labels = names["test_images"], names["test_labels"]
    with torch.no_grad():
        logits = names["model"](images, names["args"].budget(0.2)).logits
    learned = names["results"][0][2]
    assert learned == pytest.approx((logits.argmax(1) == labels).double().mean().item(), abs=0.005)
    # All patches at the largest expert: nothing to choose.
    _, _, learned, by_chance = names["results"][-1]
    assert learned == pytest.approx(by_chance, abs=0.005)


def test_the_notebook_finds_a_checkpoint_from_its_own_folder(tmp_path, monkeypatch):
    job = debug_job("mone")
    args = mone_args["debugmodel"]
    args.update_from_config(job)
    model = MoNE(args)
    model.init_weights()
    torch.nn.init.constant_(model.head.bias, 0.5)
    folder = tmp_path / "outputs" / "run" / "checkpoint" / "step-7"
    checkpoint_config.write(folder, job, args)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dcp.save(weights, checkpoint_id=folder, no_dist=True)
    here = tmp_path / "scripts" / "examples"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("CHECKPOINT", "outputs/run")
    names, _, printed = execute(FOLDER / "mone.ipynb", last_cell=4)
    assert "step 7" in printed and "loss of the last" not in printed
    assert (names["model"].head.bias == 0.5).all()
