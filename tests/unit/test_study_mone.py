"""The study of MoNE at several capacities: its trainings, its measurements, its report."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

from tests.jobs import ROOT, load_job
from torchtitan_mixtures import benchmark, checkpoint_config
from torchtitan_mixtures.models.mone import mone_args
from torchtitan_mixtures.models.mone.model import MoNE
from torchtitan_mixtures.objectives.classification import lengthen_to_same_flops
from torchtitan_mixtures.studies import mone_capacities, mone_report
from torchtitan_mixtures.studies.chart import COLORS, Line, Panel, Point, draw_chart, nice_ticks
from torchtitan_mixtures.studies.mone_capacities import CAPACITIES, SAME_FLOPS, SPLITS, VARIANTS


@pytest.fixture(scope="module")
def study():
    """`scripts/study_mone.py` as a module."""
    path = ROOT / "scripts" / "study_mone.py"
    spec = importlib.util.spec_from_file_location("study_mone", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["study_mone"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# --- trainings ------------------------------------------------------------------------------------


def test_trainings_differ_in_model_and_seed_alone(study, tmp_path):
    pieces = study.make_pieces(tmp_path, study.Protocol(steps=70), [0, 4])
    assert len(pieces) == len({piece.name for piece in pieces}) == 2 * 9
    jobs, kinds = [], set()
    for piece in pieces:
        train, measure = piece.commands
        asked = study.parse(measure.arguments[2:])
        assert asked.run == piece.name
        assert measure.done == tmp_path / "results" / f"{piece.name}.json"
        config, *overrides = train.arguments[3:]
        assert config == f"--config={study.CONFIG}"
        job = load_job(study.CONFIG, *overrides).to_dict()
        assert job["job"].pop("dump_folder") == str(tmp_path / "runs" / piece.name)
        seed = job["debug"].pop("seed")
        assert job["multimodal"].pop("seed") == seed and piece.name.endswith(f"-{seed}")
        assert job["training"]["steps"] == 70
        nested = job.pop("nested")
        keys = ("capacity", "schedule", "routing", "same_flops")
        flavor = job["model"].pop("flavor")
        kinds.add((flavor, asked.variant, *(nested.pop(key) for key in keys)))
        jobs.append((job, nested))
    assert all(job == jobs[0] for job in jobs)
    nested, epr = "debugmodel", "expert_preferred"
    assert kinds == {
        ("debugmodel_dense", "dense", 0.0, "constant", "", False),
        *((nested, f"fixed {c}", c, "constant", epr, False) for c in (0.2, 0.4, 0.6, 0.8)),
        (nested, "adaptive", 0.0, "adaptive", epr, False),
        *((nested, f"random {c}", c, "constant", "random", False) for c in (0.2, 0.6)),
        (nested, "same FLOPs 0.4", 0.4, "constant", epr, True),
    }


def test_the_study_knows_how_long_a_training_of_equal_flops_is(study, tmp_path):
    protocol = study.Protocol(steps=70)
    job = load_job(study.CONFIG, *protocol.overrides(SAME_FLOPS, 0))
    lengthen_to_same_flops(job)
    piece = study.make_pieces(tmp_path, protocol, [0])[0]
    assert piece.name == "same-FLOPs-0.4-0"
    assert job.training.steps > 2 * 70
    assert f"/step-{job.training.steps}/" in str(piece.commands[0].done)


def test_time_is_measured_alone_and_last(study, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        study,
        "run_pieces",
        lambda pieces, jobs, *rest: ran.append((jobs, [piece.name for piece in pieces])),
    )
    monkeypatch.setattr(study, "leave_on_sigterm", lambda: None)
    monkeypatch.setattr(study, "report", lambda options: None)
    study.main(["run", "--out", str(tmp_path), "--jobs", "3", "--seeds", "0"])
    assert [jobs for jobs, _ in ran] == [3, 1]
    assert len(ran[0][1]) == 9 and ran[1][1] == ["times"]
    assert json.loads((tmp_path / "protocol.json").read_text())["steps"] == study.Protocol().steps


# --- measuring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["dense", "fixed 0.4", "random 0.2"])
def test_a_model_is_asked_at_every_capacity_and_with_random_routing(study, tmp_path, variant):
    found = next(v for v in VARIANTS if v.name == variant)
    job = load_job(study.CONFIG, *study.Protocol(steps=3).overrides(found, 5))
    args = mone_args[job.model.flavor]
    args.dim, args.n_layers = 32, 1
    args.update_from_config(job)
    model = MoNE(args)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # the head begins at zero
    folder = tmp_path / "runs" / "x" / "checkpoint" / "step-3"
    checkpoint_config.write(folder, job, args)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dcp.save(weights, checkpoint_id=folder, no_dist=True)

    mone_capacities.measure_run(tmp_path, "x", variant, (0.2, 1.0), 1)
    result = json.loads((tmp_path / "results" / "x.json").read_text())
    assert (result["variant"], result["seed"], result["step"]) == (variant, 5, 3)
    assert result["train"]["images"] == 64
    rows = result["splits"]["unseen_concept"]
    if variant == "dense":
        assert [row["capacity"] for row in rows] == [1.0] and result["random"] is None
        assert rows[0]["macs_per_image"] == result["dense_macs_per_image"]
        return
    assert [row["capacity"] for row in rows] == [0.2, 1.0]
    if variant == "random 0.2":
        assert result["random"] is None  # it has no other routing
        return
    by_chance = result["random"]["unseen_concept"]
    assert by_chance[0]["loss"] != rows[0]["loss"]
    assert by_chance[0]["macs_per_image"] == rows[0]["macs_per_image"]
    # All patches at the largest expert: nothing to choose, but for the order of patches.
    assert by_chance[1]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)


def test_times_are_of_all_capacities_beside_the_dense_model(tmp_path, monkeypatch):
    def clock(runs, rounds, **options):
        shapes = {name: tuple(run().logits.shape) for name, run in runs.items()}
        assert set(shapes.values()) == {(64, 8)}
        return {name: [2.0 + index] * rounds for index, name in enumerate(runs)}

    monkeypatch.setattr(benchmark, "time_interleaved", clock)
    mone_capacities.measure_times(tmp_path, 4)
    found = json.loads((tmp_path / "times.json").read_text())
    assert found["settings"]["rounds"] == 4
    assert list(found["forward"]) == ["dense", "dense again", *(f"{c:g}" for c in CAPACITIES)]
    assert found["forward"]["0.2"]["ratio"] == [2.0, 2.0, 2.0]
    assert found["forward"]["dense"]["milliseconds_per_image"] == pytest.approx(2000 / 64)


# --- reporting ------------------------------------------------------------------------------------


def made_up(variant, seed, right, lost_by_chance=0):
    """A result of a model that gives so many right answers of 100, at any capacity."""
    nested = variant != "dense"

    def rows(hits):
        return {
            split: [
                {
                    "capacity": capacity,
                    "effective_capacity": capacity - 0.01 * nested,
                    "macs_per_image": int(50e6 * capacity),
                    "loss": 2 - hits / 100,
                    "accuracy": {"share": hits / 100},
                }
                for capacity in (CAPACITIES if nested else (1.0,))
            ]
            for split in SPLITS
        }

    has_router = nested and not variant.startswith("random")
    return {
        "variant": variant,
        "seed": seed,
        "dense_macs_per_image": 50_000_000,
        "splits": rows(right),
        "train": {"accuracy": {"share": 0.9}},
        "random": rows(right - lost_by_chance) if has_router else None,
    }


@pytest.fixture
def finished(tmp_path):
    """A study with made-up numbers: MoNE at 0.2 is worse than dense by 1, 2 and 3 points."""
    (tmp_path / "results").mkdir()
    for seed in range(3):
        for number, result in enumerate(
            [
                made_up("dense", seed, 60 + seed),
                made_up("fixed 0.2", seed, 59, lost_by_chance=4),
                made_up("random 0.2", seed, 57 - seed),
                made_up("adaptive", seed, 58, lost_by_chance=6),
            ]
        ):
            path = tmp_path / "results" / f"{number}-{seed}.json"
            path.write_text(json.dumps(result))
    forward = {
        name: {"milliseconds_per_image": 0.5, "ratio": [0.4, ratio, 0.6]}
        for name, ratio in (("dense", 1.0), ("0.2", 0.46))
    }
    settings = {"batch": 64, "rounds": 9, "threads": 1}
    (tmp_path / "times.json").write_text(json.dumps({"settings": settings, "forward": forward}))
    return tmp_path


def test_the_report_compares_by_seed(study, finished, capsys):
    study.main(["report", "--out", str(finished)])
    printed = capsys.readouterr().out
    assert printed.strip() == (finished / "report.md").read_text().strip()
    dense = "| dense | 1.000 | 50.0 | 1.00 | 1.00 | 3 | 61.0 +- 1.0 | 1.390 +- 0.010 |"
    assert dense in printed
    assert "| fixed 0.2 at 0.2 | 0.190 | 10.0 | 0.20 | 0.46 | 3 | 59.0 +- 0.0 |" in printed
    assert "| adaptive at 0.3 | 0.290 | 15.0 | 0.30 | - | 3 | 58.0 +- 0.0 |" in printed
    assert "| fixed 0.2 at 0.2 - dense | -2.0 +- 1.0 | -1.0, -2.0, -3.0 |" in printed
    trained_so = "| fixed 0.2 at 0.2 - random 0.2 at 0.2 | +3.0 +- 1.0 | +2.0, +3.0, +4.0 |"
    assert trained_so in printed
    asked_so = "| fixed 0.2 at 0.2 - fixed 0.2 at 0.2, random routing | +4.0 +- 0.0 |"
    assert asked_so in printed
    assert "| fixed 0.2 | **59.0 +- 0.0** | 59.0 +- 0.0 |" in printed
    assert "| 0.2 | 0.500 | 0.460 [0.400, 0.600] | 0.200 |" in printed
    assert "dense 90.0 +- 0.0, fixed 0.2 90.0" in printed


def test_the_report_is_json_too_and_has_a_picture(finished):
    mone_report.write_report(finished)
    report = json.loads((finished / "report.json").read_text())
    gap = report["differences to dense"]["adaptive at 0.6 - dense"]["unseen_style"]
    assert gap["mean"] == pytest.approx(-3.0) and len(gap["values"]) == 3
    assert report["times"]["settings"]["rounds"] == 9 and len(report["results"]) == 12
    with Image.open(finished / mone_report.PICTURE) as picture:
        assert picture.width == 2 * 400  # a panel for each split


def test_a_report_of_one_seed_without_times_leaves_out_what_it_lacks(tmp_path):
    (tmp_path / "results").mkdir()
    content = json.dumps(made_up("fixed 0.4", 0, 40))
    (tmp_path / "results" / "x.json").write_text(content)
    text = mone_report.write_report(tmp_path)
    assert "| fixed 0.4 at 0.4 | 0.390 | 20.0 | 0.40 | - | 1 | 40.0 |" in text
    assert "+-" not in text and "Differences" not in text and "Time forward" not in text


def test_a_report_of_nothing_says_so(study, tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main(["report", "--out", str(tmp_path)])
    assert "holds no finished training" in capsys.readouterr().err


def test_the_picture_has_the_points_of_every_model_it_names(finished):
    results = [json.loads(path.read_text()) for path in (finished / "results").glob("*.json")]
    panels = mone_report.make_panels(mone_report.Results(results))
    assert [panel.title for panel in panels] == ["unseen style", "unseen concept"]
    lines = {line.label: line for line in panels[0].lines}
    assert lines["dense"].is_level and lines["dense"].points == [Point(50.0, 61.0, 1.0)]
    adaptive = lines["adaptive, one model"].points
    assert [point.x for point in adaptive] == pytest.approx([50 * c for c in CAPACITIES])
    assert {point.y for point in lines["the same, random routing"].points} == {52.0}
    assert "trained for as many FLOPs as dense" not in lines


# --- charts ---------------------------------------------------------------------------------------


def test_a_chart_draws_points_where_their_values_are():
    line = Line("x", [Point(0, 10), Point(50, 20), Point(100, 10)], is_joined=False)
    chart = draw_chart([Panel("p", [line])], "x", "y")
    color = np.array([int(COLORS[0][i : i + 2], 16) for i in (1, 3, 5)])
    # Axes of a panel: 52 to 388 and 254 to 30; ticks from 0 to 100 and from 10 to 20.
    for x, y in ((220, 30), (52, 254), (388, 254)):
        assert (chart[y - 1 : y + 2, x - 1 : x + 2] == color).all()


def test_lines_of_one_name_have_one_colour_in_all_panels():
    a, b = Line("a", [Point(1, 1)]), Line("b", [Point(1, 2)])
    alone, both = Panel("p", [b]), Panel("q", [a, b])
    chart = draw_chart([both, alone], "x", "y")
    color = np.array([int(COLORS[1][i : i + 2], 16) for i in (1, 3, 5)])
    for panel in (chart[:300, :400], chart[:300, 400:]):
        assert (panel == color).all(-1).any()


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (41.3, 58.9, [40, 45, 50, 55, 60]),
        (0, 55, [0, 20, 40, 60]),
        (3, 3, [3, 3.2, 3.4, 3.6, 3.8, 4]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, ticks):
    assert nice_ticks(low, high) == pytest.approx(ticks)
