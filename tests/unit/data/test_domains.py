"""Domains of images: who is trained on them, and in what shares."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.data import prompt_jobs
from tests.unit.data.domain_jobs import TRAIN, domains_of, emoji_job, use_new_process
from tests.unit.data.image_jobs import (
    make_job,
    needs_fork,
    write_folder,
)
from tests.unit.data.prompt_jobs import assert_same_batches, captioned_job, write_captioned
from torchtitan_mixtures.data.domain_file import write_domain_file
from torchtitan_mixtures.data.domains import Domains, domain_names
from torchtitan_mixtures.data.emoji import STYLES, EmojiCorpus
from torchtitan_mixtures.data.image_data import open_images
from torchtitan_mixtures.data.image_loader import (
    build_image_dataloader,
    build_image_validation_dataloader,
)
from torchtitan_mixtures.data.prompt_loader import (
    build_prompt_dataloader,
    build_prompt_validation_dataloader,
    open_prompted_images,
)
from torchtitan_mixtures.data.sources import document_rng


@pytest.fixture(autouse=True)
def fake_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_new_process(tmp_path, monkeypatch)


def take(job: Any, count: int, rank: int = 0, ranks: int = 1, state: Any = None) -> list[Any]:
    loader = build_image_dataloader(ranks, rank, None, job)
    loader.load_state_dict(state or {})
    return list(itertools.islice(loader, count))


def by_number(batches: list[Any]) -> dict[int, tuple[bytes, int]]:
    """Pixels and domain of each sample."""
    return {
        number: (inputs["input"][row].numpy().tobytes(), int(inputs["domain_labels"][row]))
        for inputs, _ in batches
        for row, number in enumerate(inputs["sample_index"].tolist())
    }


def scored_domains(loader: Any) -> tuple[list[int], list[int]]:
    """Domains and numbers of the samples that have loss; padding has domain 0."""
    domains, numbers = [], []
    for inputs, labels in loader:
        for row in range(len(labels)):
            if (labels[row] == 0).all():
                domains.append(int(inputs["domain_labels"][row]))
                numbers.append(int(inputs["sample_index"][row]))
            else:
                assert inputs["domain_labels"][row] == 0
    return domains, numbers


# --- the order of an epoch ------------------------------------------------------------------------

SIZES = (40, 7, 23, 30)


def make_domains(*shares: float, taken: tuple[int, ...] = (0, 1, 2, 3)) -> Domains:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), SIZES))
    return Domains(("a", "b", "c", "d"), labels, taken, shares)


def test_without_shares_domains_leave_the_order_as_it_was():
    job = emoji_job()
    plain = take(emoji_job(domains=""), 60)
    with_domains = take(job, 60)
    for (inputs, labels), (others, other_labels) in zip(plain, with_domains, strict=True):
        domains = others.pop("domain_labels")
        assert domains.shape == (3,) and domains.dtype == torch.int64
        assert inputs.keys() == others.keys()
        assert all(torch.equal(inputs[key], others[key]) for key in inputs)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize(
    "shares", [(0.25, 0.25, 0.25, 0.25), (0.7, 0.1, 0.1, 0.1), (0.333, 0.333, 0.333, 0.001 + 0.01)]
)
def test_every_epoch_has_its_shares_within_one_sample(shares):
    domains = make_domains(*shares)
    for epoch in range(5):
        order = domains.order(3, epoch)
        assert len(order) == 100
        counts = np.bincount(domains.labels[order], minlength=4)
        exact = np.array(shares) / sum(shares) * 100
        assert (np.abs(counts - exact) < 1).all() and tuple(counts) == domains.counts


def test_all_images_of_a_domain_are_used_equally_often():
    domains = make_domains(0.13, 0.29, 0.5, 0.08)
    used = np.zeros(100, np.int64)
    for epoch in range(60):
        order = domains.order(0, epoch)
        np.add.at(used, order, 1)
        for number in range(4):
            of_domain = used[domains.labels == number]
            assert of_domain.max() - of_domain.min() <= 1
    assert used[domains.labels == 1].min() > 200 and used[domains.labels == 3].max() < 20


def test_an_epoch_takes_other_images_than_the_one_before():
    domains = make_domains(0.13, 0.29, 0.5, 0.08)  # 13 of the 40 images of a, 8 of the 30 of d
    for number in (0, 3):
        epochs = [
            {int(i) for i in domains.order(0, epoch) if domains.labels[i] == number}
            for epoch in range(3)
        ]
        assert [len(each) for each in epochs] == [domains.counts[number]] * 3
        assert not epochs[0] & epochs[1] and not epochs[1] & epochs[2]


def test_orders_depend_on_seed_and_epoch_and_are_mixed():
    domains = make_domains(0.4, 0.2, 0.2, 0.2)
    first = domains.order(0, 0).tolist()
    assert first == make_domains(0.4, 0.2, 0.2, 0.2).order(0, 0).tolist()
    assert first != domains.order(1, 0).tolist() and first != domains.order(0, 1).tolist()
    for start in range(0, 100, 25):
        assert len(set(domains.labels[first[start : start + 25]])) == 4


def test_only_what_is_taken_is_chosen():
    some = make_domains(taken=(1, 3))
    assert sorted(some.order(0, 0)) == some.chosen.tolist()
    assert sorted(some.chosen) == np.flatnonzero(np.isin(some.labels, (1, 3))).tolist()
    shared = make_domains(0.5, 0.5, taken=(1, 3))
    assert len(shared.order(0, 0)) == 37 and set(shared.labels[shared.order(0, 0)]) == {1, 3}


# --- training and validation ----------------------------------------------------------------------


def test_labels_are_those_of_the_drawings():
    drawings = EmojiCorpus.load().drawings("unseen_style")
    assert domains_of(emoji_job(), "unseen_style") == [STYLES.index(d.style) for d in drawings]
    images = open_images(emoji_job(), TRAIN, "unseen_style")
    style = {
        images.read(i).image.numpy().tobytes(): STYLES.index(drawing.style)
        for i, drawing in enumerate(drawings)
    }
    samples = by_number(take(emoji_job(), 49)).values()
    assert all(style[pixels] == domain for pixels, domain in samples)
    assert Counter(domain for _, domain in list(samples)[:146]) == {0: 53, 1: 35, 2: 58}


SHARES = {"noto": 0.1, "fluent": 0.9}


@pytest.mark.parametrize("values", [{"domain_shares": SHARES}, {"train_domains": ["noto_v1"]}])
@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 12), (2, 3), (4, 3)])
def test_a_step_has_the_same_samples_on_any_number_of_ranks(values, ranks, batch_size):
    expected = by_number(take(emoji_job(local_batch_size=4, **values), 36))
    job = emoji_job(local_batch_size=batch_size, **values)
    of_ranks = [take(job, 144 // (ranks * batch_size), rank, ranks) for rank in range(ranks)]
    assert by_number([batch for batches in of_ranks for batch in batches]) == expected


@needs_fork
def test_workers_change_nothing_and_a_run_is_resumed_to_the_bit():
    job = emoji_job(domain_shares=SHARES)
    whole = take(job, 90)  # 270 samples, epochs of 111
    assert_same_batches(take(emoji_job(domain_shares=SHARES, num_workers=2), 90), whole)
    loader = build_image_dataloader(1, 0, None, job)
    list(itertools.islice(loader, 50))
    state = json.loads(json.dumps(loader.state_dict()))
    assert_same_batches(take(job, 40, state=state), whole[50:])
    others = emoji_job(domain_shares=SHARES, local_batch_size=4)
    of_ranks = [take(others, 15, rank, 2, state) for rank in range(2)]
    resumed = by_number([batch for batches in of_ranks for batch in batches])
    assert resumed == by_number(whole[50:])


def test_shares_are_kept_in_the_samples_of_an_epoch():
    batches = take(emoji_job(domain_shares=SHARES, local_batch_size=37), 6)
    for epoch in range(2):  # of 53 + 58 samples
        drawn = by_number(batches[3 * epoch : 3 * epoch + 3]).values()
        assert Counter(domain for _, domain in drawn) == {0: 11, 2: 100}


def test_domains_that_a_job_trains_on_are_all_that_it_has():
    job = emoji_job(train_domains=["fluent", "noto"])
    assert domain_names(job) == ("noto", "fluent")  # in the order of the data
    assert domain_names(emoji_job()) == ("noto", "noto_v1", "fluent")


def test_training_domains_are_those_of_validation_too():
    job = emoji_job(train_domains=["fluent", "noto_v1"])
    samples = list(by_number(take(job, 31)).values())[:93]
    assert Counter(domain for _, domain in samples) == {0: 35, 1: 58}
    images = open_images(job, TRAIN, "unseen_style")
    drawings = EmojiCorpus.load().drawings("unseen_style")
    assert sorted(samples) == sorted(
        (images.read(index).image.numpy().tobytes(), STYLES.index(drawing.style) - 1)
        for index, drawing in enumerate(drawings)
        if drawing.style != "noto"
    )
    for ranks in (1, 2):
        seen: list[int] = []
        for rank in range(ranks):
            loader = build_image_validation_dataloader(ranks, rank, job, "unseen_style")
            domains, numbers = scored_domains(loader)
            assert set(domains) == {0, 1} and len(loader) == -(-93 // (3 * ranks))
            seen += numbers
        # Images keep their numbers, and with them the noise of validation.
        assert sorted(seen) == [i for i, d in enumerate(drawings) if d.style != "noto"]


def test_validation_has_all_domains_whatever_the_shares():
    job = emoji_job(domain_shares=SHARES)
    domains, _ = scored_domains(build_image_validation_dataloader(1, 0, job, "unseen_style"))
    assert Counter(domains) == {0: 53, 1: 35, 2: 58}


def test_validation_of_a_domain_keeps_the_order_of_all():
    whole = build_image_validation_dataloader(1, 0, emoji_job(), "unseen_style")
    domains, numbers = scored_domains(whole)
    expected = [n for n, domain in zip(numbers, domains, strict=True) if domain == 1]
    job = emoji_job(train_domains=["noto_v1"])
    loader = build_image_validation_dataloader(1, 0, job, "unseen_style")
    assert scored_domains(loader)[1] == expected


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"domains": ""}, "multimodal.domains"),
        ({"domains": "class"}, "multimodal.domains"),
        ({"train_domains": ["noto"]}, "multimodal.train_domains"),
        ({"domain_shares": SHARES}, "multimodal.domain_shares"),
    ],
)
def test_a_state_of_other_domains_is_refused(values, key):
    state = build_image_dataloader(1, 0, None, emoji_job()).state_dict()
    changed = build_image_dataloader(1, 0, None, emoji_job(**values))
    with pytest.raises(ValueError, match=rf"{key} is .*exclude_from_loading"):
        changed.load_state_dict(state)


def test_a_broken_image_is_replaced_by_one_of_its_domain(tmp_path):
    path = write_folder(tmp_path / "train", count=6).parent
    broken = path / "train" / "cat" / "more" / "5.png"  # the last of its class
    broken.write_bytes(b"")
    values = {"source": "folder", "path": str(path), "image_size": 8, "max_bad_fraction": 0.5}
    job = make_job(**{**values, "domains": "class", "domain_shares": {"cat": 0.75, "dog": 0.25}})
    for inputs, labels in take(job, 20):
        assert not labels.any() and torch.equal(inputs["class_labels"], inputs["domain_labels"])
    drawn = [d for inputs, _ in take(job, 20) for d in inputs["domain_labels"].tolist()]
    assert Counter(drawn) == {0: 45, 1: 15}


# --- prompts --------------------------------------------------------------------------------------


def test_scenes_are_of_the_style_in_whose_place_they_stand(monkeypatch):
    job = emoji_job(scene_fraction=1.0)
    corpus, made = EmojiCorpus.load(), []
    original = EmojiCorpus.compose_scene
    monkeypatch.setattr(
        EmojiCorpus, "compose_scene", lambda *args: made.append(original(*args)) or made[-1]
    )
    images = open_prompted_images(job, TRAIN, "unseen_style")
    drawings = corpus.drawings("unseen_style")
    for index in range(0, 146, 5):
        images.read(index, document_rng(0, index, "prompt"))
        assert {d.style for d in made[-1].drawings} == {drawings[index].style}
    mixed = open_prompted_images(emoji_job(scene_fraction=1.0, domains=""), TRAIN, "unseen_style")
    for index in range(20):
        mixed.read(index, document_rng(0, index, "prompt"))
    assert max(len({d.style for d in scene.drawings}) for scene in made[-20:]) > 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_prompted_emoji_have_domains(ranks):
    job = emoji_job(train_domains=["noto", "fluent"], domain_shares={"noto": 0.25, "fluent": 0.75})
    job.training.global_batch_size = -1
    expected = prompt_jobs.by_number(prompt_jobs.take(job, 36 // ranks * ranks))
    of_ranks = [prompt_jobs.take(job, 36 // ranks, rank, ranks) for rank in range(ranks)]
    batches = [batch for each in of_ranks for batch in each]
    assert prompt_jobs.by_number(batches) == expected
    drawn = Counter(d for inputs, _ in batches for d in inputs["domain_labels"].tolist())
    assert drawn.keys() == {0, 1} and sum(drawn.values()) == 108  # as the job names them
    loader = build_prompt_validation_dataloader(1, 0, job, "unseen_style")
    assert Counter(scored_domains(loader)[0]) == {0: 53, 1: 58}


def test_captioned_pictures_of_several_shapes_can_be_taken_by_domain(tmp_path):
    root = write_captioned(tmp_path / "data", "train", [(16, 16), (24, 10), (16, 16)] * 4)
    write_captioned(root, "validation", [(16, 16), (24, 10)] * 3)
    splits = {
        "train": {str(i): i % 2 for i in range(12)},
        "validation": {str(i): i // 3 for i in range(6)},
    }
    write_domain_file(tmp_path / "domains.json", ["even", "odd"], splits)
    values = {"aspect_ratios": ["1:1", "2:1"], "global_batch_size": 2, "local_batch_size": 2}
    values |= {"domains": str(tmp_path / "domains.json"), "train_domains": ["odd"]}
    job = captioned_job(root, **values)
    batches = prompt_jobs.take(job, 3)  # four square ones and two wide ones
    assert all((inputs["domain_labels"] == 0).all() for inputs, _ in batches)
    shapes = Counter(tuple(inputs["input"].shape[2:]) for inputs, _ in batches)
    assert sorted(shapes.values()) == [1, 2]
    loader = build_prompt_dataloader(1, 0, None, job)
    assert loader.fingerprint["images of each aspect ratio"] == [4, 2]
    validation = build_prompt_validation_dataloader(1, 0, job, "validation")
    domains, numbers = scored_domains(validation)
    assert set(domains) == {0} and sorted(numbers) == [3, 4, 5]
