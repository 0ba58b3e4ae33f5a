"""Whether images answer prompts: right for true drawings, at chance for noise."""

import importlib.util
import json
import random
from dataclasses import replace

import numpy as np
import pytest

from tests.jobs import ROOT
from tests.unit.sampling import prompted
from tests.unit.sampling.prompted import TinyArgs
from torchtitan_mixtures.data.emoji import STYLE_WORDS, STYLES, Drawing, EmojiCorpus
from torchtitan_mixtures.evaluation import prompts as prompts_module
from torchtitan_mixtures.evaluation.prompt_retrieval import (
    POOL,
    ask_concepts,
    ask_relations,
    blur,
    measure_split,
    other_order,
    score_concepts,
    score_relations,
)
from torchtitan_mixtures.evaluation.prompts import evaluate_prompts, make_draw, settings_of


@pytest.fixture(scope="module")
def corpus():
    return EmojiCorpus.load()


def noise(count, seed=0, size=32):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def true_drawings(corpus, prompts, size=32):
    """Read prompts as a person would."""
    words = {word: style for style, word in STYLE_WORDS.items()}
    concepts = {concept.name: concept for concept in corpus.concepts}
    drawings = []
    for prompt in prompts:
        name, word = prompt.split(", drawn in the style of ")
        concept = concepts.get(name) or concepts[name.split(" ", 1)[1]]
        drawings.append(Drawing(concept, words[word]))
    return corpus.images(drawings, size)


def true_scene(corpus, scene, rng, size=32):
    """A scene that its caption is true of: in other styles, and elsewhere in the halves."""
    canvas = np.full((128, 128, 3), 255, np.uint8)
    halves = {"left": (0, 1), "right": (1, 0), "above": (0, 1), "below": (1, 0)}[scene.relation]
    n = scene.num_subjects
    for half, side in zip(halves, (scene.drawings[:n], scene.drawings[n:]), strict=True):
        places = [0, 64] if len(side) == 2 else [rng.randint(0, 64)]
        for place, drawing in zip(places, side, strict=True):
            style = rng.choice(drawing.concept.styles)
            picture = corpus.image(Drawing(drawing.concept, style), 64)
            left, top = (64 * half, place)
            if scene.relation in ("above", "below"):
                left, top = top, left
            canvas[top : top + 64, left : left + 64] = picture
    factor = 128 // size
    return canvas.reshape(size, factor, size, factor, 3).mean((1, 3)).round().astype(np.uint8)


def test_a_blur_is_the_mean_of_blocks():
    picture = noise(2)
    found = blur(picture, 8, 4)
    assert found.shape == (2, 8, 4, 3)
    expected = picture[1, 4:8, 16:24, 2].astype(float).mean() / 255
    assert found[1, 1, 2, 2] == pytest.approx(expected)


def test_another_order_leaves_nothing_in_its_place():
    for count in (2, 3, 40):
        order = other_order(count, random.Random(count))
        assert sorted(order) == list(range(count))
        assert all(order != np.arange(count))


def test_questions_are_of_different_families_of_one_split(corpus):
    questions = ask_concepts("unseen_concept", 30, 0)
    assert ask_concepts("unseen_concept", 30, 0) == questions
    assert ask_concepts("unseen_concept", 30, 1) != questions
    assert len({question.prompt for question in questions}) == 30
    for question in questions:
        assert question.pool[0] is question.drawing.concept
        assert len({concept.family for concept in question.pool}) == POOL == 10
        assert {concept.split for concept in question.pool} == {"unseen_concept"}
    assert len(ask_concepts("unseen_concept", 10_000, 0)) == 120  # its families


@pytest.mark.parametrize("size", [16, 32, 64])
def test_true_drawings_are_right_in_any_style(corpus, size):
    questions = ask_concepts("unseen_concept", 60, 0)
    for shift in range(3):
        drawings = []
        for number, question in enumerate(questions):
            styles = question.drawing.concept.styles
            drawings.append(
                Drawing(question.drawing.concept, styles[(number + shift) % len(styles)])
            )
        assert score_concepts(questions, corpus.images(drawings, size)).share == 1
    assert len({question.drawing.style for question in questions}) == len(STYLES)


def test_noise_and_one_image_for_all_are_at_chance():
    questions = ask_concepts("train", 400, 0)
    for pictures in (noise(400), noise(1).repeat(400, 0)):
        rate = score_concepts(questions, pictures)
        assert rate.chance == 0.1 and rate.trials == 400
        assert abs(rate.share - 0.1) < 3.3 * (0.09 / 400) ** 0.5


def test_scenes_are_of_all_relations_and_the_same_each_time():
    scenes = ask_relations("train", 40, 0)
    relations = [scene.relation for scene in scenes]
    assert {name: relations.count(name) for name in set(relations)} == {
        "left": 10, "right": 10, "above": 10, "below": 10,
    }  # fmt: skip
    captions = [scene.caption for scene in scenes]
    assert [scene.caption for scene in ask_relations("train", 40, 0)] == captions
    assert [scene.caption for scene in ask_relations("train", 40, 1)] != captions


def test_true_scenes_are_right_and_their_reverse_is_wrong(corpus):
    scenes, rng = ask_relations("train", 60, 0), random.Random(3)
    composed = np.stack([scene.image for scene in scenes])
    assert score_relations(scenes, composed).share == 1
    retold = np.stack([true_scene(corpus, scene, rng) for scene in scenes])
    assert score_relations(scenes, retold).share == 1
    swap = {"left": 1, "right": 1, "above": 0, "below": 0}
    reverse = [np.roll(s.image, 16, axis=swap[s.relation]) for s in scenes]
    assert score_relations(scenes, np.stack(reverse)).share == 0


def test_noise_answers_relations_at_chance():
    scenes = ask_relations("train", 200, 0)
    rate = score_relations(scenes, noise(200))
    assert rate.chance == 0.5
    assert abs(rate.share - 0.5) < 3.3 * (0.25 / 200) ** 0.5


def test_a_painter_that_reads_is_right_but_not_about_the_prompts_of_others(corpus):
    scenes = {scene.caption: scene.image for scene in ask_relations("unseen_concept", 60, 2)}

    def draw(prompts):
        if prompts[0] in scenes:
            return np.stack([scenes[prompt] for prompt in prompts])
        return true_drawings(corpus, prompts)

    found = measure_split(draw, "unseen_concept", 60, 2)
    for name, chance in (("concepts", 0.1), ("relations", 0.5)):
        row = found[name]
        assert row["prompts"] == 60 and row["right"]["share"] == 1
        assert row["right"]["chance"] == chance and row["right"]["excludes_chance"]
        assert row["other_prompts"]["low_95"] < chance < row["other_prompts"]["high_95"]


# --- of a checkpoint ------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    prompted.register(monkeypatch)
    return prompted.save(tmp_path / "run", TinyArgs(), "--sampling.num_steps=2")


@pytest.fixture
def command(monkeypatch):
    """`scripts/evaluate.py` as a module."""
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "scripts" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_checkpoint_draws_the_same_at_every_call_and_in_any_batch(run, tmp_path, monkeypatch):
    loaded = prompted.load(tmp_path / "other", TinyArgs(), "--sampling.num_steps=2")
    settings = settings_of(loaded, 0, guidance=3.0)
    assert (settings.num_steps, settings.guidance) == (2, 3.0)
    texts = ["a fox", "a dog", "a cat"]
    first = make_draw(loaded, settings)(texts)
    monkeypatch.setattr(prompts_module, "BATCH", 2)
    assert np.array_equal(make_draw(loaded, settings)(texts), first)
    assert first.shape == (3, 32, 32, 3) and (first[0] != first[1]).any()
    assert (make_draw(loaded, replace(settings, seed=1))(texts) != first).any()


def test_the_command_prints_a_table_and_writes_json(run, tmp_path, command, capsys):
    out = tmp_path / "report.json"
    options = ["--prompts", "--items=12", "--guidance=2", "--device=cpu", "--seed=3"]
    command.main([f"--checkpoint={run}", f"--json={out}", *options])
    printed, report = capsys.readouterr().out, json.loads(out.read_text())
    assert list(report["splits"]) == ["train", "unseen_concept"]
    assert report["settings"]["guidance"] == 2.0 and report["settings"]["num_steps"] == 2
    row = report["splits"]["train"]["concepts"]
    assert row["prompts"] == 12 and row["right"]["trials"] == 12
    assert f"| train | the concept among 10 | 12 | {row['right']['share']:.1%} (" in printed
    assert printed.count("| the relation or its reverse | 12 |") == 2
    again = evaluate_prompts(
        prompted.load(tmp_path / "other", TinyArgs(), "--sampling.num_steps=2"),
        ["train"], num_items=12, guidance=2.0, seed=3,
    )  # fmt: skip
    assert again["splits"]["train"] == report["splits"]["train"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "--splits", "tests"], "--splits: the emoji corpus has no split 'tests'"),
        (["--guidance=2"], "--guidance: has no meaning without --prompts"),
        (["--prompts", "--num-steps=0"], "num_steps = 0: must be 1 or more"),
        (["--prompts", "--text-encoders", "x"], "--text-encoders x: the model encodes texts"),
    ],
)
def test_wrong_options_are_one_message(run, command, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        command.main([f"--checkpoint={run}", "--device=cpu", *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_models_without_prompts_and_of_other_data_are_refused(tmp_path, monkeypatch):
    prompted.register(monkeypatch)
    loaded = prompted.load(tmp_path / "run", TinyArgs())
    with pytest.raises(ValueError, match=r"^--prompts: .* is no model of prompted images"):
        evaluate_prompts(replace(loaded, model_args=None))
    loaded.job_config.multimodal.source = "datasets"
    with pytest.raises(ValueError, match=r"^--prompts: .* multimodal.source = 'datasets'"):
        evaluate_prompts(loaded)
