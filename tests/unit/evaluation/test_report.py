"""The evaluation of a whole checkpoint, and its command."""

import importlib.util
import io
import json
import math
import re
import sys

import pytest

from tests.checkpoints import save_tiny_mot
from tests.jobs import ROOT
from torchtitan_mixtures.checkpoint_loading import load_checkpoint
from torchtitan_mixtures.data.captions import with_article
from torchtitan_mixtures.data.emoji import EmojiCorpus
from torchtitan_mixtures.data.loader import (
    build_multimodal_tokenizer,
    build_multimodal_validation_dataloader,
)
from torchtitan_mixtures.data.spoken import VOICES
from torchtitan_mixtures.evaluation.items import choose_drawings, draw_things
from torchtitan_mixtures.evaluation.report import bits_per_token


@pytest.fixture(scope="module")
def command():
    """`scripts/evaluate.py` as a module."""
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "scripts" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_tiny_mot(folder)
    return folder


def test_bits_per_token_are_those_of_the_split(run):
    checkpoint = load_checkpoint(run)
    found = bits_per_token(checkpoint, "unseen_style", 3)
    job = checkpoint.job_config
    loader = build_multimodal_validation_dataloader(
        1, 0, build_multimodal_tokenizer(job), job, "unseen_style"
    )
    bits = {"text": [], "image": []}
    for batch, labels in loader:
        log_probs = checkpoint.model(batch["input"]).double().log_softmax(-1) / math.log(2)
        for row, column in (labels != -100).nonzero().tolist():
            label = labels[row, column].item()
            bits["text" if label < 2048 else "image"].append(-log_probs[row, column, label].item())
    assert {name: row["targets"] for name, row in found.items()} == {
        name: len(values) for name, values in bits.items()
    }
    for name, values in bits.items():
        expected = sum(values) / len(values)
        assert found[name]["bits_per_token"] == pytest.approx(expected, rel=1e-5)


def test_the_command_prints_tables_and_writes_json(run, tmp_path, command, capsys):
    out = tmp_path / "report.json"
    options = ["--splits", "unseen_concept", "--items=20", "--max-batches=2", "--device=cpu"]
    command.main([f"--checkpoint={run}", f"--json={out}", *options])
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    split = report["splits"]["unseen_concept"]
    assert (report["step"], report["flavor"], split["items"]) == (20, "debugmodel", 20)
    assert set(split["retrieval"]) == {"text>image", "image>text"}
    rate = split["retrieval"]["text>image"]["20"]["information"]
    assert rate["trials"] == 20 and rate["low_95"] <= rate["share"] <= rate["high_95"]
    assert split["groups"]["trials"] == 20
    bits = split["modalities"]["image"]["bits_per_token"]
    assert f"| unseen_concept | image | {bits:.3f} |" in printed
    assert f"| 20 | {rate['share']:.1%} (" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--splits", "tests"], "split 'tests' is unknown; the splits .* unseen_style"),
        (["--checkpoint", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_what_is_asked_for_wrongly_is_said_in_one_line(run, command, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        command.main([f"--checkpoint={run}", *arguments])
    assert exit.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--items=1"], "--items 1: must be at least 2"),
        (["--max-batches=0"], "--max-batches 0"),
        (["--json=/nowhere/at/all.json"], "there is no folder /nowhere/at"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_loaded(command, capsys, arguments, message):
    with pytest.raises(SystemExit):
        command.main(["--checkpoint=x", *arguments])
    assert message in capsys.readouterr().err


def test_a_model_of_bidirectional_images_is_not_asked_to_predict_them(tmp_path, command):
    save_tiny_mot(tmp_path, attn_type="sdpa_dense", bidirectional_images=True)
    out = tmp_path / "report.json"
    arguments = ["--splits", "unseen_style", "--items=4", "--max-batches=1", f"--json={out}"]
    command.main([f"--checkpoint={tmp_path}", *arguments])
    split = json.loads(out.read_text())["splits"]["unseen_style"]
    assert set(split["retrieval"]) == {"image>text"}


@pytest.fixture(scope="module")
def run_with_speech(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run_with_speech")
    save_tiny_mot(
        folder,
        20,
        "--model.flavor=debugmodel_3modality",
        n_modalities=3,
        modality_names=["text", "image", "speech"],
        code_vocab_sizes=[1024, 512],
    )
    return folder


def test_three_modalities_are_asked_about_in_all_pairs(run_with_speech, tmp_path, command):
    out = tmp_path / "report.json"
    arguments = ["--splits", "unseen_voice", "--items=3", "--max-batches=1", f"--json={out}"]
    command.main([f"--checkpoint={run_with_speech}", *arguments])
    split = json.loads(out.read_text())["splits"]["unseen_voice"]
    names = ("text", "image", "speech")
    assert set(split["retrieval"]) == {f"{a}>{b}" for a in names for b in names if a != b}
    assert set(split["modalities"]) == set(names)


def test_speech_is_of_the_items_concept_in_a_voice_of_the_split(run_with_speech):
    checkpoint, corpus = load_checkpoint(run_with_speech), EmojiCorpus.load()
    things = draw_things(checkpoint, "unseen_voice", 8, seed=0)
    assert things.modalities == ["text", "image", "speech"]
    for item, drawing in zip(
        things.items, choose_drawings(corpus.drawings("unseen_voice"), 8, seed=0), strict=True
    ):
        units = item.tokens["speech"][1:-1] - (2048 + 1024)
        assert (units == corpus.spoken(drawing.concept, VOICES[-1])).all()
        image = checkpoint.codecs.image.encode(corpus.image(drawing, 32)[None])[0]
        assert (item.tokens["image"][1:-1] - 2048 == image).all()
        text = checkpoint.codecs.text.decode(item.tokens["text"].tolist())
        assert text == with_article(drawing.concept.name)


def test_few_items_are_one_pool_and_the_report_says_what_was_asked(run, tmp_path, command):
    out = tmp_path / "report.json"
    arguments = ["--splits", "unseen_style", "--items=3", "--max-batches=1", f"--json={out}"]
    command.main([f"--checkpoint={run}", *arguments])
    report = json.loads(out.read_text())
    assert (report["num_items"], report["max_batches"], report["seed"]) == (3, 1, 0)
    rates = report["splits"]["unseen_style"]["retrieval"]["text>image"]
    assert list(rates) == ["3"]
    assert rates["3"]["information"]["chance"] == pytest.approx(1 / 3)
    assert not rates["3"]["information"]["excludes_chance"]
    with pytest.raises(SystemExit):  # it exists now
        command.main([f"--checkpoint={run}", *arguments])


def test_what_is_done_is_kept_when_a_run_is_stopped(run, tmp_path, command, monkeypatch):
    out = tmp_path / "report.json"
    splits = ["--splits", "unseen_style", "unseen_concept", "--items=2", "--max-batches=1"]
    original = command.evaluate

    def stop_in_the_second(*arguments, progress, **options):
        def stop(message):
            progress(message)
            if message.startswith("unseen_concept"):
                raise KeyboardInterrupt

        return original(*arguments, progress=stop, **options)

    monkeypatch.setattr(command, "evaluate", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        command.main([f"--checkpoint={run}", *splits, f"--json={out}"])
    assert list(json.loads(out.read_text())["splits"]) == ["unseen_style"]


def test_a_device_that_is_not_there_is_named(command, capsys):
    for device in ("cuda:7", "abacus"):
        with pytest.raises(SystemExit):
            command.parse(["--checkpoint=x", f"--device={device}"])
        assert f"--device {device}: " in capsys.readouterr().err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_terminals_see_how_far_a_comparison_is(run, command, monkeypatch, is_terminal):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    command.main(
        [f"--checkpoint={run}", "--splits", "unseen_style", "--items=20", "--max-batches=1"]
    )
    lines = [line for line in stream.getvalue().split("\n") if "/20 steps" in line]
    if not is_terminal:
        assert not lines and "\r" not in stream.getvalue()
        return
    assert len(lines) == 3  # text to image, image to text, groups
    assert all(line.count("\r") > 1 and "20/20 steps" in line for line in lines)
