"""The page of packed sequences says what the batch says, and nothing of it breaks the page."""

from __future__ import annotations

import base64
import importlib
import io
import re
import subprocess
import sys
import wave
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.jobs import ROOT, TRAIN_CONFIGS, debug_job, load_job
from tests.unit.data.fakes import SENTINELS, ByteTokenizer, GreyTokenizer
from tests.unit.data.html_tree import Node, parse
from torchtitan_mixtures.data import images
from torchtitan_mixtures.data.batch_builder import BatchBuilder
from torchtitan_mixtures.data.encoding import DocumentEncoder, Modalities
from torchtitan_mixtures.data.images import decode_image
from torchtitan_mixtures.data.inspection import (
    Row,
    compute_statistics,
    find_mistakes,
    read_rows,
    split_documents,
)
from torchtitan_mixtures.data.loader import (
    build_multimodal_dataloader,
    build_multimodal_tokenizer,
    build_multimodal_validation_dataloader,
    find_modalities,
)
from torchtitan_mixtures.data.show import find_violations, make_page, write_page
from torchtitan_mixtures.data.show_page import SequenceView, render_page, split_text
from torchtitan_mixtures.data.sources import Document, Segment
from torchtitan_mixtures.data.speech import build_speech_tokenizer
from torchtitan_mixtures.data.tokenizers import build_image_tokenizer
from torchtitan_mixtures.models import FAMILIES

THREE = Modalities(("text", "image", "speech"), ((0, 300), (300, 316), (316, 336)))
SEQ_LEN = 64
IMAGE_START = 2048  # first token id of the embedded image codebook


def facts(node: Node) -> dict[str, str]:
    """The definition lists below a node, the first of a name."""
    names, values = reversed(node.find("dt")), reversed(node.find("dd"))
    return {name.text(): v.text() for name, v in zip(names, values, strict=True)}


def section(page: Node, name: str) -> Node:
    (only,) = [node for node in page.find("section") if node.attributes.get("id") == name]
    return only


def table(page: Node) -> dict[str, list[str]]:
    """Cells of the statistics by modality."""
    (body,) = section(page, "statistics").find("tbody")
    return {row.find("th")[0].text(): [c.text() for c in row.find("td")] for row in body.find("tr")}


def marked_without_loss(sequence: Node) -> list[int]:
    """Positions under the strip's marks."""
    (path,) = sequence.find("path", "no-loss-marks")
    marks = re.findall(r"M(\d+) 36h(\d+)", path.attributes["d"])
    return [i for start, length in marks for i in range(int(start), int(start) + int(length))]


def texts_of(article: Node) -> list[str]:
    return [paragraph.text() for paragraph in article.find("p") if "dir" in paragraph.attributes]


def images_of(node: Node) -> list[np.ndarray]:
    contents = [image.attributes["src"].partition("base64,")[2] for image in node.find("img")]
    return [np.array(Image.open(io.BytesIO(base64.b64decode(text)))) for text in contents]


def sequences_of(batches: list[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> list[Any]:
    """Each sequence as a dictionary of Python lists."""
    return [
        {**{key: tensor[row].tolist() for key, tensor in inputs.items()}, "labels": labels[row]}
        for inputs, labels in batches
        for row in range(len(labels))
    ]


def test_the_page_shows_the_documents_of_the_batch() -> None:
    job = debug_job("mot", "--multimodal.text_weight=0.5")
    page = parse(make_page(job, 3, None))
    tokenizer = build_multimodal_tokenizer(job)
    codebook = build_image_tokenizer("emoji_32px")
    batches = list(islice(build_multimodal_dataloader(1, 0, tokenizer, job), 2))
    shown = [section(page, f"s{number}") for number in range(3)]
    assert len(page.find("section")) == 2 + 3
    for sequence, node in zip(sequences_of(batches)[:3], shown, strict=True):
        expected: dict[int, list[tuple[str, list[int]]]] = {}  # runs of each document
        previous = ""
        for token, document in zip(sequence["input"], sequence["document_ids"], strict=True):
            kind = "image" if token >= IMAGE_START else "text" if token >= 7 else f"tag {token}"
            if document not in expected or kind != previous or kind.startswith("tag"):
                expected.setdefault(document, []).append((kind, []))
            expected[document][-1][1].append(token)
            previous = kind
        assert node.find("article") and not node.find("p", "alert")
        has_padding = sequence["input"][-1] == tokenizer.sentinels.pad
        assert len(node.find("article")) == len(expected) - has_padding
        for article, of_document in zip(node.find("article"), expected.values(), strict=False):
            runs = [ids for kind, ids in of_document if kind == "text"]
            assert texts_of(article) == [tokenizer.decode(ids) for ids in runs]
            titles = [span.attributes["title"].split(",")[0] for span in article.find("span")]
            assert " ".join(titles) == " ".join(str(i) for ids in runs for i in ids)
            codes = [ids for kind, ids in of_document if kind == "image"]
            images = [codebook.decode(np.array([ids]) - IMAGE_START)[0] for ids in codes]
            assert np.array_equal(images_of(article), images)
            tags = [code.attributes["title"].split(",")[0] for code in article.find("code")]
            assert tags == [str(ids[0]) for kind, ids in of_document if kind.startswith("tag")]
        no_loss = [i for i, label in enumerate(sequence["labels"].tolist()) if label == -100]
        assert marked_without_loss(node) == no_loss
    told = facts(page)
    assert told["configuration"] == str(TRAIN_CONFIGS / "mot" / "debugmodel.toml")
    assert told["token ids"] == "text [0, 2,048), image [2,048, 3,072)"
    assert told["text_weight"] == "0.5" and "bad samples" not in told
    text, image = table(page)["text"], table(page)["image"]
    assert (text[3], image[3]) == ("0.5", "1")


def test_positions_without_loss_are_marked() -> None:
    job = debug_job("mot", "--multimodal.image_weight=0")
    page = parse(make_page(job, 2, None))
    tokenizer = build_multimodal_tokenizer(job)
    inputs, labels = next(iter(build_multimodal_dataloader(1, 0, tokenizer, job)))
    for row in range(2):
        node = section(page, f"s{row}")
        no_loss = (labels[row] == -100).nonzero()[:, 0].tolist()
        assert marked_without_loss(node) == no_loss and len(no_loss) > 100
        assert node.find("figure") == node.find("figure", "no-loss")
        tags = {code.text() for code in node.find("code", "no-loss")}
        assert tags == {"image_start", "eos"}
        assert not node.find("span", "no-loss")
    assert table(page)["image"][2:4] == ["0", "-"]
    assert (inputs["input"] >= IMAGE_START).sum().item() == int(
        table(page)["image"][0].replace(",", "")
    )


def test_a_validation_split_is_shown_to_its_end() -> None:
    job = debug_job("mot", "--validation.seq_len=2048", "--validation.local_batch_size=5")
    page = parse(make_page(job, 10_000, "unseen_style"))
    job.validation.steps = -1
    tokenizer = build_multimodal_tokenizer(job)
    batches = build_multimodal_validation_dataloader(1, 0, tokenizer, job, "unseen_style")
    sequences = sequences_of(list(batches))
    assert len(page.find("svg", "strip")) == len(sequences)
    assert facts(page)["split"] == "unseen_style (validation)"
    padding = sum(s["input"].count(tokenizer.sentinels.pad) for s in sequences)
    assert page.find("p", "padding") and padding
    assert facts(page)["padding"].startswith(f"{padding / len(sequences) / 2048:.2%}")
    documents = sum(max(s["document_ids"]) for s in sequences if s["input"][-1] == 0)
    documents += sum(max(s["document_ids"]) + 1 for s in sequences if s["input"][-1] != 0)
    assert len(page.find("article")) == documents


def test_speech_is_heard_as_its_units_decode() -> None:
    config = TRAIN_CONFIGS / "mot" / "debugmodel_3modality.toml"
    job = load_job(config, "--training.seq_len=512", "--training.local_batch_size=2")
    page = parse(make_page(job, 2, None))
    tokenizer, speech = build_multimodal_tokenizer(job), build_speech_tokenizer("emoji_25hz")
    start, end = find_modalities(job, tokenizer).vocab_ranges[2]
    inputs, _ = next(iter(build_multimodal_dataloader(1, 0, tokenizer, job)))
    expected = []  # units of each run, in reading order
    for row in inputs["input"].tolist():
        for before, token in pairwise([-1, *row]):
            if start <= token < end:
                if not start <= before < end:
                    expected.append([])
                expected[-1].append(token - start)
    sounds = page.find("audio")
    assert len(sounds) == len(expected) > 0
    for sound, units in zip(sounds, expected, strict=True):
        content = base64.b64decode(sound.attributes["src"].partition("base64,")[2])
        with wave.open(io.BytesIO(content)) as file:
            assert file.getframerate() == speech.sample_rate
            heard = np.frombuffer(file.readframes(-1), "<i2") / 32767
        waveform = speech.decode(np.array(units))
        assert np.abs(heard - waveform).max() <= 0.5 / 32767 + 1e-7
    assert table(page)["speech"][4] == str(len(expected))


# --- made-up documents of three modalities --------------------------------------------------------


def rows_of(
    documents: list[list[tuple[str, Any]]], weights: tuple[float, ...] = (1, 1, 1)
) -> list[Row]:
    """Pack one document after the other into as many rows as there are lists."""
    encoder = DocumentEncoder(ByteTokenizer(), GreyTokenizer(), THREE, SEQ_LEN)
    tokens = []
    for number, segments in enumerate(documents):
        made = (Segment(m, p if m == "text" else np.array(p)) for m, p in segments)
        tokens.append(encoder.encode(Document(tuple(made), str(number)))[0])
    builder = BatchBuilder(THREE, weights, SENTINELS.pad, SEQ_LEN, True)
    arrays, labels = builder.build([tokens[0::2], tokens[1::2]])
    inputs = {key: torch.from_numpy(array) for key, array in arrays.items()}
    return read_rows(inputs, torch.from_numpy(labels))


def page_of(rows: list[Row]) -> Node:
    documents = [split_documents(row, SENTINELS) for row in rows]
    sequences = [SequenceView(r, d, find_mistakes(r)) for r, d in zip(rows, documents, strict=True)]
    statistics = compute_statistics(rows, documents, THREE)

    def grey(codes: np.ndarray) -> str:
        if len(codes) != 4:
            raise ValueError(f"{len(codes)} codes & not <4>")
        return '<img alt="grey">'

    decoders = {"image": grey}
    page = render_page("<title>", "", [], statistics, sequences, THREE, ByteTokenizer(), decoders)
    return parse(page)


DOCUMENTS = [
    [("text", "a<b"), ("image", [1, 2, 3, 4]), ("speech", [5, 5, 6])],
    [("speech", [7, 8]), ("text", "ünï")],
    [("image", [15, 1, 1, 1]), ("speech", [0, 19, 5, 5, 5]), ("text", "cd")],
    [("speech", [9, 8]), ("text", "x")],
]


def test_three_modalities_and_their_orders() -> None:
    rows = rows_of(DOCUMENTS, (0.5, 1, 0))
    page = page_of(rows)
    told = facts(section(page, "statistics"))
    orders = ["speech>text: 2", "text>image>speech: 1", "image>speech>text: 1"]
    assert told["orders"] == ", ".join(orders)
    assert [a.find("small")[0].text().split("; ")[1] for a in page.find("article")] == [
        "text>image>speech",
        "image>speech>text",
        "speech>text",
        "speech>text",
    ]
    # A modality without a decoder is shown as its codes.
    figures = [f for f in page.find("figure") if f.find("code")]
    assert [f.find("code")[0].text() for f in figures] == ["5 5 6", "0 19 5 5 5", "7 8", "9 8"]
    assert "loss at 4, weight 0.5 and 1" in page.find("figcaption")[0].text()
    rectangles = Counter(r.attributes["class"] for r in page.find("rect"))
    assert rectangles["content m1"] == 2 and rectangles["content m2"] == 4
    assert rectangles["padding m0"] == 2


def test_statistics_are_those_of_naive_counts() -> None:
    rows = rows_of(DOCUMENTS, (0.5, 2, 0))
    statistics = compute_statistics(rows, [split_documents(r, SENTINELS) for r in rows], THREE)
    lengths: dict[str, list[int]] = {"text": [], "image": [], "speech": []}
    for document in DOCUMENTS:
        for modality, payload in document:
            size = len(payload.encode()) if modality == "text" else len(payload)
            lengths[modality].append(size)
    tokens: dict[str, list[int]] = {"text": [], "image": [], "speech": []}
    weights: dict[str, list[float]] = {"text": [], "image": [], "speech": []}
    num_sentinels = num_padding = num_no_loss = 0
    for row in rows:
        for token, label, weight in zip(row.tokens, row.labels, row.weights, strict=True):
            name = "text" if token < 300 else "image" if token < 316 else "speech"
            num_sentinels += 1 <= token <= 6
            num_padding += token == 0
            num_no_loss += label == -100
            if token != 0:
                tokens[name].append(token)
            if label != -100:
                target = "text" if label < 300 else "image" if label < 316 else "speech"
                weights[target].append(weight)
    for name, found in zip(THREE.names, statistics.modalities, strict=True):
        assert found.tokens == len(tokens[name])
        assert found.share == len(tokens[name]) / (2 * SEQ_LEN)
        assert found.distinct == len(set(tokens[name]))
        assert found.targets == len(weights[name])
        mean = sum(weights[name]) / len(weights[name]) if weights[name] else None
        assert found.mean_weight == mean
        assert found.segments == len(lengths[name])
        assert found.mean_length == sum(lengths[name]) / len(lengths[name])
        assert found.max_length == max(lengths[name])
    assert [m.mean_weight for m in statistics.modalities] == [0.5, 2.0, None]
    assert statistics.sentinels == num_sentinels
    assert statistics.padding_share == num_padding / (2 * SEQ_LEN)
    assert statistics.no_loss_share == num_no_loss / (2 * SEQ_LEN)
    assert statistics.documents == (2, 2)


def test_markup_in_a_caption_is_text() -> None:
    caption = '<script>"x"&amp;</p>'
    page = page_of(rows_of([[("text", caption)], [("text", "</span>'")]]))
    assert [texts_of(article) for article in page.find("article")] == [[caption], ["</span>'"]]
    assert page.find("h1")[0].text() == "<title>"


def test_mistakes_of_packing_are_seen() -> None:
    (row, _) = rows_of(DOCUMENTS)
    assert find_mistakes(row) == []
    labels = row.labels.copy()
    labels[[3, 9]] = 42
    end = int((row.document_ids == 0).sum()) - 1
    labels[end] = row.tokens[end + 1]
    assert find_mistakes(replace(row, labels=labels)) == [
        f"1 positions have a label although their document ends there, first at {end}",
        "2 positions have a label that is not the next token, first at 3",
    ]
    # <bos> is the first position; a mask that makes it an image's is shown as such.
    modality = row.modality.copy()
    modality[0] = 1
    page = page_of([replace(row, labels=labels, modality=modality)])
    alerts = [alert.text() for alert in page.find("p", "alert")]
    assert alerts[2] == "1 codes & not <4>" and len(alerts) == 3
    # So is an image that is cut by a document's end, and a text token that is a sentinel's.
    document_ids = row.document_ids.copy()
    cut = int((row.modality == 1).argmax()) + 2
    document_ids[cut:] += 1
    page = page_of([replace(row, document_ids=document_ids)])
    assert [alert.text() for alert in page.find("p", "alert")][1:] == ["2 codes & not <4>"] * 2


def test_batches_that_break_the_contract_are_named() -> None:
    job = debug_job("mot")
    tokenizer = build_multimodal_tokenizer(job)
    inputs, labels = next(iter(build_multimodal_dataloader(1, 0, tokenizer, job)))
    modalities = find_modalities(job, tokenizer)
    broken = {**inputs, "modality_masks": torch.zeros_like(inputs["modality_masks"])}
    (message,) = find_violations([(inputs, labels), (broken, labels)], modalities)
    assert message.startswith("batch 1 breaks the contract: batch: 'modality_masks' must be True")


def test_characters_of_several_tokens_stay_whole() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("aü€")
    parts = split_text(tokenizer, ids)
    assert parts == [(ids[:1], "a"), (ids[1:3], "ü"), (ids[3:], "€")]
    broken = ids[:2]  # a text that is cut inside a character
    assert split_text(tokenizer, broken) == [(ids[:1], "a"), (ids[1:2], "\ufffd")]

    class Joining(ByteTokenizer):
        """Decodes the whole otherwise than its parts."""

        def decode(self, ids: list[int], skip_special: bool = True) -> str:
            return super().decode(ids).replace("abc", "d")

    ids = tokenizer.encode("abc")
    assert split_text(Joining(), ids) == [(ids, "d")]


# --- data sets, and bad input ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of 30 images, two of which cannot be decoded, in two splits."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(buffer, "PNG")
    contents = [b"no image" if i in (4, 7) else buffer.getvalue() for i in range(30)]
    rows = {
        "image": [{"bytes": content, "path": f"<{i}>.png"} for i, content in enumerate(contents)],
        "caption": [f"<b>number {i}</b>" for i in range(30)],
    }
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "caption": datasets.Value("string")}
    )
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("split", [None, "test"])
def test_undecodable_images_are_counted(
    folder: Path, split: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bool] = []

    def spy(value: Any, size: int) -> np.ndarray:
        decoded.append(value != b"no image")
        return decode_image(value, size)

    monkeypatch.setattr(images, "decode_image", spy)
    options = ("--multimodal.source=datasets", f"--multimodal.path={folder}")
    job = debug_job("mot", *options, "--multimodal.max_bad_fraction=0.5", "--multimodal.shards=1")
    page = parse(make_page(job, 20, split))
    counted = f"{decoded.count(False)} of {len(decoded)} read were skipped: "
    assert facts(page)["bad samples"].startswith(counted) and decoded.count(False) >= 2
    assert "data:" in facts(page)["bad samples"] and "(<4>.png)" in facts(page)["bad samples"]
    captions = [text for article in page.find("article") for text in texts_of(article)]
    expected = {f"<b>number {i}</b>" for i in range(30) if i not in (4, 7)}
    assert set(captions) == expected
    assert len(captions) == len(images_of(page)) and (split is None or len(captions) == 28)
    assert facts(page)["source"] == f"datasets: {folder}"
    with pytest.raises(ValueError, match=r"samples \(.*%\) of split .* are bad"):
        make_page(debug_job("mot", *options), 30, split)


@pytest.mark.parametrize(
    ("out", "sequences", "split", "message"),
    [
        ("page.html", 0, None, r"--sequences = 0: must be 1 or more"),
        ("none/page.html", 1, None, r"--out .*none/page\.html: there is no folder .*none"),
        (".", 1, None, r"--out .*: is a folder"),
        ("page.html", 1, "dev", r'--split dev: the emoji .* "dev"; its splits are train, unseen_c'),
        ("page.html", 1, "unseen_voice", r"--split unseen_voice: a voice is unseen only where"),
    ],
)
def test_bad_arguments_are_named(
    out: str, sequences: int, split: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_page(debug_job("mot"), tmp_path / out, sequences, split)
    assert list(tmp_path.iterdir()) == []


def test_splits_of_other_data_are_named_by_the_option(folder: Path) -> None:
    job = debug_job("mot", "--multimodal.source=datasets", f"--multimodal.path={folder}")
    with pytest.raises(ValueError, match=rf'^--split dev: "{folder}" has no split "dev"; its'):
        make_page(job, 1, "dev")
    csv = folder.parent / "rows.csv"
    csv.write_text("image,caption\na.png,a fox\n")
    options = ("--multimodal.source=datasets", f"--multimodal.path={csv}")
    with pytest.raises(ValueError, match=r'^--split dev: Cannot open split "dev" of multimodal.pa'):
        make_page(debug_job("mot", *options), 1, "dev")


def test_only_pages_are_written_over(tmp_path: Path) -> None:
    job, out = debug_job("mot"), tmp_path / "page.html"
    out.touch()
    write_page(job, out, 1)
    page = out.read_bytes()
    write_page(job, out, 2)
    assert out.read_bytes() != page
    config = tmp_path / "config.toml"
    config.write_text("[model]\n")
    with pytest.raises(ValueError, match=r"--out .*config\.toml: exists and is not an HTML page"):
        write_page(job, config, 1)
    assert config.read_text() == "[model]\n"


def test_the_command_writes_a_page_with_overrides(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    # A layout for more processes than there are is no hindrance to look at the data.
    config = "train_configs/mot/8B_3modality.toml"
    result = subprocess.run(
        [sys.executable, "scripts/prepare_data.py", "show", config, "--out", str(out),
         "--sequences", "1", "--training.seq_len", "300", "--multimodal.reset_positions"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0 and result.stderr == "", result.stderr
    page = parse(out.read_text(encoding="utf-8"))
    assert facts(page)["seq_len"] == "300 positions"
    assert facts(page)["reset_positions"] == "true"
    assert facts(page)["configuration"] == config
    assert list(table(page)) == ["text", "image", "speech"]
    assert re.search(r"rotary 0 to \d+", page.find("article")[-1].text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "none.toml", "--out", "page.html"), "--config none.toml: cannot be read"),
        (("emoji", "--training.seq_len=3"), "unrecognized arguments: --training.seq_len=3"),
    ],
)
def test_the_command_ends_with_one_message(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("prepare_data").main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_faults_of_a_library_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    command = importlib.import_module("prepare_data")
    monkeypatch.setattr(command, "show", lambda arguments: int("no number"))
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "show", "x.toml", "--out", "page.html"])
    with pytest.raises(ValueError, match="no number"):
        command.main()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mot"])
def test_models_of_images_have_no_page_of_sequences(family, tmp_path):
    with pytest.raises(ValueError, match=rf"'{family}': has images and no sequences of tokens"):
        write_page(debug_job(family), tmp_path / "page.html")
