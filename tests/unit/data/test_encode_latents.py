"""Encoding folders into latents, and reading them in training."""

from __future__ import annotations

import json
import pickle
import re
import runpy
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.jobs import ROOT
from tests.unit.data.image_jobs import make_job, save_tiny_vae, write_folder
from torchtitan_mixtures.data import encode_latents as encode_module
from torchtitan_mixtures.data import image_data
from torchtitan_mixtures.data.encode_latents import Encoding, encode
from torchtitan_mixtures.data.image_data import check_splits, image_spec, open_images
from torchtitan_mixtures.data.image_sets import ClassFolders, FolderImages
from torchtitan_mixtures.data.vae import Vae, load_vae

IMAGE_BYTES = 4 * 8 * 8 * 2 * 4  # mean and std of 4 x 8 x 8 latents in float32


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return str(save_tiny_vae(tmp_path_factory.mktemp("vae")))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    write_folder(root / "train", count=5)
    write_folder(root / "val", count=2)
    return root


@pytest.fixture(autouse=True)
def forget_folders():
    """Tests change folders that a process would not see change."""
    forget()


def forget():
    image_data._class_folders.cache_clear()
    image_data._latent_index.cache_clear()


def ignore(line: str) -> None:
    pass


def make_encoding(pictures, vae, out, **values):
    defaults = {"size": 16, "batch_size": 3, "shard_bytes": 4 * IMAGE_BYTES}
    return Encoding(str(pictures), vae, out, **{**defaults, **values})


def latent_job(out, **multimodal):
    values = {"source": "folder", "path": str(out), "image_size": 8, "validation_splits": ["val"]}
    return make_job(**{**values, **multimodal})


def open_train(out, **multimodal):
    return open_images(latent_job(out, **multimodal), "multimodal.train_split", "train")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_latents_are_the_moments_that_the_vae_gives(pictures, vae, tmp_path):
    encode(make_encoding(pictures, vae, tmp_path, flip=True), ignore)
    check_splits(latent_job(tmp_path))
    spec = image_spec(latent_job(tmp_path))
    assert (spec.channels, spec.size, spec.num_classes) == (4, 8, 2)
    assert spec.class_names == ("cat", "dog")
    oracle = load_vae(vae, "cpu")
    folders = ClassFolders(str(pictures))
    for split, count in (("train", 10), ("val", 4)):
        latents = open_images(latent_job(tmp_path), "multimodal.validation_splits", split)
        originals = FolderImages(folders, split, 16)
        assert len(latents) == len(originals) == count
        for index in range(count):
            for is_flipped in (False, True):
                picture = originals.read(index, is_flipped)
                mean, std = oracle.moments(picture.image[None])
                item = latents.read(index, is_flipped)
                assert item.label == picture.label and item.std is not None
                torch.testing.assert_close(item.image, mean[0], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(item.std, std[0], atol=1e-5, rtol=1e-5)


def test_float16_halves_the_shards_and_reads_as_float32(pictures, vae, tmp_path):
    encode(make_encoding(pictures, vae, tmp_path / "whole"), ignore)
    encode(make_encoding(pictures, vae, tmp_path / "half", half=True), ignore)
    whole, half = (open_train(tmp_path / name).read(3) for name in ("whole", "half"))
    assert half.image.dtype == torch.float32 and half.std.dtype == torch.float32
    torch.testing.assert_close(half.image, whole.image, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(half.std, whole.std, atol=1e-3, rtol=1e-3)
    # With half the bytes an image, twice the images in a shard.
    assert len(list((tmp_path / "whole").glob("train-*"))) == 3
    assert len(list((tmp_path / "half").glob("train-*"))) == 2


def test_an_interrupted_run_goes_on_and_ends_the_same(pictures, vae, tmp_path, monkeypatch):
    encode(make_encoding(pictures, vae, tmp_path / "whole"), ignore)
    written = []
    write_shard = encode_module._Encoder._write_shard

    def count_and_stop(self, path, *rest):
        if len(written) == 2:
            path.with_name(path.name + ".tmp").write_bytes(b"half of it")
            raise KeyboardInterrupt
        write_shard(self, path, *rest)
        written.append(path.name)

    parts = make_encoding(pictures, vae, tmp_path / "parts")
    monkeypatch.setattr(encode_module._Encoder, "_write_shard", count_and_stop)
    with pytest.raises(KeyboardInterrupt):
        encode(parts, ignore)
    with pytest.raises(ValueError, match="its latents are not complete; run"):
        image_spec(latent_job(tmp_path / "parts"))
    before = {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in written}
    monkeypatch.setattr(encode_module._Encoder, "_write_shard", write_shard)
    encode(parts, ignore)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    after = {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in written}
    assert before == after
    lines = []
    assert encode(parts, lines.append) == encode(
        make_encoding(pictures, vae, tmp_path / "whole"), ignore
    )
    assert lines == [f"{tmp_path / 'parts'} is complete already"]


def test_latents_that_are_no_numbers_are_not_written(pictures, vae, tmp_path, monkeypatch):
    def moments(self, pixels):
        return torch.full((len(pixels), 4, 8, 8), torch.nan), torch.ones(len(pixels), 4, 8, 8)

    monkeypatch.setattr(Vae, "moments", moments)
    with pytest.raises(ValueError, match=r"not finite numbers; encode without --half, or use"):
        encode(make_encoding(pictures, vae, tmp_path / "out", half=True), ignore)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_latents_that_moved_are_the_same_and_others_are_not(pictures, vae, tmp_path):
    encode(make_encoding(pictures, vae, tmp_path / "a"), ignore)
    before = open_train(tmp_path / "a").fingerprint()
    (tmp_path / "a").rename(tmp_path / "b")
    forget()
    assert open_train(tmp_path / "b").fingerprint() == before
    encode(make_encoding(pictures, vae, tmp_path / "c", size=32), ignore)
    assert open_train(tmp_path / "c", image_size=16).fingerprint() != before


def test_a_folder_of_something_else_is_left_alone(pictures, vae, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="exists and holds no latents; name a new folder"):
        encode(make_encoding(pictures, vae, tmp_path), ignore)
    assert list(contents(tmp_path)) == ["thesis.txt"]


def test_latents_of_another_kind_are_not_mixed_in(pictures, vae, tmp_path):
    encode(make_encoding(pictures, vae, tmp_path), ignore)
    with pytest.raises(ValueError, match="was begun with another is_flipped"):
        encode(make_encoding(pictures, vae, tmp_path, flip=True), ignore)


def test_latents_of_other_images_are_not_mixed_in(pictures, vae, tmp_path):
    out = tmp_path / "out"
    encode(make_encoding(pictures, vae, out), ignore)
    for count, which in (((6, 2), "training"), ((5, 3), "val")):
        other = tmp_path / which
        for split, number in zip(("train", "val"), count, strict=True):
            write_folder(other / split, count=number)
        with pytest.raises(ValueError, match=f"was begun with other {which} images"):
            encode(make_encoding(other, vae, out), ignore)
    (out / "encoding.json").write_text("{")
    with pytest.raises(ValueError, match=r"encoding\.json cannot be read; name a new folder"):
        encode(make_encoding(pictures, vae, out), ignore)


def test_broken_images_are_left_out_and_named_up_to_the_limit(vae, tmp_path):
    pictures = write_folder(tmp_path / "pictures" / "train", count=5).parent
    (pictures / "train" / "dog" / "bad.png").write_bytes(b"nothing")
    lines = []
    encode(make_encoding(pictures, vae, tmp_path / "out", max_bad_fraction=0.1), lines.append)
    assert any("broken" in line and "bad.png" in line for line in lines)
    latents = open_train(tmp_path / "out")
    assert [latents.read(index).label for index in range(len(latents))] == [0] * 5 + [1] * 5
    with pytest.raises(ValueError, match=r"1 of 11 images are broken.*0.05 .*bad.png"):
        encode(make_encoding(pictures, vae, tmp_path / "no", max_bad_fraction=0.05), ignore)
    assert not (tmp_path / "no" / "latents.json").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 15}, "--size 15: must be a multiple of 2"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"path": "no/such"}, '--path = "no/such": there is no such folder'),
    ],
)
def test_what_cannot_be_encoded_is_refused(pictures, vae, tmp_path, values, message):
    path = values.pop("path", pictures)
    with pytest.raises(ValueError, match=message):
        encode(make_encoding(path, vae, tmp_path / "out", **values), ignore)
    assert not (tmp_path / "out").exists()


def test_a_job_that_does_not_fit_its_latents_is_refused(pictures, vae, tmp_path):
    encode(make_encoding(pictures, vae, tmp_path), ignore)
    cases = [
        ({"image_size": 32}, r"image_size = 32: .* are 8 x 8. Set it to 8, .* --size 64"),
        ({"vae": vae}, r"multimodal.vae = .* remove multimodal.vae"),
        ({"random_flip": True}, r"random_flip = true: .* --flip"),
    ]
    for values, message in cases:
        with pytest.raises(ValueError, match=message):
            image_spec(latent_job(tmp_path, **values))
    with pytest.raises(ValueError, match=r'no split "test"; their splits are train, val'):
        check_splits(latent_job(tmp_path, validation_splits=["test"]))


def test_a_truncated_missing_or_changed_shard_is_named(pictures, vae, tmp_path):
    encode(make_encoding(pictures, vae, tmp_path), ignore)
    shard = tmp_path / "train-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"{shard} is {len(whole) - 100} bytes long, not"):
        open_train(tmp_path)
    shard.write_bytes(b"x" * len(whole))
    with pytest.raises(ValueError, match=rf"{shard} is corrupt"):
        open_train(tmp_path)
    shard.write_bytes(whole)
    tensors = load_file(shard)
    save_file({**tensors, "labels": tensors["labels"] + 2}, shard, {"broken": "[]"})
    assert shard.stat().st_size == len(whole)
    with pytest.raises(ValueError, match=rf"{shard} is corrupt \(a label is not in 0 to 1\)"):
        open_train(tmp_path)
    shard.unlink()
    image_data._latent_index.cache_clear()
    with pytest.raises(ValueError, match=rf"{shard} is missing; .*encode it again"):
        image_spec(latent_job(tmp_path))


def test_an_index_that_cannot_be_read_is_named(pictures, vae, tmp_path):
    encode(make_encoding(pictures, vae, tmp_path), ignore)
    index = tmp_path / "latents.json"
    entries = json.loads(index.read_text())
    for text, problem in [
        ("{", "corrupt"),
        (json.dumps({**entries, "format_version": 9}), "of format version 9, not 1"),
        (json.dumps({**entries, "more": 1}), "corrupt"),
    ]:
        index.write_text(text)
        with pytest.raises(ValueError, match=f"{index} is {problem}"):
            image_spec(latent_job(tmp_path))


def test_another_process_opens_the_files_itself(pictures, vae, tmp_path):
    encode(make_encoding(pictures, vae, tmp_path), ignore)
    latents = open_train(tmp_path)
    copy = pickle.loads(pickle.dumps(latents))
    assert torch.equal(copy.read(7).image, latents.read(7).image)


def test_the_command_encodes_and_says_how_to_train(pictures, vae, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    options = {"--path": pictures, "--vae": vae, "--out": out, "--size": 16, "--batch-size": 4}
    words = [str(word) for option in options.items() for word in option]
    script = str(ROOT / "scripts" / "prepare_data.py")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))  # as Python does for a script
    monkeypatch.setattr(sys, "argv", [script, "encode-latents", *words, "--flip", "--half"])
    runpy.run_path(script, run_name="__main__")
    assert f"14 images of 2 classes in {out}; train with" in capsys.readouterr().out
    assert image_spec(latent_job(out, random_flip=True)).size == 8
    monkeypatch.setattr(sys, "argv", [script, "encode-latents", *words])
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    assert re.match(r"error: --out .* was begun with another dtype", capsys.readouterr().err)
