"""k-means and main directions against naive ones, agreement with labels, clusters of images."""

from __future__ import annotations

import itertools
import json
import math
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.jobs import ROOT, TRAIN_CONFIGS
from tests.unit.data.image_jobs import make_job, save_tiny_vae, use_fake_model, write_folder
from tests.unit.data.prompt_jobs import captioned_job, use_prompted_model, write_captioned
from torchtitan_mixtures.data import cluster as cluster_module
from torchtitan_mixtures.data.cluster import (
    MainDirections,
    TooFewError,
    choose_starts,
    find_clusters,
    find_mutual_information,
    find_nearest,
    find_purity,
)
from torchtitan_mixtures.data.cluster_images import Clustering, cluster_images
from torchtitan_mixtures.data.domains import open_domains
from torchtitan_mixtures.data.encode_latents import Encoding, encode
from torchtitan_mixtures.data.image_data import open_images


def gaussians(centres, count: int, std: float = 0.3, seed: int = 0):
    """Rows around centres, and which one each is around."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(centres)).repeat_interleave(count)
    noise = torch.randn(len(labels), len(centres[0]), generator=generator, dtype=torch.float64)
    mixed = torch.randperm(len(labels), generator=generator)
    rows = torch.tensor(centres, dtype=torch.float64)[labels] + std * noise
    return rows[mixed], labels[mixed]


def nearest(row: list[float], centres: list[list[float]]) -> tuple[int, float]:
    """The nearest centre and its squared distance, by hand."""
    squares = [sum((a - b) ** 2 for a, b in zip(row, c, strict=True)) for c in centres]
    return min(range(len(centres)), key=squares.__getitem__), min(squares)


# --- k-means --------------------------------------------------------------------------------------


def test_separate_clusters_are_found():
    centres = [[0.0, 0.0, 0.0], [10.0, 0.0, 0.0], [0.0, 10.0, 5.0], [-8.0, -8.0, 0.0]]
    rows, labels = gaussians(centres, 50)
    found = find_clusters(rows, 4)
    assert find_purity(found.labels, labels) == 1
    assert find_mutual_information(found.labels, labels) == pytest.approx(1)
    for number in range(4):
        (own,) = set(labels[found.labels == number].tolist())
        mean = rows[labels == own].mean(0)
        assert torch.allclose(found.centres[number], mean)


def test_rows_are_at_their_nearest_centre_and_centres_are_means():
    rows, _ = gaussians([[0.0, 0.0]], 200, std=1.0)
    found = find_clusters(rows, 5, restarts=3)
    centres, total = found.centres.tolist(), 0.0
    for row, label in zip(rows.tolist(), found.labels.tolist(), strict=True):
        expected, square = nearest(row, centres)
        assert label == expected
        total += square
    assert found.inertias[-1] == pytest.approx(total)
    for number in range(5):
        assert torch.allclose(found.centres[number], rows[found.labels == number].mean(0))


def test_no_round_makes_clusters_worse():
    rows, _ = gaussians([[0.0] * 4], 300, std=1.0, seed=3)
    found = find_clusters(rows, 8, restarts=1)
    assert len(found.inertias) > 3
    assert all(after <= before for before, after in itertools.pairwise(found.inertias))


def test_the_best_division_of_a_few_rows_is_found():
    """Against all divisions there are."""
    rows = torch.tensor([[0.0], [1.0], [1.5], [4.0], [4.2], [9.0], [9.9]], dtype=torch.float64)

    def inertia(division):
        parts = [[rows[i, 0].item() for i in range(7) if division[i] == k] for k in range(3)]
        if not all(parts):
            return math.inf
        return sum((x - sum(part) / len(part)) ** 2 for part in parts for x in part)

    best = min(map(inertia, itertools.product(range(3), repeat=7)))
    assert find_clusters(rows, 3).inertias[-1] == pytest.approx(best)


def test_a_seed_gives_the_same_clusters_and_the_largest_is_first():
    rows, _ = gaussians([[0.0, 0.0]], 300, std=1.0)
    first, again, other = (find_clusters(rows, 6, seed, restarts=1) for seed in (1, 1, 2))
    assert torch.equal(first.labels, again.labels) and torch.equal(first.centres, again.centres)
    assert not torch.equal(first.labels, other.labels)
    assert first.sizes == sorted(first.sizes, reverse=True) and sum(first.sizes) == 300


def test_more_restarts_are_never_worse():
    rows, _ = gaussians([[0.0, 0.0]], 200, std=1.0)
    ends = [find_clusters(rows, 9, restarts=count).inertias[-1] for count in (1, 4, 16)]
    assert ends == sorted(ends, reverse=True) and ends[0] > ends[-1]


def test_starts_are_different_rows_and_far_ones_are_likelier():
    rows = torch.tensor([[0.0], [0.0], [0.0], [0.1], [10.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    far = 0
    for _ in range(200):
        starts = choose_starts(rows, 2, generator)[:, 0].tolist()
        assert starts[0] != starts[1]
        far += 10.0 in starts
    assert far >= 195  # beside 10 the others have a share of at most 0.01 ** 2
    with pytest.raises(TooFewError, match="3 different features, too few for 4 clusters"):
        choose_starts(rows, 4, generator)


def test_a_row_that_is_a_start_already_is_never_drawn_again(monkeypatch):
    rows = torch.tensor([[0.0], [0.0], [5.0]], dtype=torch.float64)
    zeros = torch.zeros(2, dtype=torch.float64)
    monkeypatch.setattr(cluster_module.torch, "rand", lambda *args, **options: zeros)
    assert choose_starts(rows, 2, torch.Generator()).tolist() == [[0.0], [5.0]]


def test_a_centre_without_rows_moves_to_the_farthest_row():
    rows = torch.tensor([[0.0], [1.0], [2.0], [50.0]], dtype=torch.float64)
    centres = torch.tensor([[1.0], [1000.0]], dtype=torch.float64)
    labels, squares = find_nearest(rows, centres)
    assert labels.tolist() == [0, 0, 0, 0]
    moved = cluster_module._move(rows, labels, squares, 2)
    assert moved.tolist() == [[1.0], [50.0]]
    assert cluster_module._iterate(rows, centres).labels.tolist() == [0, 0, 0, 1]


def test_distances_are_the_same_in_parts(monkeypatch):
    rows, _ = gaussians([[0.0, 1.0]], 50)
    whole = find_nearest(rows, rows[:7])
    monkeypatch.setattr(cluster_module, "_ROWS_AT_A_TIME", 8)
    parts = find_nearest(rows, rows[:7])
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


# --- main directions and agreement ----------------------------------------------------------------


def test_main_directions_are_uncorrelated_and_as_long_as_they_vary():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(400, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    features = torch.cat([mixed, mixed[:, :1] * 3 + 1, torch.full((400, 1), 7.0)], 1)
    found = MainDirections.of(features, 32)
    projected = found.apply(features)
    assert projected.shape == (400, 5)  # a copy and a constant add no direction
    covariance = projected.T @ projected / 400
    variances = torch.linalg.svdvals(features.double() - features.double().mean(0)) ** 2 / 400
    assert torch.allclose(covariance, torch.diag(variances[:5]), atol=1e-5)
    assert torch.allclose(projected.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-6)
    # Nothing is lost: distances stay.
    before, after = (
        torch.cdist(features.double(), features.double()),
        torch.cdist(projected, projected),
    )
    assert torch.allclose(before, after, atol=1e-4)
    assert MainDirections.of(features, 2).apply(features).shape == (400, 2)
    with pytest.raises(TooFewError, match="1 different feature"):
        MainDirections.of(torch.ones(4, 2), 2)


def test_agreement_with_labels_by_hand():
    clusters = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2])
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 0, 2])
    assert find_purity(clusters, labels) == pytest.approx((2 + 3 + 1) / 8)
    joint = {(0, 0): 2, (0, 1): 1, (1, 1): 3, (1, 0): 1, (2, 2): 1}
    of_clusters, of_labels = {0: 3, 1: 4, 2: 1}, {0: 3, 1: 4, 2: 1}
    shared = sum(
        n / 8 * math.log(n * 8 / (of_clusters[c] * of_labels[k])) for (c, k), n in joint.items()
    )
    entropy = -sum(n / 8 * math.log(n / 8) for n in of_clusters.values())
    assert find_mutual_information(clusters, labels) == pytest.approx(shared / entropy)
    assert find_mutual_information(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])) == (
        pytest.approx(0, abs=1e-12)
    )


# --- images ---------------------------------------------------------------------------------------


@pytest.fixture
def class_model(monkeypatch):
    use_fake_model(monkeypatch)
    spec = SimpleNamespace(model_args={"debugmodel": SimpleNamespace(patch_size=2)})
    monkeypatch.setattr("torchtitan_mixtures.data.model_flavor.get_train_spec", lambda name: spec)


def write_tones(root, count: int = 12):
    """Pictures in `root/a`, `root/b`, each of one colour: about dark and light grey in turn."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(count):
            tone = 200 if number % 2 else 40
            pixels = np.full((16, 16, 3), tone + rng.integers(-20, 20, 3), np.uint8)
            path = root / split / ("a" if number < count // 2 else "b") / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


def tones_job(root, **values):
    defaults = {"source": "folder", "path": str(root), "image_size": 8}
    return make_job(**{**defaults, "validation_splits": ["val"], **values})


def test_clusters_of_a_folder_are_domains(tmp_path, class_model):
    root, out = write_tones(tmp_path / "pictures"), tmp_path / "new" / "domains.json"
    (root / "val" / "a" / "02.png").write_bytes(b"")
    lines: list[str] = []
    cluster_images(tones_job(root), Clustering(2, out), lines.append)
    assert lines[0].startswith("cannot be read:") and "a/02.png" in lines[0]
    assert lines[1] == "train: 12 images, 6, 6 in each cluster"
    assert lines[2].startswith("  compared with class: purity 0.500, mutual information 0.0")
    entries = json.loads(out.read_text())["splits"]
    dark = entries["train"]["a/00.png"]
    for split, of_split in entries.items():
        assert len(of_split) == 12
        for key, number in of_split.items():
            is_dark = int(key.split("/")[1].removesuffix(".png")) % 2 == 0
            if (split, key) != ("val", "a/02.png"):
                assert (number == dark) == is_dark
    job = tones_job(root, domains=str(out))
    images = open_images(job, "multimodal.train_split", "train")
    domains = open_domains(job, "multimodal.train_split", "train", images)
    assert domains is not None and domains.names == ("cluster0", "cluster1")
    assert sorted(domains.labels.tolist()) == [0] * 6 + [1] * 6
    # With what lies beside it, images are assigned as they were.
    stored = load_file(out.with_suffix(".safetensors"))
    pixels = torch.stack([images.read(index).image for index in range(12)]).flatten(1)
    white = (pixels.double() - stored["mean"]) @ stored["projection"]
    assert torch.equal(
        torch.cdist(white, stored["centres"]).argmin(1), torch.tensor(domains.labels)
    )


def test_features_of_the_user_are_taken_as_they_are(tmp_path, class_model):
    root, out = write_tones(tmp_path / "pictures"), tmp_path / "domains.json"
    by_class = torch.tensor([[0.0, 1.0]] * 6 + [[5.0, 0.0]] * 6)
    save_file({"train": by_class, "val": by_class.flip(0)}, tmp_path / "features.safetensors")
    lines: list[str] = []
    clustering = Clustering(2, out, tmp_path / "features.safetensors")
    cluster_images(tones_job(root), clustering, lines.append)
    assert "purity 1.000, mutual information 1.000" in lines[1]
    entries = json.loads(out.read_text())["splits"]
    assert entries["train"]["a/00.png"] == entries["val"]["b/11.png"]
    assert entries["train"]["a/00.png"] != entries["val"]["a/00.png"]
    assert load_file(out.with_suffix(".safetensors"))["centres"].shape == (2, 2)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"train": torch.zeros(12, 3)}, 'has no tensor "val" for the 12 images'),
        ({"train": torch.zeros(11, 3), "val": torch.zeros(12, 3)}, r'"train" is \(11, 3\)'),
        ({"train": torch.zeros(12, 3), "val": torch.zeros(12, 2)}, "differ in dim"),
        ({"train": torch.full((12, 3), torch.inf), "val": torch.zeros(12, 3)}, "not finite"),
        ({"train": torch.zeros(12, 3).long(), "val": torch.zeros(12, 3)}, "must be .* floats"),
        ({"train": torch.zeros(12, 3), "val": torch.zeros(12, 3)}, "--clusters 2: there are 1 dif"),
    ],
)
def test_features_that_do_not_fit_are_refused(tmp_path, class_model, tensors, message):
    root, path = write_tones(tmp_path / "pictures"), tmp_path / "features.safetensors"
    save_file(tensors, path)
    clustering = Clustering(2, tmp_path / "out.json", path)
    with pytest.raises(ValueError, match=message):
        cluster_images(tones_job(root), clustering, print)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clusters": 1}, "--clusters 1: must be 2 or more"),
        ({"clusters": 13}, "--clusters 13: there are 12 different features"),
        ({"restarts": 0}, "--restarts 0: must be 1"),
        ({"out": "a.safetensors"}, "--out .*must be a JSON"),
        ({"features": "nothing"}, "--features .*nothing: cannot be read"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path, class_model, values, message):
    paths = {name: tmp_path / value for name, value in values.items() if isinstance(value, str)}
    defaults = {"clusters": 2, "out": tmp_path / "out.json"}
    job = tones_job(write_tones(tmp_path / "pictures"))
    with pytest.raises(ValueError, match=message):
        cluster_images(job, Clustering(**{**defaults, **values, **paths}), print)


def test_images_of_which_none_can_be_read_are_refused(tmp_path, class_model):
    root = write_tones(tmp_path / "pictures", 2)
    for path in root.glob("train/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"train_split: none .* can be read"):
        cluster_images(tones_job(root), Clustering(2, tmp_path / "out.json"), print)


def test_latents_are_clustered_by_their_means(tmp_path, class_model):
    pictures = write_folder(tmp_path / "pictures" / "train", count=4).parent
    vae = str(save_tiny_vae(tmp_path / "vae"))
    encode(Encoding(str(pictures), vae, tmp_path / "out", size=16), lambda line: None)
    job = tones_job(tmp_path / "out")
    cluster_images(job, Clustering(2, tmp_path / "domains.json"), print)
    (entries,) = json.loads((tmp_path / "domains.json").read_text())["splits"].values()
    assert len(entries) == 8 and all(key.endswith("]") and "/" not in key for key in entries)


def test_captioned_pictures_of_several_shapes_are_clustered(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    use_prompted_model(monkeypatch)
    args = SimpleNamespace(patch_size=2, is_prompted=True)
    spec = SimpleNamespace(model_args={"debugmodel": args})
    monkeypatch.setattr("torchtitan_mixtures.data.model_flavor.get_train_spec", lambda name: spec)
    root = write_captioned(tmp_path / "data", "train", [(16, 16), (24, 10)] * 3)
    write_captioned(root, "validation", [(16, 16)] * 3)
    job = captioned_job(root, aspect_ratios=["1:1", "2:1"])
    cluster_images(job, Clustering(2, tmp_path / "domains.json"), print)
    entries = json.loads((tmp_path / "domains.json").read_text())["splits"]
    assert {split: list(keys) for split, keys in entries.items()} == {
        "train": ["0", "1", "2", "3", "4", "5"],
        "validation": ["0", "1", "2"],
    }


@pytest.mark.parametrize("family", ["mom", "mmdit"])
def test_the_command_clusters_emoji(family, tmp_path, capsys, monkeypatch):
    config, out = TRAIN_CONFIGS / family / "debugmodel.toml", tmp_path / "domains.json"
    script = str(ROOT / "scripts" / "prepare_data.py")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))  # as Python does for a script
    words = ["cluster", "--config", str(config), "--clusters", "2", "--restarts", "1"]
    words += ["--out", str(out), "--multimodal.image_size", "16"]
    words += ["--multimodal.train_split", "unseen_style", "--multimodal.domains", str(out)]
    monkeypatch.setattr(sys, "argv", [script, *words])
    runpy.run_path(script, run_name="__main__")
    printed = capsys.readouterr().out
    assert "unseen_style: 146 images" in printed and "compared with style: purity" in printed
    assert f"train with --multimodal.domains {out}" in printed
    entries = json.loads(out.read_text())["splits"]
    assert {split: len(keys) for split, keys in entries.items()} == {
        "train": 3834,
        "unseen_concept": 455,
        "unseen_style": 146,
    }
    assert all(key.endswith(("(noto)", "(noto_v1)", "(fluent)")) for key in entries["train"])


def test_a_model_of_tokens_has_no_images_to_cluster(tmp_path):
    job = make_job()
    job.model = SimpleNamespace(name="mot", flavor="debugmodel")
    with pytest.raises(ValueError, match=r"model\.name = 'mot': reads documents"):
        cluster_images(job, Clustering(2, tmp_path / "domains.json"), print)
