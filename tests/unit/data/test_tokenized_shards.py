"""Shards: what is written is read, damage is found, and training reads documents of them."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.data.shard_fakes import (
    KINDS,
    Plain,
    open_toy,
    read_naively,
    write_shards,
)
from torchtitan_mixtures.data import tokenized_shards
from torchtitan_mixtures.data.shard_manifest import MANIFEST, PLAN
from torchtitan_mixtures.data.tokenize_source import Tokenizing, tokenize
from torchtitan_mixtures.data.tokenized_shards import CHUNK_BYTES, TokenizedShards

code_lists = st.lists(st.integers(0, 65535), max_size=5)
documents_lists = st.lists(
    st.tuples(
        st.lists(st.tuples(st.sampled_from(KINDS), code_lists, st.booleans()), max_size=4),
        st.booleans(),
    ),
    max_size=8,
)


def read(folder: Path) -> list[Plain]:
    shards = TokenizedShards(folder)
    documents: list[Plain] = []
    for number, file in enumerate(shards.manifest.files):
        for place in range(file.documents):
            found = shards.file(number).read(place)
            names = [shards.manifest.modalities[m].name for m in found.modalities]
            codes = [c.tolist() for c in found.codes]
            segments = list(zip(names, codes, map(bool, found.losses), strict=True))
            documents.append((segments, found.is_pair))
    return documents


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(documents=documents_lists, dtype=st.sampled_from(["<u2", "<u4"]))
def test_documents_come_back_as_they_were_written(
    tmp_path: Path, documents: list[Plain], dtype: str
) -> None:
    manifest = write_shards(tmp_path, documents, dtype)
    assert read(tmp_path) == read_naively(tmp_path) == documents
    for modality in manifest.modalities:
        of_it = [[s for s in segments if s[0] == modality.name] for segments, _ in documents]
        assert modality.documents == sum(map(bool, of_it))
        assert modality.segments == sum(map(len, of_it))
        assert modality.codes == sum(len(s[1]) for segments in of_it for s in segments)


def test_large_codes_need_and_get_wide_numbers(tmp_path: Path) -> None:
    documents: list[Plain] = [([("text", [0, 4_000_000_000], True)], False)]
    write_shards(tmp_path, documents, "<u4")
    assert read(tmp_path) == documents


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    tokenize(open_toy, Tokenizing(folder, parts=3), lambda line: None)
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def test_opening_reads_headers_only_and_reading_compares_checksums(copied: Path) -> None:
    path = copied / "shard-000001.safetensors"
    octets = bytearray(path.read_bytes())
    octets[-200] ^= 1
    path.write_bytes(octets)
    shards = TokenizedShards(copied)
    shards.file(0)
    with pytest.raises(ValueError, match=r"shard-000001\S*: is damaged: the checksum.*Delete it"):
        shards.file(1)


def test_codes_are_compared_as_far_as_they_are_read(tmp_path: Path) -> None:
    chunk = CHUNK_BYTES // 2  # codes
    lengths = [chunk - 10, 20, chunk, 0, chunk // 2]
    documents: list[Plain] = [([("text", [7] * length, True)], False) for length in lengths]
    write_shards(tmp_path, documents)
    path = tmp_path / "shard-000000.safetensors"
    octets = bytearray(path.read_bytes())
    codes = len(octets) - 3 * len(lengths) - 2 * sum(lengths)  # the last but three of bytes
    octets[codes + 2 * (chunk + 100)] ^= 4  # in the third document, and in the second chunk
    path.write_bytes(octets)
    file = TokenizedShards(tmp_path).file(0)
    assert len(file.read(0).codes[0]) == lengths[0]
    assert file.read(3).codes[0].tolist() == []
    assert file.read(4).codes[0].tolist() == [7] * lengths[4]  # all in the third chunk
    file.check(0, 1)
    for number in (1, 2):
        with pytest.raises(ValueError, match="is damaged: the checksum of its codes is another"):
            file.read(number)
    with pytest.raises(ValueError, match="is damaged"):
        file.check(0, 5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), r"is cut off or no safetensors \(0 bytes\)"),
        (lambda path: path.write_bytes(path.read_bytes()[:700]), "is cut off or no|no safetensors"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, and its header says"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, and its header says"),
        (lambda path: path.write_bytes(b"PK" * 3000), "is cut off or no safetensors"),
        (lambda path: shutil.copy(path.with_name("shard-000000.safetensors"), path), "and manif"),
    ],
)
def test_a_file_that_is_not_as_it_was_is_named_at_once(
    copied: Path, change: Callable[[Path], object], problem: str
) -> None:
    change(copied / "shard-000002.safetensors")
    with pytest.raises(ValueError, match=rf"shard-000002\S*: (.*)({problem}).*Delete it"):
        TokenizedShards(copied)


def test_a_file_of_the_same_size_from_elsewhere_is_found_by_its_checksum(tmp_path: Path) -> None:
    for name, code in (("one", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, [([("text", [code], True)], False)])
    file = "shard-000000.safetensors"
    shutil.copy(tmp_path / "other" / file, tmp_path / "one" / file)
    with pytest.raises(ValueError, match="its checksum is not that of"):
        TokenizedShards(tmp_path / "one").file(0)


def test_no_flipped_bit_of_a_file_or_manifest_gives_other_documents(
    made: Path, tmp_path: Path
) -> None:
    expected, rng, found = read(made), random.Random(0), Counter[str]()
    for number in range(120):
        folder = shutil.copytree(made, tmp_path / str(number))
        path = rng.choice([*sorted(folder.glob("*.safetensors")), folder / MANIFEST])
        octets = bytearray(path.read_bytes())
        octets[rng.randrange(len(octets))] ^= 1 << rng.randrange(8)
        path.write_bytes(octets)
        try:
            # A name in the manifest, of a tokenizer say, says nothing of what is in the files.
            if [s[1:] for d, _ in read(folder) for s in d] == [
                s[1:] for d, _ in expected for s in d
            ]:
                found["harmless"] += 1
                continue
            pytest.fail(f"{path} was read as something else")
        except ValueError as error:
            assert str(folder) in str(error)
            found["refused"] += 1
        shutil.rmtree(folder)
    assert found["refused"] > 90


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.update(format_version=1), "format version 1, and this program reads 2"),
        (lambda m: m.pop("format_version"), "is corrupt"),
        (lambda m: m.pop("files"), "is corrupt"),
        (lambda m: m.update(extra=1), "is corrupt .*extra"),
        (lambda m: m.update(documents=-1), "documents = -1"),
        (lambda m: m.update(documents=True), "documents = True"),
        (lambda m: m.update(documents=m["documents"] + 1), "its totals"),
        (lambda m: m["files"][0].update(bytes="many"), "bytes = 'many'"),
        (lambda m: m["files"][0].update(file="../shard"), "file '../shard'"),
        (lambda m: m["files"][0]["codes"].update(smell=1), "smell"),
        (lambda m: m["files"][0]["codes"].update(text=1.5), "1.5"),
        (lambda m: m["files"].append(m["files"][0]), "a file is named twice"),
        (lambda m: m.update(modalities=m["modalities"] * 2), "modalities"),
        (lambda m: m.update(modalities=3), "is corrupt"),
    ],
)
def test_a_manifest_that_says_something_odd_is_refused(
    copied: Path, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    manifest = json.loads((copied / MANIFEST).read_text())
    change(manifest)
    (copied / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"manifest.json: .*{problem}"):
        TokenizedShards(copied)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"3"])
def test_a_manifest_that_is_none_is_refused(copied: Path, content: bytes) -> None:
    (copied / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest.json: is corrupt .*Delete it"):
        TokenizedShards(copied)


def test_an_incomplete_folder_says_how_it_is_completed(copied: Path, tmp_path: Path) -> None:
    (copied / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"are not complete; run .* as before"):
        TokenizedShards(copied)
    (copied / PLAN).unlink()
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        TokenizedShards(copied)
    with pytest.raises(ValueError, match="no such folder"):
        TokenizedShards(tmp_path / "nowhere")


def test_mapped_files_stay_behind_when_shards_go_to_another_process(made: Path) -> None:
    shards = TokenizedShards(made)
    first = shards.file(0).read(0)
    sent = pickle.dumps(shards)
    assert len(sent) < 10_000
    again = pickle.loads(sent).file(0).read(0)
    assert [c.tolist() for c in again.codes] == [c.tolist() for c in first.codes]


def test_only_so_many_files_are_mapped_at_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized_shards, "_MAX_OPEN", 2)
    shards = TokenizedShards(made)
    first = shards.file(0)
    assert shards.file(1) is not first and shards.file(0) is first
    shards.file(2)  # in place of 1, which was used longest ago
    assert list(shards._open) == [0, 2] and shards.file(0) is first
    assert read(made) == read_naively(made)
