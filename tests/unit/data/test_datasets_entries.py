"""`kind = "datasets"` in a mixture: data may be moved, and messages name the entry."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value

from tests.jobs import debug_job
from tests.unit.data.file_fakes import picture
from torchtitan_mixtures.data.loader import (
    MultimodalDataLoader,
    build_multimodal_dataloader,
    build_multimodal_tokenizer,
)
from torchtitan_mixtures.data.opening import local_files
from torchtitan_mixtures.multimodal_config import Multimodal

SAMPLES = 12


def table(count: int = SAMPLES, broken: bool = False) -> Dataset:
    images = [{"bytes": b"no" if broken else picture(n * 4), "path": None} for n in range(count)]
    return Dataset.from_dict(
        {"caption": [f"{n} foxes" for n in range(count)], "image": images},
        features=Features({"caption": Value("string"), "image": Image()}),
    )


def build(**entry: Any) -> MultimodalDataLoader:
    sources = [{"name": "mine", "kind": "datasets", **entry}]
    job = debug_job(
        "mot",
        "--multimodal.source=mixture",
        f"--multimodal.sources={json.dumps(sources)}",
        "--validation.no-enable",
        "--multimodal.shards=1",
    )
    return build_multimodal_dataloader(1, 0, build_multimodal_tokenizer(job), job)


def read(loader: MultimodalDataLoader, count: int) -> list[list[int]]:
    return [inputs["input"].flatten().tolist() for inputs, _ in itertools.islice(loader, count)]


def one_file(folder: Path) -> dict[str, Any]:
    table().to_parquet(folder / "a.parquet")
    return {"path": "{folder}/a.parquet"}


def a_format(folder: Path) -> dict[str, Any]:
    table().to_parquet(folder / "a.parquet")
    return {"path": "parquet", "data_files": ["{folder}/*.parquet"]}


def files_of_a_folder(folder: Path) -> dict[str, Any]:
    table().to_parquet(folder / "a.parquet")
    return {"path": "{folder}", "data_files": ["a.*"], "streaming": True}


def saved(folder: Path) -> dict[str, Any]:
    DatasetDict({"train": table()}).save_to_disk(folder / "saved")
    return {"path": "{folder}/saved"}


def at(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(entry).replace("{folder}", str(folder)))


@pytest.mark.parametrize("make", [one_file, a_format, files_of_a_folder, saved])
def test_local_data_can_be_moved_between_save_and_resume(
    tmp_path: Path, make: Callable[[Path], dict[str, Any]]
) -> None:
    before, after = tmp_path / "before", tmp_path / "elsewhere" / "after"
    before.mkdir()
    entry = make(before)
    whole = read(build(**at(before, entry)), 6)
    loader = build(**at(before, entry))
    read(loader, 3)
    state = loader.state_dict()
    assert str(tmp_path) not in state["fingerprint"]
    after.parent.mkdir()
    shutil.move(before, after)
    moved = build(**at(after, entry))
    moved.load_state_dict(state)
    assert read(moved, 3) == whole[3:]


def test_files_of_other_sizes_or_names_are_other_data(tmp_path: Path) -> None:
    entry = one_file(tmp_path)
    state = build(**at(tmp_path, entry)).state_dict()
    (tmp_path / "a.parquet").rename(tmp_path / "b.parquet")
    key = r"multimodal\.sources\[mine\]\.path: hash of the files is '"
    with pytest.raises(ValueError, match=key):
        build(path=str(tmp_path / "b.parquet")).load_state_dict(state)
    table(SAMPLES + 1).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=key):
        build(**at(tmp_path, entry)).load_state_dict(state)
    table().rename_column("caption", "text").to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"sources\[mine\]\.caption_column is 'text', but 'capt"):
        build(**at(tmp_path, entry), caption_column="text").load_state_dict(state)


def test_all_keys_of_the_fingerprint_are_those_of_the_entry(tmp_path: Path) -> None:
    own = json.loads(build(**at(tmp_path, one_file(tmp_path))).state_dict()["fingerprint"])
    of_entry = {key: value for key, value in own.items() if "sources[mine]" in key}
    path = "multimodal.sources[mine].path"
    assert of_entry.pop(f"{path}: hash of the files")
    assert of_entry == {
        "multimodal.sources[mine].kind": "datasets",
        "multimodal.sources[mine].subset": "",
        "multimodal.sources[mine].split": "train",
        "multimodal.sources[mine].streaming": False,
        "multimodal.sources[mine].segments_column": "segments",
        "multimodal.sources[mine].caption_column": "caption",
        "multimodal.sources[mine].image_column": "image",
        "multimodal.sources[mine].audio_column": "audio",
        "multimodal.sources[mine].text_column": "text",
        f"{path}: samples in the split": SAMPLES,
    }
    foreign = ("path", "name", "data_files", "streaming", "train_split", "source")
    assert not {f"multimodal.{key}" for key in foreign} & set(own)


def test_data_that_are_elsewhere_are_what_their_names_say(tmp_path: Path) -> None:
    def files(path: str, *data_files: str) -> list[tuple[str, int]] | None:
        config = Multimodal(source="datasets", path=path, data_files=list(data_files))
        found = local_files(config)
        return found.files if found else None

    assert files("nobody/nothing") is None
    assert files("csv", "https://example.org/a.csv") is None
    assert files("csv", str(tmp_path / "*.csv")) is None
    for name, content in (("b.csv", "12"), ("a/c.csv", "345"), ("cache-1.arrow", "6")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert files(str(tmp_path)) == [("a/c.csv", 3), ("b.csv", 2)]
    assert files("csv", str(tmp_path / "**/*.csv")) == [("a/c.csv", 3), ("b.csv", 2)]
    assert files(str(tmp_path), "a/*.csv") == files("csv", str(tmp_path / "a/c.csv"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "./none"}, r'^multimodal\.sources\[mine\]\.path = "\./none": there is no such'),
        (
            {"path": "{folder}/a.parquet", "image_column": "x"},
            r'^multimodal\.sources\[mine\]\.image_column = "x": .* no such column',
        ),
        (
            {"path": "{folder}/a.parquet", "split": "x"},
            r'Cannot open split "x" \(multimodal\.sources\[mine\]\.split\) of '
            r"multimodal\.sources\[mine\]\.path = .*, multimodal\.sources\[mine\]\.subset = ",
        ),
        (
            {"path": "csv", "data_files": ["{folder}/*.csv"]},
            r"^multimodal\.sources\[mine\]\.data_files = .*matches no file",
        ),
        (
            {"path": "{folder}/a.xyz"},
            r"^multimodal\.sources\[mine\]\.path = .*list the file in "
            r"multimodal\.sources\[mine\]\.data_files\.",
        ),
        (
            {"path": "{folder}/none.parquet", "streaming": True},
            r"^multimodal\.sources\[mine\]\.path = .*: there is no such file",
        ),
    ],
)
def test_messages_name_the_keys_of_the_entry(
    tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    one_file(tmp_path)
    (tmp_path / "a.xyz").write_text("")
    with pytest.raises(ValueError, match=message) as caught:
        build(**at(tmp_path, entry))
    assert "multimodal.path" not in str(caught.value)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_too_many_bad_samples_are_those_of_the_source(tmp_path: Path, is_streamed: bool) -> None:
    table(broken=True).to_parquet(tmp_path / "a.parquet")
    loader = build(path=str(tmp_path / "a.parquet"), streaming=is_streamed)
    with pytest.raises(ValueError, match=r'12 of 12 samples .* of source "mine" are bad; '):
        read(loader, 1)


def test_data_without_samples_are_named_by_the_key_of_the_entry(tmp_path: Path) -> None:
    table(0).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"^multimodal\.sources\[mine\]\.streaming: shard 0 of 1"):
        read(build(path=str(tmp_path / "a.parquet"), streaming=True), 1)
    with pytest.raises(ValueError, match=r"of multimodal\.sources\[mine\]\.path = .* no data"):
        build(path=str(tmp_path / "a.parquet"))
