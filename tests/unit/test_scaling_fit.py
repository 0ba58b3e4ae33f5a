"""Scaling studies: fitted laws, event files, and the report of made-up numbers."""

import csv
import json

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from torchtitan_mixtures.studies import scaling_fit, scaling_report, scaling_scalars
from torchtitan_mixtures.studies.chart import Line, Panel, Point, Span, draw_chart, log_ticks
from torchtitan_mixtures.studies.scaling_file import Metric
from torchtitan_mixtures.studies.scaling_fit import Sample

SIZES = (3e5, 1e6, 2e6, 7e6, 2e7)


def samples_of(law, sizes=SIZES, seeds=1, noise=0.0, rng=None):
    draw = np.random.default_rng(0) if rng is None else rng
    return [
        Sample(f"s{number}", x, law(x) * float(np.exp(noise * draw.normal())))
        for number, x in enumerate(sizes)
        for _ in range(seeds)
    ]


# --- fits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_known_law_is_recovered(seeds):
    law = scaling_fit.fit_power_law(samples_of(lambda x: 30 * x**-0.12, seeds=seeds))
    assert (law.scale, law.exponent) == (pytest.approx(30), pytest.approx(0.12))
    assert (law.low, law.high) == (pytest.approx(0.12), pytest.approx(0.12))
    assert law.num_sizes == 5 and law.at(1e6) == pytest.approx(30 * 1e6**-0.12)
    assert (law.band[0].x, law.band[-1].x) == (pytest.approx(3e5), pytest.approx(2e7))
    for point in law.band:
        assert (point.low, point.high) == (pytest.approx(law.at(point.x)),) * 2


def test_a_law_with_a_floor_is_recovered_and_without_one_the_floor_is_zero():
    found = scaling_fit.fit_with_floor(samples_of(lambda x: 1.7 + 400 * x**-0.4))
    assert found == pytest.approx((1.7, 400, 0.4), rel=1e-3)
    plain = scaling_fit.fit_with_floor(samples_of(lambda x: 30 * x**-0.12))
    assert plain == pytest.approx((0, 30, 0.12), abs=1e-6)


def test_the_t_interval_is_that_of_the_textbook():
    samples = samples_of(lambda x: 9 * x**-0.2, noise=0.05)
    law = scaling_fit.fit_power_law(samples)
    assert law.method == scaling_fit.REGRESSION
    x, y = np.log([s.x for s in samples]), np.log([s.y for s in samples])
    design = np.stack([np.ones_like(x), x], axis=1)
    weights, *_ = np.linalg.lstsq(design, y)
    variance = ((y - design @ weights) ** 2).sum() / 3
    covariance = variance * np.linalg.inv(design.T @ design)
    reach = 3.182446 * np.sqrt(covariance[1, 1])  # of a table, 3 degrees of freedom
    assert law.exponent == pytest.approx(-weights[1])
    assert (law.low, law.high) == pytest.approx((-weights[1] - reach, -weights[1] + reach))
    row = np.array([1, np.log(law.band[0].x)])
    reach = 3.182446 * np.sqrt(row @ covariance @ row)
    ends = np.exp(row @ weights + reach * np.array([-1, 1]))
    assert (law.band[0].low, law.band[0].high) == pytest.approx(tuple(ends))


def test_quantiles_of_t_are_those_of_tables():
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 31: 2.0395}
    assert {n: round(scaling_fit.t_quantile(n), 4) for n in table} == table


@pytest.mark.parametrize(("seeds", "least", "most"), [
    (1, 0.90, 0.99), (2, 0.90, 0.99), (3, 0.90, 0.99), (6, 0.84, 0.98),
])  # fmt: skip
def test_intervals_cover_the_law_about_as_often_as_they_say(seeds, least, most):
    # Of six seeds a bootstrap of percentiles is a little too narrow.
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        samples = samples_of(lambda x: 9 * x**-0.2, seeds=seeds, noise=0.03, rng=rng)
        law = scaling_fit.fit_power_law(samples)
        assert law.method == (scaling_fit.BOOTSTRAP if seeds == 6 else scaling_fit.REGRESSION)
        hits += law.low <= 0.2 <= law.high
    assert least < hits / 200 < most


def test_a_size_of_a_single_seed_makes_it_a_regression():
    samples = samples_of(lambda x: 9 * x**-0.2, seeds=2, noise=0.01)[:-1]
    assert scaling_fit.fit_power_law(samples).method == scaling_fit.REGRESSION


def test_what_cannot_be_fitted_is_said():
    samples = samples_of(lambda x: 9 * x**-0.2)
    assert scaling_fit.obstacle(samples) == ""
    assert scaling_fit.obstacle(samples[:2]) == "2 of at least 3 sizes are done"
    assert "above 0" in scaling_fit.obstacle([*samples, Sample("s9", 1e9, -0.1)])
    assert "above 0" in scaling_fit.obstacle([*samples, Sample("s9", 1e9, float("nan"))])
    same = [Sample(f"s{number}", 5.0, 1.0) for number in range(3)]
    assert "same place" in scaling_fit.obstacle(same)


# --- event files ----------------------------------------------------------------------------------


def write_events(folder, values, start):
    """Write scalars `{tag: {step: value}}` as a process that began at some time would."""
    writer = SummaryWriter(str(folder))
    for tag, rows in values.items():
        for step, value in rows.items():
            writer.add_scalar(tag, value, step, walltime=start + step)
    writer.close()


def test_steps_that_were_trained_twice_count_as_the_last_time(tmp_path):
    # The files are not read in the order of their names or folders.
    write_events(tmp_path / "b", {"loss": {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.5}}, 1000)
    write_events(tmp_path / "a", {"loss": {3: 7.25, 5: 5.0}, "new": {5: 1.0}}, 2000)
    write_events(tmp_path / "c", {}, 3000)
    found = scaling_scalars.read_scalars(tmp_path)
    assert found == {"loss": {1: 9.0, 2: 8.0, 3: 7.25, 4: 6.5, 5: 5.0}, "new": {5: 1.0}}
    assert scaling_scalars.read_scalars(tmp_path / "none") == {}


def test_an_event_file_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path):
    write_events(tmp_path, {"loss": {1: 9.0, 2: 8.0, 3: 7.0}}, 1000)
    (path,) = tmp_path.glob("events*")
    path.write_bytes(path.read_bytes()[:-5])
    assert scaling_scalars.read_scalars(tmp_path) == {"loss": {1: 9.0, 2: 8.0}}


def test_the_metric_is_of_the_last_step_or_none():
    scalars = {"loss": {10: 5.0, 20: 3.0, 30: 2.0}}
    assert scaling_scalars.metric_of(scalars, Metric("loss"), 30) == 2.0
    assert scaling_scalars.metric_of(scalars, Metric("loss", last=2), 30) == 2.5
    assert scaling_scalars.metric_of(scalars, Metric("loss"), 40) is None
    assert scaling_scalars.metric_of(scalars, Metric("other"), 30) is None


def test_seconds_count_every_step_once():
    # A mean of 2 s over steps 2 to 5, of 1 s over 6 to 10: restarts and validations change nothing.
    scalars = {scaling_scalars.SECONDS: {1: 7.0, 5: 2.0, 10: 1.0}}
    assert scaling_scalars.training_seconds(scalars) == 7 + 4 * 2 + 5 * 1
    assert scaling_scalars.training_seconds({}) == 0


# --- the report -----------------------------------------------------------------------------------

LAW = (("MoT", 28.0, 0.12), ("dense", 30.0, 0.11))


@pytest.fixture
def finished(tmp_path):
    """A study with made-up numbers: five sizes of two lines, of which one run is under way."""
    runs = {}
    for label, scale, exponent in LAW:
        for number, size in enumerate(SIZES):
            facts = {"stored": 2 * size, "active": size, "non_embedding": size - 5}
            facts = {key: round(value) for key, value in facts.items()}
            name = f"{label}-size{number}-0"
            runs[name] = {"label": label, "flavor": f"size{number}", "seed": 0, "steps": 4}
            runs[name] |= {"facts": facts | {"flops_per_token": 6 * round(size)}, "job": {}}
            values = {
                "loss": {2: 9.0, 4: scale * size**-exponent},
                scaling_scalars.SECONDS: {2: size / 1e6, 4: size / 1e6},
                scaling_scalars.TOKENS: {2: 50.0, 4: 100.0},
            }
            folder = tmp_path / "runs" / name
            if name == "dense-size4-0":
                values = {tag: {2: rows[2]} for tag, rows in values.items()}
            else:
                (folder / "checkpoint" / "step-4").mkdir(parents=True)
                (folder / "checkpoint" / "step-4" / ".metadata").write_text("")
            write_events(folder, values, 1000)
    settings = {"name": "made up", "metric": {"tag": "loss", "last": 1}, "runs": runs}
    (tmp_path / "protocol.json").write_text(json.dumps(settings))
    return tmp_path


def test_the_report_has_all_scalars_a_row_a_run_and_the_laws(finished):
    text = scaling_report.write_report(finished)
    assert text + "\n" == (finished / "report.md").read_text()
    assert "9 of 10 runs are done" in text and "Not done: dense-size4-0 (step 2)." in text
    row = "| MoT | size1 | 1 | 2,000,000 | 1,000,000 | 999,995 | 6,000,000 | 100 | 6e+08 | 4.0 |"
    assert row in text
    assert "| active parameters | dense | 30 | 0.1100 | 0.1100 to 0.1100 (t-interval" in text
    rows = {row["run"]: row for row in csv.DictReader((finished / "runs.csv").open())}
    assert list(next(iter(rows.values()))) == list(scaling_scalars.SUMMARY_COLUMNS)
    assert (rows["dense-size4-0"]["done"], rows["dense-size4-0"]["metric"]) == ("False", "")
    assert float(rows["MoT-size0-0"]["training_flops"]) == 100 * 6 * 3e5
    scalars = list(csv.DictReader((finished / "scalars.csv").open()))
    assert len(scalars) == 9 * 6 + 3
    first = {"run": "MoT-size0-0", "label": "MoT", "flavor": "size0", "seed": "0", "step": "2"}
    assert first | {"tag": "loss", "value": "9.0"} in scalars
    fits = json.loads((finished / "report.json").read_text())["fits"]
    axes = ["parameters", "non_embedding_parameters", "training_flops", "seconds"]
    assert list(fits) == axes
    # The sizes of the fixture without 5 parameters each: the same law but for little.
    inner = fits["non_embedding_parameters"]["MoT"]["power law"]
    assert inner["exponent"] == pytest.approx(0.12, rel=1e-4) and inner["exponent"] != 0.12
    assert inner["band"][0][0] == pytest.approx(SIZES[0] - 5)
    assert fits["seconds"]["MoT"]["power law"]["exponent"] == pytest.approx(0.12, rel=1e-4)
    assert fits["parameters"]["MoT"]["with floor"]["exponent"] == pytest.approx(0.12, rel=1e-2)
    assert fits["parameters"]["dense"]["with floor"] == "4 of at least 5 sizes are done"
    assert (finished / "chart.png").is_file()


def test_a_report_of_few_sizes_says_that_there_is_no_fit(finished):
    settings = json.loads((finished / "protocol.json").read_text())
    settings["runs"] = dict(list(settings["runs"].items())[:2])
    for facts in (run["facts"] for run in settings["runs"].values()):
        facts["active"] = None  # as of families that do not count them
    (finished / "protocol.json").write_text(json.dumps(settings))
    text = scaling_report.write_report(finished)
    assert text.count("no fit: 2 of at least 3 sizes are done") == 4
    assert "not counted" in text and "floor" not in text
    (row, _) = json.loads((finished / "report.json").read_text())["runs"]
    assert scaling_report.parameters_of(row) == row["stored_parameters"]


def test_what_is_no_number_is_null_and_runs_that_failed_are_named(finished, monkeypatch):
    law = scaling_fit.PowerLaw(float("inf"), 0.1, float("nan"), 0.2, "made up", 3, [])
    monkeypatch.setattr(scaling_fit, "fit_power_law", lambda samples: law)
    failure = finished / "runs" / "dense-size4-0" / "failure.json"
    failure.write_text(json.dumps({"reason": "dense-size4-0: out of luck"}))
    # Of a run that is done by now nothing is said.
    failure = finished / "runs" / "dense-size3-0" / "failure.json"
    failure.write_text(json.dumps({"reason": "long ago"}))
    text = scaling_report.write_report(finished)
    assert "Failed (last logged step: 2): dense-size4-0: out of luck" in text
    assert "Not done" not in text and "long ago" not in text
    report = json.loads((finished / "report.json").read_text())
    json.dumps(report, allow_nan=False)
    assert report["failed"] == {"dense-size4-0": "dense-size4-0: out of luck"}
    found = report["fits"]["seconds"]["MoT"]["power law"]
    assert (found["scale"], found["low"], found["high"]) == (None, None, 0.2)


def test_sizes_too_close_together_for_a_law_are_said_and_the_report_is_written(finished):
    settings = json.loads((finished / "protocol.json").read_text())
    for number, run in enumerate(settings["runs"].values()):
        run["facts"]["active"] = 1_000_000 + number
    (finished / "protocol.json").write_text(json.dumps(settings))
    text = scaling_report.write_report(finished)
    assert text.count("| active parameters | MoT | - | - | no fit: sizes lie too close") == 1


def test_a_folder_without_a_study_is_no_report(tmp_path):
    with pytest.raises(ValueError, match="holds no scaling study; begin it"):
        scaling_report.write_report(tmp_path)


# --- charts ---------------------------------------------------------------------------------------


def test_a_logarithmic_chart_draws_a_power_law_straight():
    places = [(x, 8 * x**-0.5) for x in (1.0, 10.0, 100.0)]
    points = [Point(x, y) for x, y in places]
    bare = draw_chart([Panel("p", [Line("l", points, is_joined=False)], True)], "x", "y")
    dots = np.argwhere((bare[:250] == 0).all(-1))
    inner = dots[(dots[:, 1] > 190) & (dots[:, 1] < 250) & (dots[:, 0] > 40) & (dots[:, 0] < 240)]
    # The frame is from (52, 30) to (388, 254): the middle dot is in its middle.
    assert np.abs(inner.mean(0) - (142, 220)).max() < 1.5
    band = [Span(x, y * 0.9, y * 1.1) for x, y in places]
    hatched = draw_chart([Panel("p", [Line("l", points, False, False, band=band)], True)], "x", "y")
    columns = hatched[:250, 219:222] == 170  # two thirds white: every second one
    rows = np.argwhere(columns.all(-1).any(1))[:, 0]
    height = 224 * np.log(1.1 / 0.9) / (1.1 * np.log(10))  # of the axis, in logarithms
    assert rows.max() - rows.min() == pytest.approx(height, abs=3)
    assert rows.mean() == pytest.approx(142, abs=2)


def test_a_line_without_dots_is_a_line():
    line = Line("l", [Point(1, 5), Point(2, 5)], has_dots=False)
    panels = [Panel("p", [line], x_label="of its own")]
    assert (draw_chart(panels, "x", "y") != draw_chart([Panel("p", [line])], "x", "y")).any()


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (3e5, 7e6, [3e5, 1e6, 3e6]),
        (3.2e5, 7e6, [5e5, 1e6, 2e6, 5e6]),
        (90, 2e6, [100, 1e3, 1e4, 1e5, 1e6]),
        (4.6, 6.9, [5, 5.5, 6, 6.5]),
        (2, 40, [3, 10, 30]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_round_and_within(low, high, ticks):
    assert log_ticks(low, high) == pytest.approx(ticks)
