"""Sources as a configuration names them: every kind through the whole loader; what is refused."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import tomllib
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value
from safetensors.numpy import load_file, save_file

from tests.jobs import ROOT, TRAIN_CONFIGS, debug_job
from tests.unit.data.file_fakes import make_tar, open_source, picture, read_once, sound
from torchtitan_mixtures.checks import check_data
from torchtitan_mixtures.config_values import check_table
from torchtitan_mixtures.data.loader import (
    MultimodalDataLoader,
    build_multimodal_dataloader,
    build_multimodal_tokenizer,
    build_multimodal_validation_dataloader,
)
from torchtitan_mixtures.data.tokenize_job import job_recipe
from torchtitan_mixtures.data.tokenize_source import Tokenizing, tokenize
from torchtitan_mixtures.data.tokenizers import build_image_tokenizer
from torchtitan_mixtures.multimodal_config import Multimodal
from torchtitan_mixtures.source_entries import parse_entries

SAMPLES = 60
WORDS = ("a red fox", "two bells", "an apple on a table", "the moon over a hill", "keys")


def caption(number: int) -> str:
    rng = random.Random(number)
    return f"{number} " + ", ".join(rng.choices(WORDS, k=rng.randint(1, 12)))


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """An entry of each kind, all with the same samples but for `emoji`."""
    root = tmp_path_factory.mktemp("data")
    pictures = [picture(number * 4) for number in range(SAMPLES)]
    folder = root / "folder"
    folder.mkdir()
    members, lines = [], []
    for number, content in enumerate(pictures):
        (folder / f"{number:03}.png").write_bytes(content)
        (folder / f"{number:03}.txt").write_text(caption(number))
        members += [(f"{number:03}.png", content), (f"{number:03}.txt", caption(number).encode())]
        pair = {"caption": caption(number), "image": f"folder/{number:03}.png"}
        segments = [{"text": caption(number), "loss": False}, {"image": pair["image"]}]
        lines.append(json.dumps(pair if number % 2 else {"segments": segments}))
    (root / "data.tar").write_bytes(make_tar(members))
    (root / "data.jsonl").write_text("\n".join(lines))
    rows = [{"caption": caption(n), "image": content} for n, content in enumerate(pictures)]
    pq.write_table(pa.Table.from_pylist(rows), root / "data.parquet", row_group_size=16)
    features = Features({"caption": Value("string"), "image": Image()})
    images = [{"bytes": content, "path": None} for content in pictures]
    captions = [caption(number) for number in range(SAMPLES)]
    data = Dataset.from_dict({"caption": captions, "image": images}, features=features)
    data.to_parquet(root / "hub.parquet")
    kinds = {
        "emoji": {"kind": "emoji"},
        "folder": {"kind": "folder", "path": str(folder)},
        "webdataset": {"kind": "webdataset", "path": str(root / "data.tar")},
        "jsonl": {"kind": "jsonl", "path": str(root / "*.jsonl")},
        "parquet": {"kind": "parquet", "path": str(root / "data.parquet")},
        "datasets": {"kind": "datasets", "path": str(root / "hub.parquet")},
        "stream": {"kind": "datasets", "path": str(root / "hub.parquet"), "streaming": True},
    }
    kinds = {name: {"name": name, **entry} for name, entry in kinds.items()}
    shards = root / "shards"
    recipe = job_recipe([*arguments([kinds["jsonl"]])], "jsonl", 1)
    tokenize(recipe, Tokenizing(out=shards, parts=3), lambda line: None)
    return {**kinds, "shards": {"name": "shards", "kind": "shards", "path": str(shards)}}


def overrides(sources: list[dict[str, Any]], *further: str) -> list[str]:
    return [
        "--multimodal.source=mixture",
        f"--multimodal.sources={json.dumps(sources)}",
        "--validation.no-enable",
        "--multimodal.check_batches",
        *further,
    ]


def arguments(sources: list[dict[str, Any]]) -> list[str]:
    return [f"--config={TRAIN_CONFIGS / 'mot' / 'debugmodel.toml'}", *overrides(sources)]


def build(sources: list[dict[str, Any]], *further: str) -> MultimodalDataLoader:
    job = debug_job("mot", *overrides(sources, *further))
    check_data(job)
    return build_multimodal_dataloader(1, 0, build_multimodal_tokenizer(job), job)


def rows(loader: Any, count: int) -> list[tuple[list[int], list[int]]]:
    batches = itertools.islice(iter(loader), count)
    return [
        (tokens.tolist(), targets.tolist())
        for inputs, labels in batches
        for tokens, targets in zip(inputs["input"], labels, strict=True)
    ]


KINDS = ["emoji", "folder", "webdataset", "jsonl", "parquet", "datasets", "stream", "shards"]


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_source_resumes_to_the_bit(entries, kind, num_workers):
    options = (f"--training.dataloader.num_workers={num_workers}", "--multimodal.shards=4")
    before = random.Random(f"{kind}{num_workers}").randint(1, 30)
    whole = rows(build([entries[kind]], *options), before + 6)
    loader = build([entries[kind]], *options)
    assert rows(loader, before) == whole[: 2 * before]
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = build([entries[kind]], *options)
    resumed.load_state_dict(state)
    assert rows(resumed, 6) == whole[2 * before :]


def test_a_mixture_of_all_kinds_resumes_on_other_workers(entries):
    sources = [entry | {"weight": 1.0 + i} for i, entry in enumerate(entries.values())]
    sources = [entry for entry in sources if entry["name"] != "stream"]
    whole = rows(build(sources, "--multimodal.shards=4"), 40)
    loader = build(sources, "--multimodal.shards=4")
    assert rows(loader, 23) == whole[:46]
    resumed = build(sources, "--multimodal.shards=4", "--training.dataloader.num_workers=2")
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert rows(resumed, 17) == whole[46:]
    *counts, _ = resumed.counts()
    tokens = Counter({s["name"]: c["tokens"] for s, c in zip(sources, counts, strict=True)})
    for source in sources:
        share = source["weight"] / sum(s["weight"] for s in sources)
        assert tokens[source["name"]] / tokens.total() == pytest.approx(share, abs=0.03)


def test_all_kinds_of_files_give_the_same_documents(entries):
    """One epoch of the same samples, whatever file they are in: the same tokens, in any order."""

    def documents(kind: str) -> list[tuple[int, ...]]:
        job = debug_job(
            "mot",
            "--multimodal.source=mixture",
            f"--multimodal.validation_sources={json.dumps([entries[kind]])}",
            '--multimodal.sources=[{"name": "e", "kind": "emoji"}]',
            "--multimodal.validation_splits=" + kind,
            "--multimodal.caption_first=1",
            "--validation.steps=-1",
        )
        tokenizer = build_multimodal_tokenizer(job)
        loader = build_multimodal_validation_dataloader(1, 0, tokenizer, job, kind)
        found = []
        for inputs, _ in loader:
            for tokens, ids in zip(inputs["input"], inputs["document_ids"], strict=True):
                for number in ids.unique():
                    own = tokens[ids == number]
                    if own[0] == tokenizer.bos_id:
                        found.append(tuple(own.tolist()))
        return sorted(found)

    expected = documents("folder")
    assert len(expected) == SAMPLES
    for kind in ("webdataset", "jsonl", "parquet", "datasets", "stream", "shards"):
        assert documents(kind) == expected, kind


def test_loss_is_off_where_a_segment_says_so(entries):
    """Half of the lines of the JSONL have a caption that is not to be predicted; so have shards."""
    for kind in ("jsonl", "shards"):
        loader = build([entries[kind]], "--multimodal.caption_first=1")
        text = image = 0
        for _, labels in itertools.islice(iter(loader), 20):
            text += int(((labels >= 0) & (labels < 2048)).sum())
            image += int((labels >= 2048).sum())
        full = build([entries["folder"]], "--multimodal.caption_first=1")
        all_text = all_image = 0
        for _, labels in itertools.islice(iter(full), 20):
            all_text += int(((labels >= 0) & (labels < 2048)).sum())
            all_image += int((labels >= 2048).sum())
        assert text / image < 0.8 * all_text / all_image


def test_condition_dropout_is_of_training_alone(entries):
    loader = build([entries["folder"]], "--multimodal.condition_dropout=1.0")
    for inputs, _ in itertools.islice(iter(loader), 10):
        for tokens, ids in zip(inputs["input"], inputs["document_ids"], strict=True):
            for number in ids.unique():
                own = tokens[ids == number]
                is_image = own >= 2048
                # bos, <image_start>, codes, <image_end>, eos; or the image first and its caption.
                assert not is_image.any() or is_image[2]


@pytest.mark.parametrize(
    ("sources", "further", "message"),
    [
        ([], (), r"multimodal\.sources = \[\]: .* needs at least one"),
        (
            [{"name": "a", "kind": "emoji", "max_epochs": 2}],
            (),
            r"multimodal\.sources: all have max_epochs or max_tokens",
        ),
        (
            [{"name": "a", "kind": "emoji"}],
            ("--multimodal.source=emoji",),
            r"multimodal\.sources: is read with multimodal\.source = 'mixture'",
        ),
        (
            [{"name": "a", "kind": "emoji"}],
            ("--validation.enable", "--multimodal.validation_splits=b"),
            r"validation_splits = 'b': is no name of \[\[multimodal\.validation_sources\]\]",
        ),
        (
            [{"name": "a", "kind": "emoji"}],
            ("--model.flavor=debugmodel_3modality", "--multimodal.caption_first=0.8"),
            r"multimodal\.caption_first = 0\.8: the emoji corpus has its modalities in every order",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused_at_once(sources, further, message):
    with pytest.raises(ValueError, match=message):
        check_data(debug_job("mot", *overrides(sources, *further)))


@pytest.mark.parametrize("family", ["mom", "mone", "mmdit"])
def test_models_of_images_refuse_mixtures(family):
    with pytest.raises(ValueError, match=r"multimodal\.source = 'mixture': is of documents"):
        check_data(debug_job(family, *overrides([{"name": "a", "kind": "emoji"}])[:3]))


def test_another_mixture_does_not_resume(entries):
    loader = build([entries["jsonl"], entries["folder"]])
    rows(loader, 2)
    state = loader.state_dict()
    changed = [entries["jsonl"], entries["folder"] | {"weight": 2.0}]
    with pytest.raises(ValueError, match=r"multimodal\.sources\[folder\]\.weight is 2\.0, but 1"):
        build(changed).load_state_dict(state)
    with pytest.raises(ValueError, match=r"names of multimodal\.sources is \['folder', 'jsonl'\]"):
        build([entries["folder"], entries["jsonl"]]).load_state_dict(state)


def test_tokenizers_are_known_by_what_they_hold(entries, tmp_path):
    """A codebook that has moved is the same, another in its place is not."""
    embedded = build_image_tokenizer("emoji_32px").path
    first, second, changed = (tmp_path / f"{name}.safetensors" for name in "abc")
    shutil.copy(embedded, first)
    shutil.copy(embedded, second)
    tensors = load_file(embedded)
    save_file(tensors | {"centres": tensors["centres"][::-1].copy()}, changed)
    loader = build([entries["folder"]], f"--multimodal.image_tokenizer={first}")
    rows(loader, 2)
    state = loader.state_dict()
    build([entries["folder"]], f"--multimodal.image_tokenizer={second}").load_state_dict(state)
    shutil.copy(changed, first)
    with pytest.raises(ValueError, match=r"content of multimodal\.image_tokenizer is '"):
        build([entries["folder"]], f"--multimodal.image_tokenizer={first}").load_state_dict(state)


def readme_blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("### Your own data") : text.index("### Images")]
    return re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)


def test_the_configuration_in_the_readme_is_one():
    (block,) = readme_blocks("toml")
    table = tomllib.loads(block)["multimodal"]
    check_table(Multimodal, table, "multimodal.")
    entries = parse_entries("multimodal.sources", table["sources"])
    assert [entry.kind for entry in entries] == ["jsonl", "webdataset"]
    (held_out,) = parse_entries("k", table["validation_sources"], validates=True)
    assert table["validation_splits"] == [held_out.name]


def test_the_documents_in_the_readme_are_read(tmp_path):
    (block,) = readme_blocks("json")
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "1.jpg").write_bytes(picture())
    (tmp_path / "meow.wav").write_bytes(sound())
    (tmp_path / "data.jsonl").write_text(block)
    documents = read_once(open_source("jsonl", tmp_path, is_endless=False))
    kinds = [[segment.modality for segment in document.segments] for document in documents]
    assert kinds[0] == ["text", "image", "text", "speech"]
    assert [segment.has_loss for segment in documents[0].segments] == [False, True, True, True]
    assert sorted(kinds[1]) == ["image", "text"] and documents[1].is_pair
    assert kinds[2] == ["text"]
