"""Loaders of images: the order of samples, resumption, broken files, validation."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import Tensor

from tests.unit.data.image_jobs import (
    PATCH_SIZE,
    make_job,
    needs_fork,
    save_tiny_vae,
    use_fake_model,
    write_folder,
)
from torchtitan_mixtures.data import image_sets
from torchtitan_mixtures.data.encode_latents import Encoding, encode
from torchtitan_mixtures.data.image_data import open_images
from torchtitan_mixtures.data.image_loader import (
    build_image_dataloader,
    build_image_validation_dataloader,
)
from torchtitan_mixtures.data.samples import MIN_SAMPLES

NUM_EMOJI = 146  # drawings of unseen_style, the smallest split
Batch = tuple[dict[str, Tensor], Tensor]


@pytest.fixture(autouse=True)
def fake_model(monkeypatch):
    use_fake_model(monkeypatch)


def emoji_job(**values):
    return make_job(**{"train_split": "unseen_style", "image_size": 16, **values})


def folder_job(path, **values):
    defaults = {"source": "folder", "path": str(path), "image_size": 8, "max_bad_fraction": 0.5}
    return make_job(**{**defaults, "validation_splits": ["val"], **values})


def take(job, count: int, rank: int = 0, ranks: int = 1, state=None) -> list[Batch]:
    loader = build_image_dataloader(ranks, rank, None, job)
    loader.load_state_dict(state or {})
    return list(itertools.islice(loader, count))


def by_number(batches: list[Batch]) -> dict[int, tuple[bytes, int]]:
    """Pixels and class of each sample."""
    samples = {}
    for inputs, _ in batches:
        for row, number in enumerate(inputs["sample_index"].tolist()):
            assert number not in samples
            pixels = inputs["input"][row].numpy().tobytes()
            samples[number] = pixels, int(inputs["class_labels"][row])
    return samples


def assert_same_batches(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for (inputs, labels), (others, other_labels) in zip(left, right, strict=True):
        assert inputs.keys() == others.keys()
        assert all(torch.equal(inputs[key], others[key]) for key in inputs)
        assert torch.equal(labels, other_labels)


# --- training -------------------------------------------------------------------------------------


def test_a_batch_has_the_keys_of_the_contract():
    ((inputs, labels),) = take(emoji_job(), 1)
    assert {key: (tuple(t.shape), t.dtype) for key, t in inputs.items()} == {
        "input": ((3, 3, 16, 16), torch.float32),
        "class_labels": ((3,), torch.int64),
        "sample_index": ((3,), torch.int64),
    }
    assert inputs["sample_index"].tolist() == [0, 1, 2]
    assert inputs["input"].min() >= -1 and inputs["input"].max() == 1
    tokens = (16 // PATCH_SIZE) ** 2
    assert tuple(labels.shape) == (3, tokens) and labels.dtype == torch.int64
    assert not labels.any()


def test_every_epoch_has_each_image_once_in_an_order_of_its_own():
    job = emoji_job()
    samples = by_number(take(job, 2 * NUM_EMOJI // 3 + 1))
    images = open_images(job, "multimodal.train_split", "unseen_style")
    all_images = sorted(
        (images.read(i).image.numpy().tobytes(), images.read(i).label) for i in range(NUM_EMOJI)
    )
    epochs = [[samples[e * NUM_EMOJI + i] for i in range(NUM_EMOJI)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == all_images
    assert epochs[0] != epochs[1] != all_images


def test_the_seed_decides_the_order():
    first, again, other = (by_number(take(emoji_job(seed=seed), 4)) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 12), (2, 3), (3, 2), (4, 3)])
def test_a_step_has_the_same_samples_on_any_number_of_ranks(ranks, batch_size):
    expected = by_number(take(emoji_job(local_batch_size=4), 6))  # 2 steps of 12
    job = emoji_job(local_batch_size=batch_size)
    microbatches = 12 // (ranks * batch_size)
    of_ranks = [take(job, 2 * microbatches, rank, ranks) for rank in range(ranks)]
    assert by_number([batch for batches in of_ranks for batch in batches]) == expected
    for step in range(2):
        numbers = [
            number
            for batches in of_ranks
            for inputs, _ in batches[step * microbatches : (step + 1) * microbatches]
            for number in inputs["sample_index"].tolist()
        ]
        assert sorted(numbers) == list(range(12 * step, 12 * step + 12))


def test_a_resumed_run_continues_to_the_bit_with_other_ranks_and_batches(tmp_path):
    path = write_folder(tmp_path, count=30)
    job = folder_job(path, random_flip=True, local_batch_size=2)
    whole = take(job, 40)
    loader = build_image_dataloader(1, 0, None, job)
    iterator = iter(loader)
    for _ in range(18):  # past the first epoch of about 57
        next(iterator)
    state = json.loads(json.dumps(loader.state_dict()))
    assert_same_batches(take(job, 22, state=state), whole[18:])

    others = folder_job(path, random_flip=True, local_batch_size=4)
    of_ranks = [take(others, 5, rank, 2, state) for rank in range(2)]
    expected = by_number(whole[18:38])
    assert by_number([batch for batches in of_ranks for batch in batches]) == expected


def test_all_ranks_save_the_same_state():
    states = []
    for rank in range(2):
        loader = build_image_dataloader(2, rank, None, emoji_job())
        list(itertools.islice(loader, 2))
        states.append(loader.state_dict())
    assert states[0] == states[1]
    assert states[0]["num_consumed"] == "12"


@needs_fork
@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(num_workers):
    batches = take(emoji_job(), 12)
    assert_same_batches(take(emoji_job(num_workers=num_workers), 12), batches)
    loader = build_image_dataloader(1, 0, None, emoji_job(num_workers=num_workers))
    list(itertools.islice(loader, 5))
    state = loader.state_dict()  # workers have read further
    assert_same_batches(take(emoji_job(), 7, state=state), batches[5:])


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"seed": 1}, "multimodal.seed"),
        ({"train_split": "train"}, "multimodal.train_split"),
        ({"class_of": "concept"}, "multimodal.class_of"),
        ({"image_size": 32}, "multimodal.image_size"),
    ],
)
def test_a_state_of_other_data_is_refused(values, key):
    state = build_image_dataloader(1, 0, None, emoji_job()).state_dict()
    changed = build_image_dataloader(1, 0, None, emoji_job(**values))
    with pytest.raises(ValueError, match=rf"{key} is .*exclude_from_loading"):
        changed.load_state_dict(state)


def test_a_state_is_refused_when_an_image_was_added(tmp_path):
    path = write_folder(tmp_path / "train").parent
    state = build_image_dataloader(1, 0, None, folder_job(path)).state_dict()
    (path / "train" / "cat" / "new.png").touch()
    image_sets._list_images.cache_clear()  # as in a new process
    with pytest.raises(ValueError, match="images of the split is 21, but 20 in the run"):
        build_image_dataloader(1, 0, None, folder_job(path)).load_state_dict(state)


def test_half_of_the_samples_are_mirrored_by_their_number(tmp_path):
    path = write_folder(tmp_path / "train", count=3).parent
    plain = by_number(take(folder_job(path), 20))
    flipped = by_number(take(folder_job(path, random_flip=True), 20))
    changed = [number for number in plain if plain[number] != flipped[number]]
    assert 15 <= len(changed) <= 45  # of 60
    for number in changed[:5]:
        pixels = [
            torch.frombuffer(bytearray(samples[number][0]), dtype=torch.float32).view(3, 8, 8)
            for samples in (plain, flipped)
        ]
        assert torch.equal(pixels[0].flip(-1), pixels[1])
    # Not the same images in every epoch of six.
    assert len({tuple(e * 6 + i in changed for i in range(6)) for e in range(10)}) > 1


def test_latents_come_with_their_deviation(tmp_path):
    pictures = write_folder(tmp_path / "pictures" / "train", count=3).parent
    vae = str(save_tiny_vae(tmp_path / "vae"))
    encode(Encoding(str(pictures), vae, tmp_path / "out", size=16, flip=True), lambda line: None)
    job = folder_job(tmp_path / "out", random_flip=True)
    images = open_images(job, "multimodal.train_split", "train")
    items = [images.read(i, flip) for i in range(6) for flip in (False, True)]
    for inputs, _ in take(job, 6):
        assert inputs["latent_std"].shape == inputs["input"].shape == (3, 4, 8, 8)
        for row in range(3):
            (item,) = [i for i in items if torch.equal(i.image, inputs["input"][row])]
            assert item.std is not None and torch.equal(item.std, inputs["latent_std"][row])
            assert item.label == inputs["class_labels"][row]


def test_pictures_for_a_vae_are_larger_than_what_the_model_sees(tmp_path):
    path = write_folder(tmp_path / "pictures" / "train").parent
    vae = str(save_tiny_vae(tmp_path / "vae"))
    ((inputs, labels),) = take(folder_job(path, vae=vae), 1)
    assert inputs["input"].shape == (3, 3, 16, 16)
    assert labels.shape == (3, (8 // PATCH_SIZE) ** 2)


# --- broken images --------------------------------------------------------------------------------


def test_a_broken_image_is_replaced_the_same_way_on_any_rank(tmp_path, caplog):
    path = write_folder(tmp_path / "train", count=5).parent
    broken = path / "train" / "cat" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    job = folder_job(path)
    single = by_number(take(job, 6))
    assert str(broken) in caplog.text
    of_ranks = [take(job, 3, rank, 2) for rank in range(2)]
    assert by_number([batch for batches in of_ranks for batch in batches]) == single
    images = open_images(job, "multimodal.train_split", "train")
    keys = [images.key(i) for i in range(10)]
    stand_in = images.read(keys.index(str(broken)) + 1)
    stand_in = stand_in.image.numpy().tobytes(), stand_in.label
    first_epoch = [single[number] for number in range(10)]
    assert first_epoch.count(stand_in) == 2 and len(set(first_epoch)) == 9


def test_too_many_broken_images_stop_the_run(tmp_path):
    path = write_folder(tmp_path / "train", count=5).parent
    (path / "train" / "cat" / "2.png").write_bytes(b"")
    loader = build_image_dataloader(1, 0, None, folder_job(path, max_bad_fraction=0.05))
    message = r"1 of 10 samples \(10\.00%\) .*max_bad_fraction = 0\.05 allows 0 .*cat/2.png.*empty"
    with pytest.raises(ValueError, match=message):
        list(itertools.islice(loader, 5))  # an epoch is over in the fourth
    assert MIN_SAMPLES > 15


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_broken_image_counts_once_in_all_epochs(tmp_path, ranks, caplog):
    path = write_folder(tmp_path / "train", count=20).parent  # 40 images
    broken = path / "train" / "cat" / "2.png"
    broken.write_bytes(b"")
    allowed = folder_job(path, max_bad_fraction=0.025)
    for rank in range(ranks):
        caplog.clear()
        take(allowed, 80, rank, ranks)  # 240 samples or more
        assert [str(broken) in record.message for record in caplog.records] == [True]
    (path / "train" / "dog" / "4.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 40 samples \(5\.00%\).* 0\.025 allows 1 ") as error:
        take(allowed, 80, 0, ranks)
    assert all(str(error.value).count(f"{name}.png") == 1 for name in ("cat/2", "dog/4"))


def test_no_readable_image_at_all_stops_the_run(tmp_path):
    path = write_folder(tmp_path / "train", count=1).parent
    for file in path.glob("train/*/*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"images in a row cannot be read, the last of them .*png"):
        take(folder_job(path, max_bad_fraction=1.0), 1)


def test_ranks_for_which_no_image_is_left_validate(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", count=1)
    for rank in range(3):  # of two images
        job = folder_job(tmp_path, local_batch_size=1)
        assert len(list(build_image_validation_dataloader(3, rank, job, "val"))) == 1


def test_a_broken_image_has_no_loss_in_validation(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", count=4)
    (tmp_path / "val" / "dog" / "0.png").write_bytes(b"")
    loader = build_image_validation_dataloader(1, 0, folder_job(tmp_path), "val")
    scored = [
        number
        for inputs, labels in loader
        for number, row in zip(inputs["sample_index"].tolist(), labels, strict=True)
        if (row == 0).all()
    ]
    assert sorted(scored) == [0, 1, 2, 3, 5, 6, 7]


# --- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "num_workers"), [(1, 0), (2, 0), (4, 0), (2, 2)])
def test_validation_has_each_image_once_and_as_many_batches_on_each_rank(ranks, num_workers):
    job = emoji_job(num_workers=num_workers)
    images = open_images(job, "multimodal.validation_splits", "unseen_style")
    seen, is_last_scored = [], []
    for rank in range(ranks):
        loader = build_image_validation_dataloader(ranks, rank, job, "unseen_style")
        batches = list(loader)
        assert len(batches) == len(loader) == -(-NUM_EMOJI // (3 * ranks))
        for inputs, labels in batches:
            assert inputs["input"].shape == (3, 3, 16, 16) and labels.shape == (3, 64)
            for row in range(3):
                if (labels[row] == -100).all():
                    continue
                assert (labels[row] == 0).all()
                seen.append(int(inputs["sample_index"][row]))
                item = images.read(seen[-1])
                assert torch.equal(item.image, inputs["input"][row])
                assert item.label == inputs["class_labels"][row]
        is_last_scored.append(bool((batches[-1][1] == 0).any()))
    assert sorted(seen) == list(range(NUM_EMOJI))
    assert any(is_last_scored)


def test_every_pass_of_validation_is_the_same():
    loader = build_image_validation_dataloader(1, 0, emoji_job(), "unseen_style")
    other = build_image_validation_dataloader(1, 0, emoji_job(seed=7), "unseen_style")
    first = list(loader)
    assert_same_batches(first, list(loader))
    assert_same_batches(first, list(other))


def test_validation_that_ends_early_sees_a_mix_of_classes():
    job = emoji_job()
    job.validation.steps = 4
    loader = build_image_validation_dataloader(1, 0, job, "unseen_style")
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    assert len({int(c) for inputs, _ in batches for c in inputs["class_labels"]}) > 3


def test_loading_leaves_the_global_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    take(emoji_job(), 2)
    list(build_image_validation_dataloader(1, 0, emoji_job(), "unseen_style"))
    assert torch.equal(torch.rand(1), expected)
