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
from torchtitan_mixtures.data.domains import open_domains
from torchtitan_mixtures.data.image_data import image_spec, open_images
from torchtitan_mixtures.studies import mixdiff_data, mixdiff_measures, mixdiff_report

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
        summary = mixdiff_measures._summary(scores)
        asks[ask] = {"macs_per_image": 10, "splits": {s: summary for s in mixdiff_measures.SPLITS}}
        if frechet is not None and ask in mixdiff_measures.DRAWN.get(name, ()):
            asks[ask] |= {"frechet": frechet, "style": 0.5}
            arrays[f"{ask}/pictures"] = np.full((12, 32, 32, 3), 200, np.uint8)
        for split in mixdiff_measures.SPLITS:
            arrays |= {f"{ask}/{split}/{key}": value for key, value in scores.items()}
    (out / "results").mkdir(exist_ok=True)
    np.savez(out / "results" / f"{name}-{seed}.npz", **arrays)
    content = {"name": name, "seed": seed, "parameters": 5e6, "asked": asks}
    (out / "results" / f"{name}-{seed}.json").write_text(json.dumps(content))


@pytest.fixture
def finished(tmp_path):
    """Two seeds of made-up numbers: the mixture is better than the DiT by 0.1 and 0.2."""
    for seed in (0, 1):
        write_made_up(tmp_path, "dit", seed, [1, 2, 3, 9], frechet=4.0)
        gain = 0.1 + 0.1 * seed
        mixed = [1 - gain, 2 - gain, 3 - gain]
        write_made_up(tmp_path, "decentralised", seed, mixed, right=0.75, frechet=3.0)
        write_made_up(tmp_path, "decentralised, replay", seed, [*mixed, 5])
        write_made_up(tmp_path, "dit, scenes alone", seed, [2, 3, 4, 4])
    rows = {"kept out": {"frechet": 1.0, "images": 12}}
    (tmp_path / "references.json").write_text(
        json.dumps({"rows": rows, "accuracy": {"style": 0.9}})
    )
    np.save(tmp_path / "references.npy", np.zeros((12, 32, 32, 3), np.uint8))
    return tmp_path


def rows_of(text, label):
    found = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


def test_the_report_has_means_differences_and_forgetting(finished):
    text = mixdiff_report.write_report(finished)
    losses, gaps, images = rows_of(text, "decentralised, top 1")
    assert losses[1:4] == ["5.00", "1.00", "2"]
    assert losses[4:8] == ["0.8500 +- 0.0707", "1.8500 +- 0.0707", "2.8500 +- 0.0707", losses[8]]
    assert rows_of(text, "dit")[0][7] == "2.0000 +- 0.0000"  # without scenes
    assert gaps[1].startswith("-0.1500 +- 0.0707 [-0.2000, -0.1000]")
    assert images[1:] == ["3.0000 +- 0.0000", "50.0"]
    assert rows_of(text, "class, image and time")[0][2] == "75.0"
    (forgot,) = rows_of(text, "dit, scenes alone")
    assert forgot[1:] == ["2.0000", "3.0000", "+1.0000 +- 0.0000", "4.0000 +- 0.0000"]
    (kept,) = rows_of(text, "decentralised, replay, top 1")
    assert kept[3] == "+0.0000 +- 0.0000" and kept[4].startswith("5.0000")
    report = json.loads((finished / "report.json").read_text())
    gap = report["differences to dit"]["decentralised, top 1"]["unseen_concept"]
    assert gap["mean"] == pytest.approx(-0.15) and gap["interval_95"] == pytest.approx([-0.2, -0.1])
    assert Image.open(finished / "mixture.png").height > 3 * 96


def test_a_report_of_nothing_is_refused(study, tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main(["report", "--out", str(tmp_path)])
    assert "holds no finished piece of a study" in capsys.readouterr().err
