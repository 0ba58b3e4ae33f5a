"""The study of Mixture of Diffusers: its data, its jobs, what it measures, its report."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints import save_tiny_mixdiff
from tests.jobs import ROOT, load_job
from torchtitan_mixtures.checkpoint_loading import load_model
from torchtitan_mixtures.checks import check_job
from torchtitan_mixtures.data.domain_file import write_domain_file
from torchtitan_mixtures.data.domains import open_domains
from torchtitan_mixtures.data.image_data import image_spec, open_images
from torchtitan_mixtures.studies import (
    mixdiff_data,
    mixdiff_measures,
    mixdiff_report,
    mixdiff_results,
)

STYLES = ("noto", "noto_v1", "fluent")


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location(
        "study_mixdiff", ROOT / "scripts/study_mixdiff.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["study_mixdiff"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    mixdiff_data.write_data(folder / "data")
    return folder


def make_job(study, out, name, overrides):
    common = study.Protocol().common(out, 1, 10)
    return load_job(study.config_of(name), *common, *overrides)


def test_data_are_all_drawings_and_scenes_with_their_domains(study, data):
    job = make_job(study, data, "decentralised", ["--diffusers.num_experts=4"])
    names = image_spec(job).class_names
    assert len(names) == 3 * 8 + 1 and names[-1] == "scene"
    for split, drawings, scenes in (("train", 3834, 1278), ("unseen_concept", 455, 200)):
        images = open_images(job, "multimodal.train_split", split)
        domains = open_domains(job, "multimodal.train_split", split, images)
        assert domains.names == (*STYLES, "scene")
        counts = np.bincount(domains.labels).tolist()
        assert sum(counts[:3]) == drawings and counts[3] == scenes
        for index in range(0, len(images), 97):
            name = names[images.read(index).label]
            assert name.split("-")[0] == domains.names[domains.labels[index]]
        emoji = mixdiff_data.list_emoji(data / "data", split)
        keys = [images.relative_key(index) for index in range(len(images))]
        assert emoji == [key.split("/")[1].removesuffix(".png") for key in keys]


def test_trainings_of_the_first_phase_are_jobs_that_pass_all_checks(study, data):
    for name, overrides in study.TRAININGS.items():
        styles = f"--multimodal.train_domains={study.STYLES}"
        job = make_job(study, data, name, [*overrides, styles])
        check_job(job)
        assert job.multimodal.train_domains == list(STYLES) and job.debug.seed == 1
        assert job.model.name == ("mom" if name.startswith("dit") else "mixdiff")


def test_trainings_of_the_second_phase_replay_what_they_say(study, data):
    protocol = study.Protocol()
    jobs = {
        name: make_job(study, data, name, study.further_overrides(name, data, 1, protocol))
        for name in study.FURTHER
    }
    for name in (study.ADDED, study.REPLAYED):
        shares = jobs[name].multimodal.domain_shares
        assert shares == pytest.approx({**dict.fromkeys(STYLES, 0.1), "scene": 0.7})
    assert jobs[study.ALONE].multimodal.train_domains == ["scene"]
    added = jobs[study.ADDED]
    assert added.mixture.frozen_towers == list(STYLES)
    assert added.diffusers.new_expert_from == "noto" and added.diffusers.num_experts == 4
    for name in (study.ALONE, study.REPLAYED):
        path = jobs[name].checkpoint.initial_load_path
        assert path.endswith("runs/dit-1/checkpoint/step-1000")


def test_pieces_are_trained_before_they_are_measured_and_gone_on_with(study, tmp_path):
    pieces = study.make_pieces(tmp_path, study.Protocol(), [0, 2])
    assert len(pieces) == 1 + 2 * 5 and pieces[0].name == "references"
    (piece,) = [piece for piece in pieces if piece.name == "decentralised-2"]
    words = [" ".join(command.arguments) for command in piece.commands]
    assert ["torchtitan_mixtures.train" in line for line in words] == [
        True,
        False,
        False,
        True,
        False,
    ]
    assert "export" in words[2] and "--diffusers.start=" in words[3]


def test_experts_of_the_true_domain_and_the_router_are_scored(tmp_path):
    model = save_tiny_mixdiff(tmp_path)
    loaded = load_model(tmp_path)
    scores = mixdiff_measures.score(loaded, "unseen_style", False, 1)
    oracle = mixdiff_measures.score(loaded, "unseen_style", True, 1)
    assert scores["losses"].shape == scores["right"].shape == (64, 8)
    assert set(scores["domains"].tolist()) == {0, 1, 2}
    assert scores["weights"].shape == (64, 8, 3)
    assert scores["weights"].sum(2) == pytest.approx(1) and (scores["weights"] > 0).sum() == 2 * 512
    true = np.eye(3)[scores["domains"]]
    assert (oracle["weights"] == true[:, None]).all()
    assert (scores["entropy"] > 0).all() and (scores["entropy"] < 1).all()
    assert (scores["images"] == oracle["images"]).all()
    assert (scores["right"] == oracle["right"]).all()
    assert not np.allclose(scores["losses"], oracle["losses"])
    # With the other experts' weights gone, those of its domain have changed and no others.
    with torch.no_grad():
        for parameter in loaded.model.experts["noto"].parameters():
            parameter.zero_()
    again = mixdiff_measures.score(loaded, "unseen_style", True, 1)
    changed = (again["losses"] != oracle["losses"]).any(1)
    assert (changed == (oracle["domains"] == 0)).all()
    assert model.model_args.names == STYLES


def test_a_router_that_learned_no_domains_is_not_said_to_be_right(tmp_path):
    save_tiny_mixdiff(tmp_path, "--diffusers.training=joint")
    scores = mixdiff_measures.score(load_model(tmp_path), "unseen_style", False, 1)
    assert "right" not in scores and scores["weights"].shape == (64, 8, 3)


def test_entropy_is_relative_and_weights_are_summed_up_by_domain():
    logits = torch.tensor([[0.0, 0.0], [np.log(3), 0.0]])
    expected = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(2)
    assert mixdiff_measures._entropy(logits).tolist() == pytest.approx([1, expected])
    weights = np.array([[[1, 0, 0], [0.5, 0.5, 0]], [[0, 0, 1], [0, 0, 1]], [[0, 1, 0]] * 2])
    scores = {"domains": np.array([0, 2, 2]), "losses": np.ones((3, 2)), "weights": weights}
    summary = mixdiff_measures._summary({**scores, "entropy": np.array([[0.5, 0.3]] * 3)})
    assert summary["entropy"] == pytest.approx(0.4)
    assert summary["load"] == pytest.approx([0.25, 0.25 / 3 + 1 / 3, 1 / 3])
    assert summary["domains"]["noto"]["weights"] == pytest.approx([0.75, 0.25, 0])
    assert summary["domains"]["fluent"]["weights"] == pytest.approx([0, 0.5, 0.5])


def write_made_up(out, name, seed, losses, right=None, frechet=None):
    """Results of a training whose losses by domain are given, of two images each."""
    asks = {}
    arrays = {}
    domains = np.repeat(np.arange(len(losses)), 2)
    values = np.repeat(np.array(losses, float), 2)[:, None] + np.array([-0.1, 0.1])
    for ask in mixdiff_measures.ASKED.get(name, ("",)):
        scores = {"images": np.arange(len(domains)), "domains": domains, "losses": values}
        if right is not None:
            scores["right"] = np.full(values.shape, right)
            scores["entropy"] = np.full(values.shape, 0.25)
            scores["weights"] = np.broadcast_to([0.7, 0.2, 0.1], (*values.shape, 3))
        summary = mixdiff_measures._summary(scores)
        macs = {"top 2": 20, "top 3": 30}.get(ask, 10)
        asks[ask] = {
            "macs_per_image": macs,
            "splits": {s: summary for s in mixdiff_measures.SPLITS},
        }
        if frechet is not None and ask in mixdiff_measures.DRAWN.get(name, ()):
            asks[ask] |= {"frechet": frechet, "style": 0.5}
            arrays[f"{ask}/pictures"] = np.full((12, 32, 32, 3), 200, np.uint8)
            arrays[f"{ask}/styles"] = np.arange(12) % 3
        for split in mixdiff_measures.SPLITS:
            arrays |= {f"{ask}/{split}/{key}": value for key, value in scores.items()}
    (out / "results").mkdir(exist_ok=True)
    np.savez(out / "results" / f"{name}-{seed}.npz", **arrays)
    content = {"name": name, "seed": seed, "parameters": 5e6, "asked": asks}
    (out / "results" / f"{name}-{seed}.json").write_text(json.dumps(content))


@pytest.fixture
def finished(tmp_path):
    """Two seeds of made-up numbers: the mixture is better than the DiT by 0.1 and 0.2."""
    keys = {f"{name}/{n}.png": d for d, name in enumerate(mixdiff_data.NAMES) for n in (1, 2)}
    (tmp_path / "data").mkdir()
    splits = dict.fromkeys(mixdiff_measures.SPLITS, keys)
    write_domain_file(tmp_path / "data/domains.json", mixdiff_data.NAMES, splits)
    (tmp_path / "protocol.json").write_text(json.dumps({"steps": 500, "batch_size": 1000}))
    for seed in (0, 1):
        write_made_up(tmp_path, "dit", seed, [1, 2, 3, 9], frechet=4.0)
        gain = 0.1 + 0.1 * seed
        mixed = [1 - gain, 2 - gain, 3 - gain]
        write_made_up(tmp_path, "decentralised", seed, mixed, right=0.75, frechet=3.0)
        write_made_up(tmp_path, "decentralised, replay", seed, [*mixed, 5])
        write_made_up(tmp_path, "dit, scenes alone", seed, [2, 3.5, 3.5, 4])
    rows = {"kept out": {"frechet": 1.0, "images": 12}}
    (tmp_path / "references.json").write_text(
        json.dumps({"rows": rows, "accuracy": {"style": 0.9}})
    )
    shades = np.arange(0, 240, 20, np.uint8)
    np.save(
        tmp_path / "references.npy", np.broadcast_to(shades[:, None, None, None], (12, 32, 32, 3))
    )
    return tmp_path


def rows_of(text, label):
    found = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


def test_the_report_has_means_differences_and_forgetting(finished):
    text = mixdiff_report.write_report(finished)
    losses, gaps, router, images = rows_of(text, "decentralised, top 1")
    assert losses[1:5] == ["5.00", "1.00", "1.00", "2"]
    assert losses[5:9] == ["0.8500 +- 0.0707", "1.8500 +- 0.0707", "2.8500 +- 0.0707", losses[9]]
    assert rows_of(text, "decentralised, top 2")[0][2:4] == ["2.00", "1.00"]
    assert "of `dit` (0.0 M and 0.0 T):" in text
    assert rows_of(text, "dit")[0][8] == "2.0000 +- 0.0000"  # without scenes
    assert router[1:4] == ["0.2500 +- 0.0000", "10.0", "70.0"]
    assert router[4:] == ["70 20 10"] * 3 + ["-"]
    assert gaps[1].startswith("-0.1500 +- 0.0707 [-0.2000, -0.1000]")
    assert images[1:] == ["3.0000 +- 0.0000", "50.0"]
    assert rows_of(text, "class, image and time")[0][2] == "75.0"
    (forgot,) = rows_of(text, "dit, scenes alone")
    assert forgot[1:3] == ["2.0000 +- 0.0000", "3.0000 +- 0.0000"]
    assert forgot[3] == "+1.0000 +- 0.0000 [+1.0000, +1.0000]"
    assert forgot[4:] == ["+1.0000", "+1.5000", "+0.5000", "4.0000 +- 0.0000"]
    (kept,) = rows_of(text, "decentralised, replay, top 1")
    assert kept[3].startswith("+0.0000 +- 0.0000") and kept[7].startswith("5.0000")
    report = json.loads((finished / "report.json").read_text())
    gap = report["differences to dit"]["decentralised, top 1"]["unseen_concept"]
    assert gap["mean"] == pytest.approx(-0.15) and gap["interval_95"] == pytest.approx([-0.2, -0.1])
    forgot = report["forgetting"]["dit, scenes alone"]["unseen_style"]
    assert forgot["noto_v1"]["mean"] == 1.5 and forgot["all"]["values"] == {"0": 1, "1": 1}
    assert Image.open(finished / "router.png").width == 800
    sheet = np.asarray(Image.open(finished / "mixture.png"))
    assert sheet.shape[0] > 4 * 96
    shades = [int(sheet[50, 180 + 100 * column + 50, 0]) for column in range(12)]
    order = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]  # by style
    assert shades == [20 * number for number in order]


def test_drawings_of_one_emoji_count_for_less_than_of_as_many(finished):
    found = mixdiff_results.Results(finished)
    pair = ("dit, scenes alone", ""), ("dit", "")
    gap = found.gap(*pair, "unseen_concept")
    # Each emoji has a drawing of all styles: resampled alike, all means were 1.
    drawings = {f"{name}/{d}{n}.png": d for d, name in enumerate(mixdiff_data.NAMES) for n in "12"}
    splits = dict.fromkeys(mixdiff_measures.SPLITS, drawings)
    write_domain_file(finished / "data/domains.json", mixdiff_data.NAMES, splits)
    own = found.gap(*pair, "unseen_concept")
    assert gap.summary == own.summary and gap.summary.mean == pytest.approx(1)
    assert gap.interval == pytest.approx((1, 1)) and own.interval[0] < 0.9 < 1.1 < own.interval[1]


def test_a_report_of_nothing_is_refused(study, tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main(["report", "--out", str(tmp_path)])
    assert "holds no finished piece of a study" in capsys.readouterr().err
