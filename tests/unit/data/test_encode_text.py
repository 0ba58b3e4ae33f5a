"""Embedding the captions of data sets: every caption, in parts, in half precision, and refused."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from types import SimpleNamespace

import datasets
import pytest
import torch
from safetensors.torch import load_file

from tests.jobs import ROOT
from tests.unit.data.image_jobs import write_picture
from tests.unit.data.tiny_encoders import save_captions, save_clip, save_t5
from torchtitan_mixtures.data import encode_text as encode_module
from torchtitan_mixtures.data.encode_text import TextEncoding, encode
from torchtitan_mixtures.data.prompts import text_spec
from torchtitan_mixtures.data.text_embeddings import TextEmbeddings, read_embedding_spec
from torchtitan_mixtures.data.text_encoders import FrozenTextEncoders, frozen_prompt_spec
from torchtitan_mixtures.job_config import Multimodal

TRAIN = ["a red fox", "two green apple", "a bell", "blue", "a red bell above a fox", "under", "red"]
MANY = [["a fox", "", "red fox"], ["a bell"], [], None, ["  ", "blue apple", None, "two bell"]]
CAPTION_BYTES = 4 * (20 * 48 + 24)  # 11 rows of the CLIP and 9 of the T5, and the pooled embedding


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return str(save_clip(root / "clip", seed=1)), str(save_t5(root / "t5", seed=2))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return save_captions(root / "captions", train=TRAIN, many=MANY)


@pytest.fixture(autouse=True)
def quiet_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def make_encoding(data, encoders, out, **values):
    defaults = {"batch_size": 2, "shard_bytes": 3 * CAPTION_BYTES}
    return TextEncoding(str(data), encoders, out, **{**defaults, **values})


def ignore(line: str) -> None:
    pass


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_embeddings_are_what_the_encoders_make(data, encoders, tmp_path):
    lines = []
    splits = ("train", "many")
    encode(make_encoding(data, encoders, tmp_path / "out", splits=splits), lines.append)
    assert "train: 7 captions of 7 images" in lines and "many: 5 captions of 5 images" in lines
    assert f"{CAPTION_BYTES} bytes per caption, 0.000 GB in all" in lines
    oracle = FrozenTextEncoders(encoders, "cpu")
    spec = read_embedding_spec(str(tmp_path / "out"))
    assert spec == oracle.spec == frozen_prompt_spec(encoders)
    assert text_spec(Multimodal(text_embeddings=str(tmp_path / "out")), 5) == spec
    captions = {
        "train": [[text] for text in TRAIN],
        "many": [["a fox", "red fox"], ["a bell"], [], [], ["blue apple", "two bell"]],
    }
    for split, of_images in captions.items():
        embeddings = TextEmbeddings(str(tmp_path / "out"), split)
        assert len(embeddings) == sum(map(len, of_images))
        for image, texts in enumerate(of_images):
            assert embeddings.num_captions(image) == len(texts)
            for number, text in enumerate(texts):
                found = embeddings.read(embeddings.row(image, number))
                for part, expected in zip(found, oracle.encode([text]), strict=True):
                    assert part.dtype == torch.float32
                    torch.testing.assert_close(part, expected[0], atol=1e-5, rtol=1e-5)


def test_encoders_without_a_pooled_embedding_can_be_used(data, encoders, tmp_path):
    encode(make_encoding(data, encoders[1:], tmp_path / "out"), ignore)
    states, pooled = TextEmbeddings(str(tmp_path / "out"), "train").read(4)
    expected, _ = FrozenTextEncoders(encoders[1:], "cpu").encode([TRAIN[4]])
    torch.testing.assert_close(states, expected[0], atol=1e-5, rtol=1e-5)
    assert pooled.shape == (0,)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_takes_half_the_room_and_is_read_as_such(data, encoders, tmp_path, dtype):
    encode(make_encoding(data, encoders, tmp_path / "whole"), ignore)
    encode(make_encoding(data, encoders, tmp_path / "half", dtype=dtype), ignore)
    whole, half = (TextEmbeddings(str(tmp_path / name), "train") for name in ("whole", "half"))
    for one, other in zip(half.read(6), whole.read(6), strict=True):
        assert one.dtype == half.dtype == getattr(torch, dtype)
        assert torch.equal(one, other.to(one.dtype))
    # With half the bytes a caption, twice the captions in a shard.
    assert len(list((tmp_path / "whole").glob("train-*"))) == 3
    assert len(list((tmp_path / "half").glob("train-*"))) == 2
    assert half.fingerprint() != whole.fingerprint()


def test_encoders_compute_in_the_type_that_is_asked_for(data, encoders, tmp_path):
    encode(make_encoding(data, encoders, tmp_path, compute_dtype="bfloat16"), ignore)
    rough = FrozenTextEncoders(encoders, "cpu", dtype=torch.bfloat16)
    exact = FrozenTextEncoders(encoders, "cpu")
    found = TextEmbeddings(str(tmp_path), "train").read(6)
    others = rough.encode(TRAIN[6:]), exact.encode(TRAIN[6:])
    for part, near, far in zip(found, *others, strict=True):
        assert part.dtype == torch.float32
        assert torch.equal(part, near[0]) and not torch.equal(part, far[0])
    with pytest.raises(ValueError, match="was begun with another compute_dtype"):
        encode(make_encoding(data, encoders, tmp_path), ignore)


def test_a_killed_run_goes_on_and_ends_the_same(data, encoders, tmp_path, monkeypatch):
    splits = ("train", "many")
    encode(make_encoding(data, encoders, tmp_path / "whole", splits=splits), ignore)
    parts = make_encoding(data, encoders, tmp_path / "parts", splits=splits)
    written = []
    write_shard = encode_module._Encoder._write_shard

    def count_and_stop(self, path, *rest):
        if len(written) == 2:
            path.with_name(path.name + ".tmp").write_bytes(b"half of it")
            raise KeyboardInterrupt
        write_shard(self, path, *rest)
        written.append(path.name)

    monkeypatch.setattr(encode_module._Encoder, "_write_shard", count_and_stop)
    with pytest.raises(KeyboardInterrupt):
        encode(parts, ignore)
    with pytest.raises(ValueError, match=r"is not complete; run .* which goes on where it ended"):
        read_embedding_spec(str(tmp_path / "parts"))
    before = {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in written}
    monkeypatch.setattr(encode_module._Encoder, "_write_shard", write_shard)
    encode(parts, ignore)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    after = {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in written}
    assert len(before) == 2 and before == after
    lines = []
    again = encode(parts, lines.append)
    assert lines[-1] == f"{tmp_path / 'parts'} is complete already"
    assert again == encode(make_encoding(data, encoders, tmp_path / "new", splits=splits), ignore)


def test_a_shard_that_is_corrupt_when_a_run_goes_on_is_named(data, encoders, tmp_path):
    encode(make_encoding(data, encoders, tmp_path), ignore)
    (tmp_path / "text_embeddings.json").unlink()
    shard = tmp_path / "train-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{shard}: corrupt .*; delete it and run again"):
        encode(make_encoding(data, encoders, tmp_path), ignore)
    shard.unlink()
    encode(make_encoding(data, encoders, tmp_path), ignore)


def test_captions_that_are_cut_are_counted_also_over_two_runs(encoders, tmp_path):
    data = save_captions(tmp_path / "data", train=["red " * 12, "red", "apple apple apple", "fox"])
    out = tmp_path / "out"
    lines = []
    index = encode(make_encoding(data, encoders, out), lines.append)
    assert index.splits["train"].truncated == (2, 1)
    message = "train: 2 of 4 captions are longer than the window of 11 tokens of clip"
    assert any(line.startswith(message) for line in lines)
    (out / "text_embeddings.json").unlink()
    (out / "train-00001.safetensors").unlink()
    assert encode(make_encoding(data, encoders, out), ignore) == index
    with pytest.raises(ValueError, match=r"the prompt 'red red .*long_prompts"):
        encode(make_encoding(data, encoders, tmp_path / "no", long_prompts="refuse"), ignore)
    with pytest.raises(ValueError, match="was begun with another long_prompts"):
        encode(make_encoding(data, encoders, out, long_prompts="refuse"), ignore)


def test_embeddings_of_something_else_are_not_mixed_in(data, encoders, tmp_path):
    out = tmp_path / "out"
    encode(make_encoding(data, encoders, out), ignore)
    other_data = save_captions(tmp_path / "data", train=[*TRAIN[:-1], "blue"])
    other_clip = str(save_clip(tmp_path / "clip", seed=5))
    cases = [
        ((data, encoders), {"dtype": "float16"}, "another dtype"),
        ((data, encoders[::-1]), {}, "another spec"),
        ((data, (other_clip, encoders[1])), {}, "another encoders_sha256"),
        ((other_data, encoders), {}, "other captions or splits"),
        ((data, encoders), {"splits": ("train", "many")}, "other captions or splits"),
    ]
    for arguments, values, what in cases:
        with pytest.raises(ValueError, match=f"was begun with {what}"):
            encode(make_encoding(*arguments, out, **values), ignore)
    (out / "encoding.json").write_text("{")
    with pytest.raises(ValueError, match=r"encoding\.json cannot be read; name a new folder"):
        encode(make_encoding(data, encoders, out), ignore)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="exists and holds no embeddings; name a new folder"):
        encode(make_encoding(data, encoders, tmp_path), ignore)


def test_what_the_disk_cannot_hold_is_not_begun(data, encoders, tmp_path, monkeypatch):
    free = SimpleNamespace(free=7 * CAPTION_BYTES - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    out = tmp_path / "new" / "out"
    with pytest.raises(ValueError, match=r"--out .*the disk has 0\.000 GB left; .* or --half"):
        encode(make_encoding(data, encoders, out), ignore)
    assert not out.parent.exists()
    encode(make_encoding(data, encoders, out, dtype="float16"), ignore)


def test_embeddings_that_are_no_numbers_are_not_written(data, encoders, tmp_path, monkeypatch):
    def encode_ids(self, ids):
        return torch.full((len(ids[0]), 20, 48), 1e6), torch.zeros(len(ids[0]), 24)

    monkeypatch.setattr(FrozenTextEncoders, "encode_ids", encode_ids)
    with pytest.raises(ValueError, match=r"not finite numbers; encode with --half bfloat16"):
        encode(make_encoding(data, encoders, tmp_path / "out", dtype="float16"), ignore)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    encode(make_encoding(data, encoders, tmp_path / "bfloat16", dtype="bfloat16"), ignore)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        (
            {"splits": ("test",)},
            r'--splits test: .*has no split "test"; its splits are train, many',
        ),
        ({"path": "./no/such"}, r'multimodal\.path = "\./no/such": there is no such file'),
        ({"caption_column": "text"}, r'--caption-column "text": .* its columns are caption, numb'),
        ({"caption_column": "number"}, r"holds int64; it must hold strings, or lists of them"),
        ({"encoders": ("no/such",)}, r'multimodal\.text_encoders: "no/such" is not a local folder'),
    ],
)
def test_what_cannot_be_encoded_is_refused(data, encoders, tmp_path, values, message):
    path, folders = values.pop("path", data), values.pop("encoders", encoders)
    with pytest.raises(ValueError, match=message):
        encode(make_encoding(path, folders, tmp_path / "out", **values), ignore)
    assert not (tmp_path / "out").exists()


def test_a_split_without_any_caption_is_refused(encoders, tmp_path):
    data = save_captions(tmp_path / "data", train=["", "  ", None])
    with pytest.raises(ValueError, match=r'split "train" of .* has no captions'):
        encode(make_encoding(data, encoders, tmp_path / "out"), ignore)


def test_the_command_embeds_a_folder_of_images(encoders, tmp_path, monkeypatch, capsys):
    pictures = tmp_path / "pictures"
    for number, text in enumerate(TRAIN):
        write_picture(pictures / f"{number}.png", number)
        with (pictures / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": f"{number}.png", "text": text}) + "\n")
    script, out = str(ROOT / "scripts" / "prepare_data.py"), tmp_path / "out"
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))  # as Python does for a script
    words = [
        "encode-text",
        "--path",
        str(pictures),
        "--splits",
        "train",
        "train[3:]",
        "--out",
        str(out),
    ]
    words += ["--caption-column", "text", "--encoders", *encoders, "--batch-size", "4"]
    words += ["--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", [script, *words, "--half"])
    runpy.run_path(script, run_name="__main__")
    printed = capsys.readouterr().out
    assert f"{CAPTION_BYTES // 2} bytes per caption" in printed
    assert f"11 captions as 20 x 48 in {out}; train with --multimodal.text_embeddings" in printed
    embeddings = TextEmbeddings(str(out), "train")
    expected, _ = FrozenTextEncoders(encoders, "cpu").encode([TRAIN[2]])
    found, _ = embeddings.read(embeddings.row(2, 0))
    torch.testing.assert_close(found.float(), expected[0], atol=1e-2, rtol=1e-2)
    assert len(TextEmbeddings(str(out), "train[3:]")) == 4
    assert load_file(out / "train-00000.safetensors")["embeddings"].dtype == torch.float16
    monkeypatch.setattr(sys, "argv", [script, *words, "--half", "bfloat16"])
    with pytest.raises(SystemExit):
        runpy.run_path(script, run_name="__main__")
    assert re.match(r"error: --out .* was begun with another dtype", capsys.readouterr().err)
