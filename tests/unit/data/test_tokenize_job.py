"""Which source of a configuration is tokenised, and that training reads what became of it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from torchtitan_mixtures.data.mixture import SourceTokenizers, build_ingredients
from torchtitan_mixtures.data.shard_manifest import MANIFEST, PLAN
from torchtitan_mixtures.data.tokenize_job import job_recipe, open_job_source
from torchtitan_mixtures.data.tokenize_parts import files_state
from torchtitan_mixtures.data.tokenize_source import Tokenizing, tokenize
from torchtitan_mixtures.multimodal_config import Multimodal

JOB = """
[job]
custom_config_module = "torchtitan_mixtures.job_config"
[model]
name = "mot"
flavor = "debugmodel"
[training]
seq_len = 256
[validation]
enable = false
[multimodal]
max_pairs = 1
condition_dropout = 0.5
"""
MIXTURE = """
source = "mixture"
[[multimodal.sources]]
name = "seen"
kind = "emoji"
[[multimodal.sources]]
name = "styles"
kind = "emoji"
split = "unseen_style"
[[multimodal.validation_sources]]
name = "held"
kind = "emoji"
split = "unseen_concept"
"""


def arguments(folder: Path, text: str, *more: str) -> tuple[str, ...]:
    path = folder / "job.toml"
    path.write_text(JOB + text)
    return ("--config", str(path), *more)


def test_any_source_of_a_mixture_is_found_by_its_name(tmp_path: Path) -> None:
    job = arguments(tmp_path, MIXTURE)
    splits = {"seen": "train", "styles": "unseen_style", "held": "unseen_concept"}
    for name, split in splits.items():
        opened = open_job_source(job, name, 1)
        assert opened.settings["multimodal.train_split"] == split
        assert opened.settings["name"] == name and not opened.source.is_endless


@pytest.mark.parametrize(
    ("text", "name", "problem"),
    [
        (MIXTURE, "", "the configuration has several, seen, styles, held; name one"),
        (MIXTURE, "other", "--source other: there is no such source; name one of seen, styles"),
        ("", "other", "has the one source 'emoji'; leave the option out"),
        (MIXTURE.replace('"held"', '"seen"'), "seen", "rename one"),
    ],
)
def test_a_name_of_no_source_or_of_two_is_refused(
    tmp_path: Path, text: str, name: str, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        open_job_source(arguments(tmp_path, text), name, 1)


def test_fewer_than_one_epoch_are_refused() -> None:
    with pytest.raises(ValueError, match="--epochs 0: must be at least 1"):
        job_recipe([], "", 0)


def test_recipes_go_to_other_processes_and_take_overrides_along(tmp_path: Path) -> None:
    job = arguments(tmp_path, "", "--multimodal.train_split", "unseen_style")
    opened = pickle.loads(pickle.dumps(job_recipe(job, "", 2)))()
    assert opened.settings["multimodal.train_split"] == "unseen_style"
    assert opened.source.is_endless and opened.source.max_epochs == 2
    assert opened.tokenizer_names["image"] == "emoji_32px"


def content(document: Any) -> tuple[Any, ...]:
    return tuple((s.modality, *s.payload.tolist()) for s in document.segments)


def test_training_reads_what_the_source_would_have_given(tmp_path: Path) -> None:
    job = arguments(tmp_path, "", "--multimodal.train_split", "unseen_concept")
    opened = open_job_source(job, "", 2)
    out = tmp_path / "shards"
    manifest = tokenize(lambda: opened, Tokenizing(out, parts=2), lambda line: None)
    text = opened.tokenizers.text
    expected = Counter(
        tuple(
            (s.modality, *(text.encode(s.payload) if isinstance(s.payload, str) else s.payload))
            for s in document.segments
        )
        for document in opened.source.shards([0], 1)[0]
    )
    assert manifest.documents == expected.total()
    # multimodal.condition_dropout is training's: no shard loses a caption for good.
    assert all(len(segments) == 2 for segments in expected)
    entry = {"name": "mine", "kind": "shards", "path": str(out), "max_epochs": 1}
    config = Multimodal(source="mixture", sources=[entry, {**entry, "name": "b", "max_epochs": 0}])
    tokenizers = SourceTokenizers(text, opened.tokenizers.image, None)
    mine, _ = build_ingredients(config, "train", tokenizers, is_endless=True)
    assert Counter(map(content, mine.source.shards([0], 1)[0])) == expected


LINES = """
source = "mixture"
[[multimodal.sources]]
name = "mine"
kind = "jsonl"
path = "{path}"
"""


def begin(folder: Path, path: Path) -> Any:
    """Tokenise the source, and say what a plan says of its files."""
    recipe = job_recipe(arguments(folder, LINES.format(path=path)), "mine", 1)
    tokenize(recipe, Tokenizing(out=folder / "out", parts=2), lambda line: None)
    return json.loads((folder / "out" / PLAN).read_text())["files"]


def write_lines(path: Path, word: str) -> None:
    path.write_text("".join(f'{{"segments": [{{"text": "{word} {n}"}}]}}\n' for n in range(9)))


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_folder_begun_with_other_data_of_the_same_size_is_refused(
    tmp_path: Path, is_complete: bool
) -> None:
    data = tmp_path / "data.jsonl"
    write_lines(data, "red")
    status = data.stat()
    before = begin(tmp_path, data)
    shard = tmp_path / "out" / "shard-000001.safetensors"
    if not is_complete:
        shard.unlink()
        (tmp_path / "out" / MANIFEST).unlink()
    assert begin(tmp_path, data) == before
    if not is_complete:
        shard.unlink()
        (tmp_path / "out" / MANIFEST).unlink()
    write_lines(data, "dim")
    assert data.stat().st_size == status.st_size
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"--out .*: the data have changed since"):
        begin(tmp_path, data)
    assert shard.exists() == is_complete
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))  # the time alone is what tells
    assert begin(tmp_path, data) == before


def test_data_may_move_with_their_times_before_a_folder_is_done(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_lines(tmp_path / "a" / "data.jsonl", "red")
    before = begin(tmp_path, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # keeps times
    assert begin(tmp_path, tmp_path / "b") == before


def test_the_state_of_files_is_no_part_of_what_training_compares(tmp_path: Path) -> None:
    write_lines(tmp_path / "data.jsonl", "red")
    job = arguments(tmp_path, LINES.format(path=tmp_path / "data.jsonl"))
    sources = []
    for later in (0, 1):
        os.utime(tmp_path / "data.jsonl", ns=(0, 10**18 + later))
        sources.append(open_job_source(job, "mine", 1).source)
    first, second = sources
    assert first.fingerprint() == second.fingerprint()
    os.utime(tmp_path / "data.jsonl", ns=(0, 10**18))
    state = files_state(first)
    os.utime(tmp_path / "data.jsonl", ns=(0, 10**18 + 1))
    assert state and state != files_state(first) == files_state(second)


def test_a_source_without_files_has_no_state_of_them(tmp_path: Path) -> None:
    assert files_state(open_job_source(arguments(tmp_path, ""), "", 1).source) is None
