"""Encoding pictures with captions into latents of several shapes, and training on them."""

from __future__ import annotations

import json
import pickle
import runpy
import sys

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.jobs import ROOT
from tests.unit.data.image_jobs import make_job, save_tiny_vae, write_folder
from tests.unit.data.prompt_jobs import (
    by_number,
    captioned_job,
    take,
    use_prompted_model,
    write_captioned,
)
from tests.unit.data.test_prompt_datasets import read_captions, write_embeddings
from torchtitan_mixtures.data import image_data, prompt_datasets, prompt_loader
from torchtitan_mixtures.data.aspect_ratios import Bucket
from torchtitan_mixtures.data.encode_latents import Encoding, encode
from torchtitan_mixtures.data.image_data import image_spec
from torchtitan_mixtures.data.image_sets import to_tensor
from torchtitan_mixtures.data.prompt_datasets import CaptionedPictures
from torchtitan_mixtures.data.prompt_loader import (
    check_prompt_splits,
    list_prompt_splits,
    open_prompted_images,
    prompted_image_spec,
)
from torchtitan_mixtures.data.sources import document_rng
from torchtitan_mixtures.data.vae import load_vae

RATIOS = ("1:1", "2:1", "1:2")
SQUARE, WIDE, HIGH = (16, 16), (24, 10), (9, 30)
SIZES = [SQUARE, WIDE, SQUARE, HIGH, SQUARE, WIDE, SQUARE]
ORDER = [0, 2, 4, 6, 1, 5, 3]
"""Of the rows in the latents: shape by shape."""


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return str(save_tiny_vae(tmp_path_factory.mktemp("vae")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    write_captioned(root, "train", SIZES, lists=True)
    return write_captioned(root, "validation", SIZES[:3], lists=True)


@pytest.fixture(autouse=True)
def forget(tmp_path, monkeypatch):
    """What a new process would not know."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    for cached in (
        prompt_datasets._open_captioned,
        prompt_loader._latent_index,
        image_data._latent_index,
    ):
        cached.cache_clear()
    use_prompted_model(monkeypatch)
    yield
    datasets.enable_progress_bars()


def encode_captioned(folder, vae, out, **values):
    defaults = {"size": 16, "batch_size": 2, "shard_bytes": 3 * 4 * 8 * 8 * 2 * 4}
    defaults |= {"caption_column": "caption", "splits": ("train", "validation")}
    defaults |= {"aspect_ratios": RATIOS}
    return encode(Encoding(str(folder), vae, out, **{**defaults, **values}), lambda line: None)


def latent_job(out, **values):
    defaults = {"source": "folder", "aspect_ratios": list(RATIOS), "global_batch_size": 3}
    return captioned_job(out, **{**defaults, **values})


def open_train(job):
    return open_prompted_images(job, "multimodal.train_split", "train")


def read(images, index, number=0, is_flipped=False):
    return images.read(index, document_rng(0, number, "prompt"), is_flipped)


def test_latents_are_the_moments_that_the_vae_gives_with_all_captions(folder, vae, tmp_path):
    index = encode_captioned(folder, vae, tmp_path / "out", flip=True)
    assert index.is_captioned and index.class_names == ()
    job = latent_job(tmp_path / "out", random_flip=True)
    check_prompt_splits(job)
    spec = prompted_image_spec(job)
    assert (spec.channels, spec.size, spec.buckets) == (4, 8, index.buckets)
    assert list_prompt_splits(job) == ["train", "validation"]
    latents = open_train(job)
    pictures = [Bucket(b.name, 2 * b.height, 2 * b.width) for b in index.buckets]
    config = captioned_job(folder).multimodal
    originals = CaptionedPictures(config, "multimodal.train_split", "train", pictures)
    assert latents.shapes == ((4, 8, 8), (4, 6, 12), (4, 12, 6)) and latents.has_std
    assert [latents.shapes[b][1:] for b in latents.buckets] == [(8, 8)] * 4 + [(6, 12)] * 2 + [
        (12, 6)
    ]
    oracle = load_vae(vae, "cpu")
    for place, row in enumerate(ORDER):
        found = {read(latents, place, number).caption for number in range(30)}
        assert found == {f"picture {row} of train, text {i}" for i in range(row % 3 + 1)}
        picture = to_tensor(originals.read(row)[0])
        for is_flipped in (False, True):
            item = read(latents, place, is_flipped=is_flipped)
            mean, std = oracle.moments((picture.flip(-1) if is_flipped else picture)[None])
            torch.testing.assert_close(item.image, mean[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(item.std, std[0], atol=1e-5, rtol=1e-5)
    copy = pickle.loads(pickle.dumps(latents))
    assert torch.equal(read(copy, 5).image, read(latents, 5).image)


def test_a_step_has_latents_of_one_shape_on_any_number_of_ranks(folder, vae, tmp_path):
    encode_captioned(folder, vae, tmp_path / "out")
    job = latent_job(tmp_path / "out", local_batch_size=3)
    batches = take(job, 8)  # of 2 + 1 + 1 in an epoch
    shapes = [tuple(inputs["input"].shape) for inputs, _ in batches]
    assert sorted(shapes[:4]) == [(3, 4, 6, 12), (3, 4, 8, 8), (3, 4, 8, 8), (3, 4, 12, 6)]
    for inputs, labels in batches:
        height, width = inputs["input"].shape[2:]
        assert inputs["latent_std"].shape == inputs["input"].shape
        assert labels.shape == (3, height * width // 4) and not labels.any()
    single = latent_job(tmp_path / "out", local_batch_size=1)
    of_ranks = [take(single, 8, rank, 3) for rank in range(3)]
    found = by_number([batch for batches in of_ranks for batch in batches])
    assert found == by_number(batches)


def test_an_interrupted_run_goes_on_and_other_captions_are_not_mixed_in(folder, vae, tmp_path):
    index = encode_captioned(folder, vae, tmp_path / "out")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "out" / "latents.json").unlink()
    (tmp_path / "out" / "train-00001.safetensors").unlink()
    assert encode_captioned(folder, vae, tmp_path / "out") == index
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == whole
    with pytest.raises(ValueError, match="was begun with another shapes"):
        encode_captioned(folder, vae, tmp_path / "out", aspect_ratios=RATIOS[:2])
    prompt_datasets._open_captioned.cache_clear()
    other = write_captioned(tmp_path / "other", "train", SIZES)
    with pytest.raises(ValueError, match="was begun with other training images"):
        encode_captioned(other, vae, tmp_path / "out", splits=("train",))


def test_broken_images_are_left_out_even_if_they_are_all_of_a_shard(vae, tmp_path):
    other = write_captioned(tmp_path / "data", "train", SIZES)
    (other / "train" / "002.png").write_bytes(b"nothing")
    high = other / "train" / "003.png"
    high.write_bytes(high.read_bytes()[:300])
    values = {"splits": ("train",), "flip": True}
    encode_captioned(other, vae, tmp_path / "out", max_bad_fraction=0.5, **values)
    latents = open_train(latent_job(tmp_path / "out"))
    assert len(latents) == 5
    captions = [read(latents, place).caption for place in range(5)]
    assert captions == [f"picture {row} of train" for row in (0, 4, 6, 1, 5)]
    with pytest.raises(ValueError, match=r"2 of 7 images are broken.*0.01 .*003.png"):
        encode_captioned(other, vae, tmp_path / "no", **values)


def test_embeddings_of_the_data_set_fit_its_latents(folder, vae, tmp_path):
    encode_captioned(folder, vae, tmp_path / "out", splits=("train",))
    captions = read_captions(folder, "train")
    made = write_embeddings(tmp_path / "text", {"train": captions})
    latents = open_train(latent_job(tmp_path / "out", text_embeddings=made))
    for place, row in enumerate(ORDER):
        item = read(latents, place)
        assert item.prompts["prompt_text_pooled"].tolist() == [row, int(item.caption[-1])]
    made = write_embeddings(tmp_path / "others", {"train": captions[::-1]})
    with pytest.raises(ValueError, match=r"text_embeddings = .*embeds other captions than split"):
        open_train(latent_job(tmp_path / "out", text_embeddings=made))


def test_square_latents_need_no_aspect_ratios(folder, vae, tmp_path):
    encode_captioned(folder, vae, tmp_path / "out", aspect_ratios=())
    latents = open_train(latent_job(tmp_path / "out", aspect_ratios=[]))
    assert latents.shapes == ((4, 8, 8),) and len(latents) == 7


def test_a_job_that_does_not_fit_its_latents_is_refused(folder, vae, tmp_path, monkeypatch):
    encode_captioned(folder, vae, tmp_path / "out")
    cases = [
        ({"image_size": 32}, r"image_size = 32: .* are 8 x 8. Set it to 8"),
        ({"vae": vae}, r"multimodal.vae = .* remove multimodal.vae"),
        ({"random_flip": True}, r"random_flip = true: .* --flip"),
        ({"aspect_ratios": []}, r"aspect_ratios = \[\]: .* have \['1:1', '2:1', '1:2'\]"),
        ({"train_split": "test"}, r'no split "test"; their splits are train, validation'),
    ]
    for values, message in cases:
        with pytest.raises(ValueError, match=message):
            check_prompt_splits(latent_job(tmp_path / "out", **values))
    use_prompted_model(monkeypatch, patch_size=4)
    with pytest.raises(ValueError, match=r"latents of 2:1 are 6 x 12, the model takes 4 x 12"):
        prompted_image_spec(latent_job(tmp_path / "out"))
    classes = make_job(source="folder", path=str(tmp_path / "out"), image_size=8)
    with pytest.raises(ValueError, match=r"have captions and no classes; only models with prompts"):
        image_spec(classes)


def test_latents_with_classes_are_no_prompted_images(folder, vae, tmp_path):
    classes = write_folder(tmp_path / "classes" / "train", count=1).parent
    encode(Encoding(str(classes), vae, tmp_path / "out", size=16), lambda line: None)
    with pytest.raises(ValueError, match=r"have classes and no captions.* --caption-column"):
        prompted_image_spec(latent_job(tmp_path / "out"))


def test_captions_that_are_corrupt_are_named(folder, vae, tmp_path):
    encode_captioned(folder, vae, tmp_path / "out")
    shard = tmp_path / "out" / "train-00000.safetensors"
    tensors = load_file(shard)
    tensors["captions"][:2] = 255
    save_file(tensors, shard, {"broken": "[]"})
    index = tmp_path / "out" / "latents.json"
    entries = json.loads(index.read_text())
    entries["splits"]["train"][0]["bytes"] = shard.stat().st_size
    index.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=rf"{shard} is corrupt \(captions of row 0"):
        read(open_train(latent_job(tmp_path / "out")), 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"caption_column": ""}, r"--splits \('train', 'validation'\): is about data sets with"),
        ({"caption_column": "words"}, r'caption_column = "words": .* no such column'),
        ({"aspect_ratios": ("9:1",)}, r"--aspect-ratios: '9:1' is no aspect ratio"),
        ({"patch_size": 0}, r"--patch-size 0: must be at least 1"),
        ({"splits": ("test",)}, r'Cannot open split "test"'),
    ],
)
def test_what_cannot_be_encoded_is_refused(folder, vae, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        encode_captioned(folder, vae, tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_the_command_encodes_and_says_how_to_train(folder, vae, tmp_path, monkeypatch, capsys):
    words = f"--path {folder} --vae {vae} --out {tmp_path / 'out'} --size 16 --half".split()
    words += ["--caption-column", "caption", "--splits", "train", "validation"]
    words += ["--aspect-ratios", *RATIOS]
    script = str(ROOT / "scripts" / "prepare_data.py")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))  # as Python does for a script
    monkeypatch.setattr(sys, "argv", [script, "encode-latents", *words])
    runpy.run_path(script, run_name="__main__")
    said = capsys.readouterr().out
    assert f"10 images with captions in {tmp_path / 'out'}; train with" in said
    assert said.strip().endswith("--multimodal.image_size 8 --multimodal.aspect_ratios 1:1,2:1,1:2")
    assert len(open_train(latent_job(tmp_path / "out"))) == 7
