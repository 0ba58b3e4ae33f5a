"""Reading embeddings of captions in training, and files that are refused."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.data.tiny_encoders import save_captions, save_t5
from torchtitan_mixtures.data.encode_text import TextEncoding, encode
from torchtitan_mixtures.data.samples import choose_caption
from torchtitan_mixtures.data.text_embeddings import (
    TextEmbeddings,
    digest_captions,
    read_embedding_spec,
    usable_captions,
)

CAPTIONS = [["a fox", "red fox"], [], ["a bell"], ["blue", " ", "two apple"], ["red"], []]
CAPTION_BYTES = 4 * 9 * 48


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("embeddings")
    data = save_captions(root / "data", train=CAPTIONS, val=["a fox", "red"])
    encoding = TextEncoding(
        str(data),
        (str(save_t5(root / "t5")),),
        root / "out",
        splits=("train", "val"),
        shard_bytes=4 * CAPTION_BYTES,
    )
    encode(encoding, lambda line: None)
    return root / "out"


@pytest.fixture
def folder(original, tmp_path):
    """A copy that a test can break."""
    return shutil.copytree(original, tmp_path / "out")


def change_index(folder, **values):
    path = folder / "text_embeddings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_rows_are_those_of_images_and_their_captions(original):
    embeddings = TextEmbeddings(str(original), "train")
    counts = [embeddings.num_captions(image) for image in range(6)]
    assert counts == [2, 0, 1, 2, 1, 0] and len(embeddings) == 6
    rows = [embeddings.row(image, n) for image, count in enumerate(counts) for n in range(count)]
    assert rows == list(range(6))
    for image, caption in ((1, 0), (2, 1), (2, -1), (5, 0)):
        with pytest.raises(IndexError, match=f"image {image} has no caption {caption}"):
            embeddings.row(image, caption)


def test_rows_are_read_from_the_shard_they_are_in(original):
    embeddings = TextEmbeddings(str(original), "train")
    shards = [load_file(original / f"train-0000{number}.safetensors") for number in range(2)]
    stored = torch.cat([shard["embeddings"] for shard in shards])
    assert [len(shard["images"]) for shard in shards] == [4, 2]
    for row in (5, 0, 3, 4):
        states, pooled = embeddings.read(row)
        assert torch.equal(states, stored[row]) and states.shape == (9, 48)
        assert pooled.shape == (0,)
    fox = TextEmbeddings(str(original), "val").read(0)[0]
    torch.testing.assert_close(embeddings.read(0)[0], fox)


def test_captions_are_those_that_training_draws_from():
    for value in ["a fox", ["a", " ", "b", None, ""], ("x",)]:
        captions = usable_captions(value)
        draws = [choose_caption(value, (n + 0.5) / len(captions)) for n in range(len(captions))]
        assert draws == captions
    for value in ["", None, [], [" "], 3]:
        assert usable_captions(value) == []
        with pytest.raises(ValueError, match="the caption is"):
            choose_caption(value, 0.0)


def test_captions_that_changed_are_refused(original):
    embeddings = TextEmbeddings(str(original), "train")
    embeddings.check_captions(digest_captions(CAPTIONS)[1])
    unusable = [[*texts, "  ", None] for texts in CAPTIONS]
    embeddings.check_captions(digest_captions(unusable)[1])
    moved = [["a fox"], ["red fox"], *CAPTIONS[2:]]
    for changed in (CAPTIONS[::-1], CAPTIONS[:-1], [["a fix", "red fox"], *CAPTIONS[1:]], moved):
        message = r'embeds other captions than split "train" has; encode those .*\("caption"\)'
        with pytest.raises(ValueError, match=message):
            embeddings.check_captions(digest_captions(changed)[1])


def test_captions_are_told_from_their_joins():
    digests = {digest_captions(v)[1] for v in (["ab", "c"], ["a", "bc"], [["ab", "c"]], ["abc"])}
    assert len(digests) == 4


def test_embeddings_that_moved_are_the_same(original, folder):
    before = TextEmbeddings(str(original), "train").fingerprint()
    assert TextEmbeddings(str(folder), "train").fingerprint() == before
    assert TextEmbeddings(str(folder), "val").fingerprint() != before


def test_another_process_opens_the_files_itself(original):
    embeddings = TextEmbeddings(str(original), "train")
    copy = pickle.loads(pickle.dumps(embeddings))
    assert not copy._open
    for row in range(6):
        assert torch.equal(copy.read(row)[0], embeddings.read(row)[0])


def test_a_folder_that_holds_no_embeddings_is_refused(original, folder, tmp_path):
    with pytest.raises(ValueError, match=r"text_embeddings = \"no/such\": is not a local folder"):
        read_embedding_spec("no/such")
    with pytest.raises(ValueError, match=r"has no text_embeddings\.json; name a folder that"):
        read_embedding_spec(str(tmp_path))
    with pytest.raises(ValueError, match=r'has no split "test"; its splits are train, val'):
        TextEmbeddings(str(original), "test")
    (folder / "text_embeddings.json").unlink()
    with pytest.raises(ValueError, match=r"is not complete; run .*encode-text"):
        read_embedding_spec(str(folder))


def test_a_truncated_missing_or_changed_shard_is_named(folder):
    shard = folder / "train-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"{shard} is {len(whole) - 100} bytes long, not"):
        TextEmbeddings(str(folder), "train")
    shard.write_bytes(b"x" * len(whole))
    with pytest.raises(ValueError, match=rf"{shard} is corrupt"):
        TextEmbeddings(str(folder), "train")
    shard.write_bytes(whole)
    tensors = load_file(shard)
    save_file({**tensors, "embeddings": tensors["embeddings"].mT.contiguous()}, shard)
    changed = json.loads((folder / "text_embeddings.json").read_text())["splits"]
    changed["train"]["shards"][1]["bytes"] = shard.stat().st_size
    change_index(folder, splits=changed)
    with pytest.raises(ValueError, match=rf"{shard} is not as text_embeddings\.json says"):
        TextEmbeddings(str(folder), "train")
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard} is missing; .*encode it again"):
        TextEmbeddings(str(folder), "train")
    assert len(TextEmbeddings(str(folder), "val")) == 2


def test_an_index_that_cannot_be_read_is_named(folder):
    index = folder / "text_embeddings.json"
    entries = json.loads(index.read_text())
    for text, problem in [
        ("{", "corrupt"),
        ("[]", "corrupt"),
        (json.dumps({**entries, "format_version": 9}), "of format version 9, not 1"),
        (json.dumps({**entries, "spec": {}}), "corrupt"),
        (json.dumps({**entries, "splits": {"train": {"shards": []}}}), "corrupt"),
    ]:
        index.write_text(text)
        with pytest.raises(ValueError, match=f"{index} is {problem}"):
            read_embedding_spec(str(folder))
    splits = entries["splits"]
    splits["train"]["captions"] = 7
    index.write_text(json.dumps({**entries, "splits": splits}))
    with pytest.raises(ValueError, match=r"is not of these shards of split \"train\""):
        TextEmbeddings(str(folder), "train")
