"""Generation against a naive one: no cache, no batch, no tables."""

import itertools

import numpy as np
import pytest
import torch

from tests.unit.data.fakes import SENTINELS
from tests.unit.sampling.helpers import (
    CODES,
    NAMES,
    RANGES,
    UNITS,
    codecs,
    image,
    naive_generate,
    prompt_tokens,
    speech,
    text,
    tiny_model,
)
from torchtitan_mixtures.data.sources import Segment
from torchtitan_mixtures.sampling.generate import encode_prompts, generate
from torchtitan_mixtures.sampling.settings import SamplingSettings

PROMPTS = [
    text("a fox"),
    (),
    text("two") + image(3, 0, 15, 3) + text("!"),
    image(1, 2, 3, 4),
    speech(0, 7, 7),
]
SHORT = {"max_text_tokens": 5, "max_speech_seconds": 0.6}
CASES = {
    "image": (["image"], {"seed": 1}),
    "text": (["text"], {"seed": 2}),
    "speech": (["speech"], {"seed": 3, "temperature": 0.7, "top_k": 6}),
    "greedy": (["text", "image", "speech"], {"temperature": 0.0}),
    "all three": (["text", "image", "speech"], {"seed": 4, "top_p": 0.8}),
    "image twice": (["image", "text", "image"], {"seed": 5, "top_k": 9, "temperature": 2.0}),
    "guidance": (["image"], {"seed": 6, "guidance": 2.5}),
    "guidance after others": (["speech", "text", "image", "text"], {"seed": 7, "guidance": 1.7}),
}


def tokens_of(segment):
    if segment.modality == "text":
        return [7 + byte for byte in segment.payload.encode("latin-1")]
    assert segment.payload.dtype == np.int64
    return (segment.payload + RANGES[NAMES.index(segment.modality)][0]).tolist()


def values(sample):
    return [tokens_of(segment) for segment in sample.segments]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def hotter(model, factor):
    """Likelier ends of texts and speech: chances are else those of one in hundreds."""
    with torch.no_grad():
        for token in (SENTINELS.eos, SENTINELS.image_start, SENTINELS.speech_end):
            model.output.weight[token] *= factor
    return model


@pytest.mark.parametrize("case", CASES)
def test_batches_equal_one_document_at_a_time_without_cache(case):
    into, fields = CASES[case]
    settings = SamplingSettings(**SHORT, **fields)
    model = hotter(tiny_model(), 8)
    samples = generate(model, PROMPTS, into, settings, codecs(), num_samples=2, batch_size=7)
    assert [(s.prompt, s.number) for s in samples] == [(n // 2, n) for n in range(10)]
    lengths = set()
    for sample in samples:
        assert [segment.modality for segment in sample.segments] == into
        expected = naive_generate(model, PROMPTS[sample.prompt], into, settings, sample.number)
        assert values(sample) == expected
        lengths |= {(s.modality, len(t)) for s, t in zip(sample.segments, expected, strict=True)}
    if "image" in into:
        assert {length for name, length in lengths if name == "image"} == {4}
    if case in ("text", "speech", "all three"):  # both ends were met: the limit, and earlier
        found = {length for name, length in lengths if name == into[0]}
        assert max(found) == {"text": 5, "speech": 6}[into[0]] and len(found) > 1


@pytest.mark.parametrize(
    "fields",
    [
        {"tower_of_modality": [0, 0, 0]},
        {"norm_position": "post", "tower_of_modality": [0, 1, 0]},
        {"attn_type": "flex", "attn_mask_type": "block_causal"},
    ],
)
def test_other_flavours_generate_too(fields):
    model = tiny_model(**fields)
    settings = SamplingSettings(**SHORT, guidance=2.0)
    samples = generate(model, PROMPTS, ["image", "text"], settings, codecs())
    for sample in samples:
        expected = naive_generate(
            model, PROMPTS[sample.prompt], ["image", "text"], settings, sample.number
        )
        assert values(sample) == expected


def test_codes_are_those_of_the_tokenizers(model):
    settings = SamplingSettings(temperature=3.0, **SHORT)
    samples = generate(model, PROMPTS, ["image", "speech"], settings, codecs(), num_samples=8)
    pictures = np.concatenate([sample.segments[0].payload for sample in samples])
    units = np.concatenate([sample.segments[1].payload for sample in samples])
    assert set(pictures) == set(range(CODES))
    assert set(units) == set(range(UNITS))


def test_a_sample_depends_on_its_own_prompt_and_number_only(model):
    settings = SamplingSettings(seed=9, guidance=1.5, **SHORT)
    into = ["text", "image"]
    alone = [
        generate(model, PROMPTS, into, settings, codecs(), batch_size=1, num_samples=n)
        for n in (1, 3)
    ]
    for batch_size in (2, 16):
        together = generate(
            model, PROMPTS, into, settings, codecs(), batch_size=batch_size, num_samples=3
        )
        assert [values(s) for s in together] == [values(s) for s in alone[1]]
    assert values(alone[0][0]) == values(alone[1][0])
    others = [text("something else altogether"), *PROMPTS[1:]]
    changed = generate(model, others, into, settings, codecs(), num_samples=3)
    assert [values(s) for s in changed[3:]] == [values(s) for s in alone[1][3:]]
    assert [values(s) for s in changed[:3]] != [values(s) for s in alone[1][:3]]


def test_greedy_choices_need_no_seed_and_seeds_change_the_others(model):
    def draw(**fields):
        settings = SamplingSettings(**SHORT, **fields)
        return [values(s) for s in generate(model, PROMPTS, ["image"], settings, codecs())]

    assert draw(temperature=0.0, seed=1) == draw(temperature=0.0, seed=2)
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(top_k=1, seed=1) == draw(temperature=0.0)


def test_guidance_of_zero_forgets_the_prompt_and_of_one_is_none(model):
    into = ["image"]

    def draw(prompts, guidance):
        settings = SamplingSettings(seed=3, guidance=guidance, **SHORT)
        return [values(s)[0] for s in generate(model, prompts, into, settings, codecs())]

    assert draw(PROMPTS, 0.0) == draw([text("other")] * len(PROMPTS), 0.0)
    assert draw(PROMPTS, 1.0) == draw(PROMPTS, 1.0 + 1e-13)  # with twins, and without
    assert draw(PROMPTS, 1.0) != draw(PROMPTS, 0.0)


def test_stopping_early_saves_steps_and_changes_nothing():
    model = hotter(tiny_model(), 8)
    settings = SamplingSettings(max_text_tokens=50, seed=1)

    def draw(stops_early):
        calls = []
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        samples = generate(model, PROMPTS, ["text"], settings, codecs(), stops_early=stops_early)
        handle.remove()
        return [values(s) for s in samples], len(calls)

    (early, few), (late, many) = draw(True), draw(False)
    assert early == late
    assert few < many == 50


def test_progress_ends_at_its_total(model):
    seen = []
    generate(
        model, PROMPTS, ["image"], SamplingSettings(), codecs(), batch_size=3,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    done, totals = zip(*seen, strict=True)
    assert set(totals) == {2 * 6}
    assert list(done) == sorted(done) and done[-1] == 12


def test_prompts_are_framed_as_in_training(model):
    rows = encode_prompts(model.model_args, PROMPTS, ["text"], SamplingSettings(**SHORT), codecs())
    assert [row.tolist() for row in rows] == [prompt_tokens(prompt) for prompt in PROMPTS]


def test_the_global_generator_and_the_model_stay_as_they_are(model):
    state, training = torch.get_rng_state(), [m.training for m in model.modules()]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    generate(model, PROMPTS, ["image"], SamplingSettings(), codecs())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == training
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_modality_that_the_model_lacks_is_named():
    model = tiny_model(2)
    for prompts, into, message in (
        ([text("a")], ["speech"], "into = speech: .* it has text, image"),
        ([speech(1)], ["text"], "prompt = speech: .* it has text, image"),
        ([text("a")], ["video"], "into = video"),
        ([text("a")], [], r"into = \[\]: must name"),
        ([text("a")], ["image", "text", "text"], "a text after a text"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, prompts, into, SamplingSettings(), codecs(2))


def test_a_modality_without_codes_is_one_that_the_model_lacks():
    model = tiny_model(3, code_vocab_sizes=[CODES, 0])
    tools = codecs()
    ranges = (*RANGES[:2], (316, 316))
    tools = type(tools)(type(tools.modalities)(NAMES, ranges), tools.text, tools.image, None)
    with pytest.raises(ValueError, match="it has text, image"):
        generate(model, [text("a")], ["speech"], SamplingSettings(), tools)


def test_a_length_beyond_the_positions_is_refused_and_the_last_one_is_not(model):
    def draw(length):
        prompts = [text("a"), text("b" * length)]
        settings = SamplingSettings(max_text_tokens=8)
        return generate(model, prompts, ["image", "text"], settings, codecs())

    draw(64 - 1 - 6 - 8)
    with pytest.raises(ValueError, match=r"prompt 1 has 51 tokens .* up to 14: 65 positions.* 64"):
        draw(64 - 6 - 8)


def test_images_that_were_not_predicted_in_training_are_not_generated():
    model = tiny_model(attn_type="sdpa_dense", bidirectional_images=True)
    with pytest.raises(ValueError, match=r"into = image: .*see later ones"):
        generate(model, [text("a")], ["image"], SamplingSettings(), codecs())


def test_texts_about_images_that_attend_in_both_directions_see_them_so():
    model = tiny_model(attn_type="sdpa_dense", bidirectional_images=True)
    settings = SamplingSettings(temperature=0.0, max_text_tokens=3)
    prompt = text("x") + image(5, 9, 2, 11)
    (sample,) = generate(model, [prompt], ["text"], settings, codecs())
    (found,) = values(sample)
    assert len(found) == 3
    tokens = prompt_tokens(prompt) + found
    ids = [0 if RANGES[1][0] <= token < RANGES[1][1] else -1 for token in tokens]
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), image_ids=torch.tensor([ids]))[0]
    assert (logits[-4:-1, 7:263].argmax(-1) + 7).tolist() == found


def test_every_modality_follows_every_other():
    model = tiny_model()
    settings = SamplingSettings(**SHORT)
    for prompt, name in itertools.product(PROMPTS, NAMES):
        (sample,) = generate(model, [prompt], [name], settings, codecs())
        assert isinstance(sample.segments[0], Segment)
        assert len(sample.segments[0].payload) > 0
