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
from torchtitan_mixtures.checkpoint_loading import load_model
from torchtitan_mixtures.classifier_config import Nested
from torchtitan_mixtures.data.image_sets import EmojiImages
from torchtitan_mixtures.evaluation.classification import answer
from torchtitan_mixtures.models.mone import mone_args
from torchtitan_mixtures.models.mone.model import MoNE
from torchtitan_mixtures.objectives.classification import lengthen_to_same_flops
from torchtitan_mixtures.studies import mone_capacities, mone_report
from torchtitan_mixtures.studies.bootstrap import paired_interval
from torchtitan_mixtures.studies.chart import COLORS, Line, Panel, Point, draw_chart, nice_ticks
from torchtitan_mixtures.studies.mone_capacities import (
    ADAPTIVE,
    CAPACITIES,
    DENSE,
    FIXED,
    NARROW,
    RANDOM,
    SAME_FLOPS,
    SPLITS,
    VARIANTS,
)
from torchtitan_mixtures.studies.mone_results import Results


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
    assert len(pieces) == len({piece.name for piece in pieces}) == 2 * 13
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
        keys = ("capacity", "schedule", "routing", "same_flops", "alpha_init")
        flavor = job["model"].pop("flavor")
        kinds.add((flavor, asked.variant, *(nested.pop(key) for key in keys)))
        jobs.append((job, nested))
    assert all(job == jobs[0] for job in jobs)
    nested, epr = "debugmodel", "expert_preferred"
    no, own = Nested().capacity, Nested().alpha_init  # as the flavour says
    assert kinds == {
        ("debugmodel_dense", "dense", no, "constant", "", False, own),
        ("debugmodel_dense_64", "dense 64", no, "constant", "", False, own),
        ("debugmodel_dense_96", "dense 96", no, "constant", "", False, own),
        *((nested, f"fixed {c}", c, "constant", epr, False, own) for c in (0.2, 0.4, 0.6, 0.8)),
        (nested, "adaptive", no, "adaptive", epr, False, own),
        (nested, "fixed 0.2, alpha 0.1", 0.2, "constant", epr, False, 0.1),
        (nested, "adaptive, alpha 0.1", no, "adaptive", epr, False, 0.1),
        *((nested, f"random {c}", c, "constant", "random", False, own) for c in (0.2, 0.6)),
        (nested, "same FLOPs 0.4", 0.4, "constant", epr, True, own),
    }


def test_narrow_models_cost_what_nested_ones_do(study):
    for narrow, capacity in zip(NARROW, (0.2, 0.6), strict=True):
        nested, dense = mone_capacities.model_args(FIXED[0]), mone_capacities.model_args(narrow)
        cost = nested.macs_per_image(nested.budget(capacity))
        assert dense.dense_macs_per_image == pytest.approx(cost, rel=0.1)


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
    assert len(ran[0][1]) == 13 and ran[1][1] == ["times"]
    assert json.loads((tmp_path / "protocol.json").read_text())["steps"] == study.Protocol().steps


# --- measuring ------------------------------------------------------------------------------------


def save_tiny(study, folder, variant, seed=5):
    """A run of a small model whose weights are all off where they began."""
    job = load_job(study.CONFIG, *study.Protocol(steps=3).overrides(variant, seed))
    args = mone_args[job.model.flavor]
    args.dim, args.n_layers, args.n_heads = 32, 1, 4
    args.update_from_config(job)
    model = MoNE(args)
    model.init_weights()
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # the head begins at zero
    step = folder / "runs" / "x" / "checkpoint" / "step-3"
    checkpoint_config.write(step, job, args)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dcp.save(weights, checkpoint_id=step, no_dist=True)
    return initial, weights


def measure(folder, variant, capacities=(0.2, 0.4, 1.0)):
    mone_capacities.measure_run(folder, "x", variant, capacities, 1)
    path = folder / "results" / "x.json"
    return json.loads(path.read_text()), np.load(path.with_suffix(".npz"))


def capacities_of(result, routing):
    return [row["capacity"] for row in result["asked"][routing]["unseen_concept"]]


def test_a_dense_model_is_asked_as_it_is(study, tmp_path):
    save_tiny(study, tmp_path, DENSE)
    result, _ = measure(tmp_path, DENSE)
    assert (result["variant"], result["seed"], result["step"]) == ("dense", 5, 3)
    assert list(result["asked"]) == ["own"] and result["router"] is None
    assert capacities_of(result, "own") == [1.0]
    (row,) = result["asked"]["own"]["unseen_concept"]
    assert row["macs_per_image"] == result["dense_macs_per_image"]


def test_a_nested_model_is_asked_with_three_routings(study, tmp_path):
    variant = FIXED[1]
    initial, weights = save_tiny(study, tmp_path, variant)
    result, images = measure(tmp_path, variant)
    assert capacities_of(result, "own") == [0.2, 0.4, 1.0]
    assert capacities_of(result, "untrained") == capacities_of(result, "random") == [0.4]
    own = result["asked"]["own"]["unseen_concept"][1]
    losses = {own["loss"]}
    for routing in ("untrained", "random"):
        (row,) = result["asked"][routing]["unseen_concept"]
        assert row["macs_per_image"] == own["macs_per_image"]
        losses.add(row["loss"])
    assert len(losses) == 3
    for metric, number in (("unseen_concept loss", "loss"), ("unseen_concept", "accuracy")):
        of_images = images[f"own/0.4/{metric}"]
        assert of_images.shape == (64,)
        assert of_images.mean() == pytest.approx(own[number], rel=1e-5)
    router, name = result["router"], "routers.0.weight"
    assert router["alpha"] == pytest.approx(weights["router_scale.alpha"].item())
    a, b = initial[name].flatten().double(), weights[name].flatten().double()
    assert router["cosine"] == pytest.approx((a @ b / a.norm() / b.norm()).item(), rel=1e-5)
    assert 0 < router["entropy"] < np.log(4)


def test_an_untrained_router_is_that_of_the_first_step_in_the_trained_model(study, tmp_path):
    initial, weights = save_tiny(study, tmp_path, ADAPTIVE)
    loaded = load_model(tmp_path / "runs" / "x")
    put_back = mone_capacities.with_untrained_router(loaded).model.state_dict()
    for name, value in put_back.items():
        expected = initial if name.startswith("routers.") else weights
        assert torch.equal(value, expected[name]), name
    assert not torch.equal(put_back["routers.0.weight"], weights["routers.0.weight"])


def test_random_routing_is_a_mean_of_draws(study, tmp_path):
    save_tiny(study, tmp_path, RANDOM[0])
    result, images = measure(tmp_path, RANDOM[0], (0.2,))
    assert list(result["asked"]) == ["own"]  # it has no other routing
    loaded = load_model(tmp_path / "runs" / "x")
    draws = [answer(loaded, "unseen_style", [0.2], 1, draw)[0.2].losses for draw in range(5)]
    assert len({draw.sum().item() for draw in draws}) == 5
    expected = torch.stack(draws).mean(0).numpy()
    assert images["own/0.2/unseen_style loss"] == pytest.approx(expected, rel=1e-5)


def test_numbers_of_images_say_which_they_are(study, tmp_path):
    save_tiny(study, tmp_path, DENSE)
    _, images = measure(tmp_path, DENSE)
    drawings = EmojiImages("unseen_concept", "group", 32)
    loaded = load_model(tmp_path / "runs" / "x")
    classes = answer(loaded, "unseen_concept", [1.0], 1)[1.0].classes[:, 0]
    numbers = images["numbers/unseen_concept"]
    assert [drawings.read(int(n)).label for n in numbers] == classes.tolist()


def test_times_are_of_all_capacities_beside_the_dense_model(tmp_path, monkeypatch):
    def clock(runs, rounds, **options):
        shapes = {name: tuple(run().logits.shape) for name, run in runs.items()}
        assert set(shapes.values()) == {(64, 8)}
        return {name: [2.0 + index] * rounds for index, name in enumerate(runs)}

    monkeypatch.setattr(benchmark, "time_interleaved", clock)
    mone_capacities.measure_times(tmp_path, 4)
    found = json.loads((tmp_path / "times.json").read_text())
    assert found["settings"]["rounds"] == 4
    assert list(found["forward"]) == [
        "dense",
        "dense again",
        "dense 64",
        "dense 96",
        *(f"{c:g}" for c in CAPACITIES),
    ]
    assert found["forward"]["0.2"]["ratio"] == [3.0, 3.0, 3.0]
    assert found["forward"]["dense"]["milliseconds_per_image"] == pytest.approx(2000 / 64)


# --- reporting ------------------------------------------------------------------------------------


def write_made_up(folder, variant, seed, right, **lost):
    """A model that gives so many right answers of 100, at any capacity; less with other routing."""
    found = next(v for v in VARIANTS if v.name == variant)
    arrays = {f"numbers/{split}": np.arange(100) for split in SPLITS}

    def rows(routing, hits, capacities):
        for capacity in capacities:
            for split in SPLITS:
                key = f"{routing}/{capacity:g}/{split}"
                arrays[key] = (np.arange(100) < hits).astype(np.float32)
                arrays[f"{key} loss"] = np.full(100, 2 - hits / 100, np.float32)
        return {
            split: [
                {
                    "capacity": capacity,
                    "effective_capacity": capacity - 0.01 * found.is_nested,
                    "macs_per_image": 12_500_000 if found in NARROW else int(50e6 * capacity),
                    "loss": 2 - hits / 100,
                    "accuracy": hits / 100,
                }
                for capacity in capacities
            ]
            for split in SPLITS
        }

    asked = {"own": rows("own", right, CAPACITIES if found.is_nested else (1.0,))}
    for routing, points in lost.items():
        asked[routing] = rows(routing, right - points, found.controlled)
    result = {
        "variant": variant,
        "seed": seed,
        "dense_macs_per_image": 12_500_000 if found in NARROW else 50_000_000,
        "asked": asked,
        "train_accuracy": 0.9,
        "router": {"alpha": 0.25, "entropy": 1.3, "cosine": 0.9} if found.is_nested else None,
    }
    path = folder / "results" / f"{variant}-{seed}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result))
    np.savez(path.with_suffix(".npz"), **arrays)


@pytest.fixture
def finished(tmp_path):
    """A study with made-up numbers: MoNE at 0.2 is worse than dense by 1, 2 and 3 points."""
    for seed in range(3):
        write_made_up(tmp_path, "dense", seed, 60 + seed)
        write_made_up(tmp_path, "dense 64", seed, 50)
        write_made_up(tmp_path, "fixed 0.2", seed, 59, untrained=1, random=4)
        write_made_up(tmp_path, "random 0.2", seed, 57 - seed)
        write_made_up(tmp_path, "adaptive", seed, 58, untrained=2, random=6)
    forward = {
        name: {"milliseconds_per_image": 0.5, "ratio": [0.4, ratio, 0.6]}
        for name, ratio in (("dense", 1.0), ("dense 64", 0.41), ("0.2", 0.46))
    }
    settings = {"batch": 64, "rounds": 9, "threads": 1}
    (tmp_path / "times.json").write_text(json.dumps({"settings": settings, "forward": forward}))
    return tmp_path


def test_the_report_compares_by_seed(study, finished, capsys):
    study.main(["report", "--out", str(finished)])
    printed = capsys.readouterr().out
    assert printed.strip() == (finished / "report.md").read_text().strip()
    assert "The primary metric is the loss on unseen concept" in printed
    dense = "| dense | 1.000 | 50.0 | 1.00 | 1.00 | 3 | 1.390 +- 0.010 | 61.0 +- 1.0 |"
    assert dense in printed
    assert "| dense 64 | 1.000 | 12.5 | 0.25 | 0.41 | 3 | 1.500 +- 0.000 | 50.0" in printed
    assert "| fixed 0.2 at 0.2 | 0.190 | 10.0 | 0.20 | 0.46 | 3 | 1.410 +- 0.000 |" in printed
    assert "| adaptive at 0.3 | 0.290 | 15.0 | 0.30 | - | 3 | 1.420 +- 0.000 |" in printed
    to_dense = "| fixed 0.2 at 0.2 - dense | +0.020 +- 0.010 | +0.010, +0.020, +0.030 | ["
    assert to_dense in printed
    assert "| fixed 0.2 at 0.2 - dense 64 | -0.090 +- 0.000 |" in printed
    assert "| adaptive at 0.2 - dense 64 | -0.080 +- 0.000 |" in printed
    assert "| fixed 0.2 at 0.2 - random 0.2 at 0.2 | -0.030 +- 0.010 | -0.020, -0.030," in printed
    for routing, gap in (("untrained router", "-0.010"), ("random routing", "-0.040")):
        assert f"| fixed 0.2 at 0.2 - fixed 0.2 at 0.2, {routing} | {gap} +- 0.000 |" in printed
    assert "| adaptive at 0.6 - adaptive at 0.6, untrained router | -0.020" in printed
    assert "| fixed 0.2 | **59.0 +- 0.0** | 59.0 +- 0.0 |" in printed
    assert "| fixed 0.2 | 0.250 +- 0.000 | 1.300 +- 0.000 | 0.900 +- 0.000 |" in printed
    assert "| 0.2 | 0.500 | 0.460 [0.400, 0.600] | 0.200 |" in printed
    assert "dense 90.0 +- 0.0, dense 64 90.0" in printed


def test_the_report_is_json_too_and_has_a_picture(finished):
    mone_report.write_report(finished)
    report = json.loads((finished / "report.json").read_text())
    gap = report["differences to dense"]["adaptive at 0.6 - dense"]["unseen_style"]
    assert gap["mean"] == pytest.approx(-3.0) and len(gap["values"]) == 3
    low, high = gap["interval_95"]
    assert low < -3.0 < high
    assert report["primary metric"] == "unseen_concept loss"
    assert report["times"]["settings"]["rounds"] == 9 and len(report["results"]) == 15
    with Image.open(finished / mone_report.PICTURE) as picture:
        assert picture.width == 2 * 400  # a panel for each split


def test_a_report_of_one_seed_without_times_leaves_out_what_it_lacks(tmp_path):
    write_made_up(tmp_path, "fixed 0.4", 0, 40)
    text = mone_report.write_report(tmp_path)
    assert "| fixed 0.4 at 0.4 | 0.390 | 20.0 | 0.40 | - | 1 | 1.600 | 40.0 |" in text
    assert "+-" not in text and "Differences" not in text and "Time forward" not in text


def test_a_report_of_nothing_says_so(study, tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main(["report", "--out", str(tmp_path)])
    assert "holds no finished training" in capsys.readouterr().err


def test_the_picture_has_the_points_of_every_model_it_names(finished):
    panels = mone_report.make_panels(Results.read(finished))
    assert [panel.title for panel in panels] == ["unseen concept", "unseen style"]
    lines = {line.label: line for line in panels[0].lines}
    assert lines["dense"].is_level and lines["dense"].points == [Point(50.0, 61.0, 1.0)]
    assert lines["dense, narrower"].points == [Point(12.5, 50.0, 0.0)]
    adaptive = lines["one for all (adaptive)"].points
    assert [point.x for point in adaptive] == pytest.approx([50 * c for c in CAPACITIES])
    assert "trained for as many FLOPs as dense" not in lines
    times = json.loads((finished / "times.json").read_text())
    timed = {
        p.label: p.points for p in mone_report.make_panels(Results.read(finished), times)[0].lines
    }
    assert timed["dense"] == [Point(1.0, 61.0, 1.0)]
    assert timed["dense, narrower"] == [Point(0.41, 50.0, 0.0)]
    assert [point.x for point in timed["one for all (adaptive)"]] == [0.46]  # no others were timed


# --- intervals ------------------------------------------------------------------------------------


def test_an_interval_is_as_wide_as_the_error_of_the_mean():
    rng = np.random.default_rng(1)
    values = rng.normal(0.3, 2.0, 400)
    low, high = paired_interval(values[None], range(400))
    error = values.std() / 20
    assert (low, high) == pytest.approx(
        (values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error
    )
    # Four drawings of each of 100 emoji, answered alike, say no more than a hundred drawings do.
    alike = values[:100].repeat(4)
    grouped = paired_interval(alike[None], np.arange(100).repeat(4).tolist())
    assert grouped == pytest.approx(paired_interval(values[None, :100], range(100)))


def test_an_interval_holds_the_differences_between_seeds():
    values = np.array([[1.0], [2.0], [6.0]]).repeat(50, axis=1)
    assert paired_interval(values, range(50)) == (1.0, 6.0)  # 1 and 6 thrice are each 1 in 27
    assert paired_interval(values[:1], range(50)) == (1.0, 1.0)


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
