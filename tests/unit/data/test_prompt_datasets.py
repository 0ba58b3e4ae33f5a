"""Pictures with captions: formats, aspect ratios, broken ones, embeddings and frozen encoders."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from safetensors.torch import save_file

from tests.unit.data.image_jobs import PATCH_SIZE, needs_fork
from tests.unit.data.prompt_jobs import (
    assert_same_batches,
    by_number,
    captioned_job,
    take,
    use_prompted_model,
    write_captioned,
    write_vae_config,
)
from torchtitan_mixtures.data import prompt_datasets, prompt_texts
from torchtitan_mixtures.data.aspect_ratios import make_buckets
from torchtitan_mixtures.data.image_batches import Draw
from torchtitan_mixtures.data.prompt_batches import PromptCollator
from torchtitan_mixtures.data.prompt_loader import (
    build_prompt_dataloader,
    build_prompt_validation_dataloader,
    check_prompt_splits,
    list_prompt_splits,
    open_prompted_images,
    prompted_image_spec,
)
from torchtitan_mixtures.data.prompt_spec import EncoderSpan, PromptSpec
from torchtitan_mixtures.data.sources import document_rng
from torchtitan_mixtures.data.text_embeddings import (
    EmbeddingIndex,
    EmbeddingShard,
    EmbeddingSplit,
    digest_captions,
)

RATIOS = ["1:1", "2:1", "1:2"]
SQUARE, WIDE, HIGH = (16, 16), (24, 10), (9, 30)
SIZES = [SQUARE] * 7 + [WIDE] * 6 + [HIGH] * 1 + [SQUARE] * 2
"""Nine square ones, six wide ones, a high one."""


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path, monkeypatch):
    """Keep what `datasets` caches in the test's folder, and its progress bars off."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    prompt_datasets._open_captioned.cache_clear()
    use_prompted_model(monkeypatch)
    yield
    datasets.enable_progress_bars()


def write_both(root: Path, lists: bool = False) -> Path:
    write_captioned(root, "train", SIZES, lists)
    return write_captioned(root, "validation", SIZES[4:14], lists)


@pytest.fixture
def folder(tmp_path):
    return write_both(tmp_path / "data")


def wide_job(folder, **values):
    defaults = {"aspect_ratios": RATIOS, "global_batch_size": 4, "local_batch_size": 4}
    return captioned_job(folder, **{**defaults, **values})


def open_train(job):
    return open_prompted_images(job, "multimodal.train_split", "train")


def read(images, index, number=0, is_flipped=False):
    return images.read(index, document_rng(0, number, "prompt"), is_flipped)


# --- pictures and captions ------------------------------------------------------------------------


def test_a_folder_with_captions_is_read(folder):
    job = captioned_job(folder)
    check_prompt_splits(job)
    spec = prompted_image_spec(job)
    assert (spec.channels, spec.size, spec.buckets) == (3, 8, make_buckets([], 8, 2))
    assert list_prompt_splits(job) == ["train", "validation"]
    images = open_train(job)
    assert len(images) == 16 and images.shapes == ((3, 8, 8),) and not images.has_std
    item = read(images, 3)
    assert item.caption == "picture 3 of train" and item.image.shape == (3, 8, 8)
    assert torch.equal(read(images, 3, is_flipped=True).image, item.image.flip(-1))
    copy = pickle.loads(pickle.dumps(images))
    assert torch.equal(read(copy, 5).image, read(images, 5).image)


@pytest.mark.parametrize("is_list", [False, True])
def test_parquet_with_captions_or_lists_of_them_is_read(folder, tmp_path, is_list):
    pictures = sorted((folder / "train").glob("*.png"))
    texts = [f"text {i}" for i in range(len(pictures))]
    string = datasets.Value("string")
    feature = datasets.List(string) if is_list else string
    rows = {
        "pixels": [path.read_bytes() for path in pictures],
        "words": [[text, f"{text} again"] for text in texts] if is_list else texts,
    }
    features = datasets.Features({"pixels": datasets.Value("binary"), "words": feature})
    file = tmp_path / "data.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    job = captioned_job(file, image_column="pixels", caption_column="words")
    images = open_train(job)
    captions = {read(images, 3, number).caption for number in range(20)}
    assert captions == ({"text 3", "text 3 again"} if is_list else {"text 3"})


def test_one_of_several_captions_is_drawn_for_each_sample(tmp_path):
    folder = write_both(tmp_path / "data", lists=True)
    job = captioned_job(folder, local_batch_size=16)
    batches = take(job, 12)
    assert len({tuple(by_number([batch]).values()) for batch in batches}) == 12
    images = open_train(job)
    drawn = Counter(read(images, 2, number).caption[-1] for number in range(300))
    assert set(drawn) == {"0", "1", "2"} and min(drawn.values()) > 60
    first, second = (
        [
            inputs["prompt_text"]
            for inputs, _ in build_prompt_validation_dataloader(1, 0, job, "validation")
        ]
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_half_of_the_samples_are_mirrored_if_asked_for(folder):
    plain, flipped = (
        torch.cat([i["input"] for i, _ in take(captioned_job(folder, random_flip=on), 20)])
        for on in (False, True)
    )
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True)) and 15 < sum(same) < 45


def test_images_that_are_broken_or_have_no_caption_are_replaced_and_named(folder, caplog):
    (folder / "train" / "002.png").write_bytes(b"nothing")
    path = folder / "train" / "metadata.jsonl"
    path.write_text(path.read_text().replace("picture 5 of train", "  "))
    job = captioned_job(folder, local_batch_size=16)
    single = take(job, 2)
    assert "002.png" in caplog.text and "005.png" in caplog.text
    assert "it has no caption" in caplog.text
    assert all((labels == 0).all() for _, labels in single)
    of_ranks = [take(captioned_job(folder, local_batch_size=4), 4, rank, 2) for rank in range(2)]
    found = by_number([batch for batches in of_ranks for batch in batches])
    assert found == by_number(single)
    with pytest.raises(ValueError, match=r"2 of 16 samples .*max_bad_fraction = 0.1"):
        take(captioned_job(folder, local_batch_size=16, max_bad_fraction=0.1), 2)


# --- aspect ratios --------------------------------------------------------------------------------


def test_a_picture_has_the_shape_nearest_to_its_own(folder):
    images = open_train(wide_job(folder))
    assert images.buckets.tolist() == [0] * 7 + [1] * 6 + [2] + [0] * 2
    assert images.shapes == ((3, 8, 8), (3, 6, 12), (3, 12, 6))
    for index, bucket in enumerate(images.buckets):
        assert read(images, index).image.shape == images.shapes[bucket]


def test_all_samples_of_a_step_share_a_shape_and_an_epoch_has_every_image(folder):
    job = wide_job(folder)
    images = open_train(job)
    index_of = {read(images, i).image.numpy().tobytes(): i for i in range(16)}
    orders = []
    for epoch in range(2):
        steps = take(job, 12)[6 * epoch :][:6]  # 3 + 2 + 1 batches of 4
        order = []
        for inputs, labels in steps:
            _, height, width = inputs["input"].shape[1:]
            assert labels.shape == (4, height * width // PATCH_SIZE**2) and not labels.any()
            found = [index_of[image.numpy().tobytes()] for image in inputs["input"]]
            assert len({images.buckets[index] for index in found}) == 1
            order += found
        counts = Counter(order)
        assert sorted(counts) == list(range(16)) and len(order) == 24
        assert counts[13] == 4  # the only one of its shape
        assert sum(counts[i] for i in (7, 8, 9, 10, 11, 12)) == 8
        orders.append(order)
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 2), (2, 2), (2, 1), (4, 1)])
def test_ranks_and_batch_sizes_change_nothing_in_buckets(folder, ranks, batch_size):
    expected = by_number(take(wide_job(folder), 9))
    job = wide_job(folder, local_batch_size=batch_size)
    count = 9 * 4 // (ranks * batch_size)
    of_ranks = [take(job, count, rank, ranks) for rank in range(ranks)]
    assert by_number([batch for batches in of_ranks for batch in batches]) == expected
    for step in range(9):  # in which all ranks have one shape
        of_step = slice(step * count // 9, (step + 1) * count // 9)
        shapes = {i["input"].shape[1:] for batches in of_ranks for i, _ in batches[of_step]}
        assert len(shapes) == 1


@needs_fork
def test_workers_and_resuming_change_nothing_in_buckets(folder):
    whole = take(wide_job(folder), 14)
    assert_same_batches(take(wide_job(folder, num_workers=2), 14), whole)
    loader = build_prompt_dataloader(1, 0, None, wide_job(folder, num_workers=1))
    list(itertools.islice(loader, 8))
    state = json.loads(json.dumps(loader.state_dict()))
    assert_same_batches(take(wide_job(folder), 6, state=state), whole[8:])
    others = wide_job(folder, global_batch_size=8)
    with pytest.raises(ValueError, match=r"global_batch_size is 8, but 4 in the run"):
        take(others, 1, state=state)
    with pytest.raises(ValueError, match=r"multimodal.aspect_ratios is \['1:1', '2:1'\]"):
        take(wide_job(folder, aspect_ratios=RATIOS[:2]), 1, state=state)


def test_without_a_global_batch_size_it_is_that_of_all_ranks(folder):
    implied = wide_job(folder, global_batch_size=-1, local_batch_size=2)
    explicit = wide_job(folder, global_batch_size=4, local_batch_size=2)
    for rank in range(2):
        assert_same_batches(take(implied, 8, rank, 2), take(explicit, 8, rank, 2))


def test_the_stand_in_for_a_broken_image_has_its_shape(folder):
    path = folder / "train" / "008.png"
    path.write_bytes(path.read_bytes()[:200])  # whose header says how large it was
    images = open_train(wide_job(folder))
    assert images.buckets[8] == 1
    batches = take(wide_job(folder), 6)
    stand_in = read(images, 9).image
    wide = torch.cat([i["input"] for i, _ in batches if i["input"].shape[2:] == (6, 12)])
    assert len(wide) == 8 and sum(torch.equal(image, stand_in) for image in wide) >= 2


def test_pictures_turned_by_their_camera_have_the_shape_they_are_shown_in(folder):
    from PIL import Image

    path = folder / "train" / "001.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", WIDE).save(path, exif=exif)
    images = open_train(wide_job(folder))
    assert images.buckets[1] == 2 and read(images, 1).image.shape == (3, 12, 6)


def test_pictures_for_a_vae_have_whole_latents_in_every_shape(folder, tmp_path):
    vae = write_vae_config(tmp_path / "vae")
    job = wide_job(folder, vae=vae)
    assert prompted_image_spec(job).channels == 4
    found = {(tuple(i["input"].shape[2:]), labels.shape[1]) for i, labels in take(job, 6)}
    assert found == {((16, 16), 16), ((12, 24), 18), ((24, 12), 18)}


@pytest.mark.parametrize(("ranks", "num_workers"), [(1, 0), (2, 0), (2, 2)])
def test_validation_in_buckets_has_each_image_once(folder, ranks, num_workers):
    # Rows without workers run everywhere, so the mark would skip too much; its reason holds here.
    if num_workers and needs_fork.args[0]:
        pytest.skip(needs_fork.kwargs["reason"])
    job = wide_job(folder, local_batch_size=2, num_workers=num_workers)
    images = open_prompted_images(job, "multimodal.validation_splits", "validation")
    lengths, seen = set(), []
    for rank in range(ranks):
        loader = build_prompt_validation_dataloader(ranks, rank, job, "validation")
        batches = list(loader)
        lengths |= {len(loader), len(batches)}
        for inputs, labels in batches:
            for row in (labels == 0).all(1).nonzero().flatten().tolist():
                index = int(inputs["sample_index"][row])
                seen.append(index)
                assert torch.equal(inputs["input"][row], read(images, index).image)
    assert sorted(seen) == list(range(10)) and len(lengths) == 1


# --- embeddings and frozen encoders ---------------------------------------------------------------

SPEC = PromptSpec(
    "text",
    "embeddings",
    3,
    dim=4,
    pooled_dim=2,
    spans=(EncoderSpan("clip", (0, 3), (0, 4), (0, 2)),),
)


def write_embeddings(folder: Path, captions: dict[str, list], dtype: str = "float32") -> str:
    """Embeddings that say which image and caption they are of."""
    folder.mkdir()
    splits = {}
    for split, of_images in captions.items():
        starts, sha256 = digest_captions(of_images)
        pairs = [(i, c) for i in range(len(of_images)) for c in range(starts[i + 1] - starts[i])]
        where = torch.tensor(pairs, dtype=torch.float32)  # (captions, 2)
        tensors = {
            "embeddings": where.repeat(1, 2)[:, None].repeat(1, 3, 1).to(getattr(torch, dtype)),
            "pooled": where.to(getattr(torch, dtype)),
            "images": where[:, 0].long(),
        }
        file = folder / f"{split}.safetensors"
        save_file(tensors, file)
        shard = EmbeddingShard(file.name, len(pairs), file.stat().st_size)
        splits[split] = EmbeddingSplit(len(of_images), len(pairs), sha256, (0,), (shard,))
    EmbeddingIndex(SPEC, dtype, "caption", ("0" * 64,), splits).write(folder)
    return str(folder)


def read_captions(folder: Path, split: str) -> list:
    lines = (folder / split / "metadata.jsonl").read_text().splitlines()
    return [json.loads(line)["caption"] for line in lines]


def test_embeddings_are_those_of_the_caption_that_was_drawn(tmp_path):
    folder = write_both(tmp_path / "data", lists=True)
    splits = ("train", "validation")
    made = write_embeddings(tmp_path / "out", {s: read_captions(folder, s) for s in splits})
    job = captioned_job(folder, text_embeddings=made)
    images = open_train(job)
    for index, number in itertools.product(range(16), range(3)):
        item = read(images, index, number)
        which = [index, int(item.caption[-1])]
        assert item.prompts["prompt_text"].tolist() == [which * 2] * 3
        assert item.prompts["prompt_text_pooled"].tolist() == which
    ((inputs, _),) = take(job, 1)
    assert inputs["prompt_text"].shape == (3, 3, 4)
    assert inputs["prompt_text_pooled"].shape == (3, 2)
    assert inputs["prompt_text"].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_batch_has_embeddings_in_the_type_they_are_stored_in(tmp_path, dtype):
    folder = write_both(tmp_path / "data")
    captions = {"train": read_captions(folder, "train")}
    made = write_embeddings(tmp_path / "out", captions, dtype)
    images = open_train(captioned_job(folder, text_embeddings=made))
    draws = [Draw(n, images.read(n, document_rng(0, n, "prompt")), []) for n in (3, 7)]
    draws.insert(1, Draw(4, None, []))
    inputs, labels, *_ = PromptCollator(images, 2, batch_size=5)(draws)
    for key, width in (("prompt_text", 3 * 4), ("prompt_text_pooled", 2)):
        assert inputs[key].dtype == getattr(torch, dtype)
        rows = inputs[key].float().reshape(5, width)
        expected = torch.zeros(5, width)  # blank without a sample: where one is missing, at the end
        expected[0, ::2], expected[2, ::2] = 3, 7
        assert torch.equal(rows, expected)
    assert (labels[:, 0] == 0).tolist() == [True, False, True, False, False]


def test_embeddings_of_other_captions_are_refused(tmp_path):
    folder = write_both(tmp_path / "data")
    captions = read_captions(folder, "train")
    made = write_embeddings(tmp_path / "out", {"train": [*captions[:-1], "something else"]})
    with pytest.raises(ValueError, match=r"text_embeddings = .*embeds other captions than split"):
        open_train(captioned_job(folder, text_embeddings=made))
    with pytest.raises(ValueError, match=r'text_embeddings = .*has no split "validation"'):
        job = captioned_job(folder, text_embeddings=made)
        build_prompt_validation_dataloader(1, 0, job, "validation")


class FakeTokenizers:
    """Two encoders; the second has a window of 8 bytes."""

    def __init__(self, folders, long_prompts):
        self.truncated = [0, 0]

    def tokenize(self, text):
        self.truncated[1] += len(text) > 8
        rows = [list(text.encode())[:window] for window in (40, 8)]
        return [torch.tensor(r + [0] * (w - len(r))) for r, w in zip(rows, (40, 8), strict=True)]


def test_frozen_encoders_get_their_token_ids(folder, tmp_path, monkeypatch, caplog):
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.json").write_text(str(number))
    encoders = "torchtitan_mixtures.data.text_encoders"
    monkeypatch.setattr(f"{encoders}.PromptTokenizers", FakeTokenizers)
    monkeypatch.setattr(f"{encoders}.frozen_prompt_spec", lambda folders: SPEC)
    found = lambda folder: SimpleNamespace(folder=Path(folder), tokenizer=Path(folder))  # noqa: E731
    monkeypatch.setattr(prompt_texts, "read_encoder_files", found)
    job = captioned_job(folder, text_encoders=[str(tmp_path / "0"), str(tmp_path / "1")])
    ((inputs, _),) = take(job, 1)
    assert {key for key in inputs if key.startswith("prompt")} == {
        "prompt_text_ids_0",
        "prompt_text_ids_1",
    }
    assert inputs["prompt_text_ids_0"].shape == (3, 40)
    assert inputs["prompt_text_ids_1"].shape == (3, 8)
    assert "3 prompts in 3 samples" in caplog.text
    state = build_prompt_dataloader(1, 0, None, job).state_dict()
    (tmp_path / "1" / "config.json").write_text("another")
    with pytest.raises(ValueError, match="hashes of the text encoders' JSON files is"):
        take(job, 1, state=state)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"caption_column": "words"},
            r'caption_column = "words": .*its columns are image, caption',
        ),
        ({"image_column": "caption2"}, r'image_column = "caption2": .* has no such column'),
        ({"caption_column": "image"}, r'caption_column = "image": holds .* must hold strings'),
        ({"streaming": True}, r"streaming = true: .* set it to false"),
        ({"train_split": "test"}, r'Cannot open split "test" \(multimodal.train_split\)'),
        ({"validation_splits": ["test"]}, r'split "test" \(multimodal.validation_splits\)'),
        ({"path": "/no/such"}, r'path = "/no/such": there is no such file or folder'),
        ({"aspect_ratios": ["1:9"]}, r"aspect_ratios: '1:9' is no aspect ratio .*allowed"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(folder, values, message):
    job = captioned_job(**{"path": folder, **values})
    with pytest.raises(ValueError, match=message):
        check_prompt_splits(job)


def test_data_sets_have_no_spoken_prompts(folder, monkeypatch):
    use_prompted_model(monkeypatch, "text", "speech")
    with pytest.raises(ValueError, match=r"source = 'datasets': has no spoken prompts"):
        open_train(captioned_job(folder))
