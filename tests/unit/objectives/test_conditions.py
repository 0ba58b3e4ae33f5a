"""What models are told of images: prompts or classes, and which of them training leaves out."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.unit.data.tiny_encoders import save_clip, save_t5
from torchtitan_mixtures.data import text_encoders
from torchtitan_mixtures.data.prompt_spec import EncoderSpan, PromptSpec
from torchtitan_mixtures.data.text_encoders import FrozenTextEncoders
from torchtitan_mixtures.objectives.conditions import ClassCondition, PromptCondition

COUNT = 4000
SD3_DROPOUT = 0.464  # of three encoders all are dropped in about a tenth of the samples

IDS = PromptSpec("text", "tokens", length=4, vocab_size=20)
SOUND = PromptSpec("speech", "tokens", length=3, vocab_size=9, null_token=8)
VECTORS = PromptSpec(
    "text",
    "embeddings",
    length=2,
    dim=3,
    spans=tuple(EncoderSpan(name, (0, 2), (i, i + 1)) for i, name in enumerate("abc")),
)


def batch_of(samples, **more):
    count = len(samples)
    return {
        "input": torch.zeros(count, 3, 2, 2),
        "sample_index": torch.as_tensor(samples),
        "prompt_text": torch.zeros(count, 2, 3),
        **more,
    }


def kept_of(condition, samples, seed=0, purpose="step"):
    kept = condition.inputs(batch_of(samples), seed, purpose, is_training=True)["kept"]
    assert kept.dtype == torch.bool and kept.device.type == "cpu"
    return kept


def tolerance(share, count=COUNT):
    """Five standard deviations of a share that was counted."""
    return 5 * (share * (1 - share) / count) ** 0.5


@pytest.fixture(scope="module")
def dropped():
    return ~kept_of(PromptCondition([VECTORS], SD3_DROPOUT), range(COUNT))


# --- prompts --------------------------------------------------------------------------------------


def test_each_encoder_loses_its_share(dropped):
    assert dropped.shape == (COUNT, 3)
    for share in dropped.double().mean(0).tolist():
        assert share == pytest.approx(SD3_DROPOUT, abs=tolerance(SD3_DROPOUT))


def test_encoders_lose_theirs_independently(dropped):
    lost_whole = dropped.all(1).double().mean().item()
    assert lost_whole == pytest.approx(0.1, abs=tolerance(0.1))
    for pattern in itertools.product([False, True], repeat=3):
        expected = 1.0
        for is_dropped in pattern:
            expected *= SD3_DROPOUT if is_dropped else 1 - SD3_DROPOUT
        share = (dropped == torch.tensor(pattern)).all(1).double().mean().item()
        assert share == pytest.approx(expected, abs=tolerance(expected)), pattern


@pytest.mark.parametrize("sizes", [(1,) * 12, (5, 7), (2, 4, 6)])
def test_what_a_sample_loses_does_not_depend_on_its_batch(sizes, dropped):
    condition = PromptCondition([VECTORS], SD3_DROPOUT)
    parts = [kept_of(condition, part) for part in torch.arange(12).split(sizes)]
    assert torch.equal(~torch.cat(parts), dropped[:12])
    # Ranks have other samples of a step, in any order, and objects of their own.
    for rank in range(3):
        samples = torch.arange(rank, 12, 3).flip(0)
        found = kept_of(PromptCondition([VECTORS], SD3_DROPOUT), samples)
        assert torch.equal(~found, dropped[samples])


def test_global_generators_have_no_part_in_it(dropped):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(~kept_of(PromptCondition([VECTORS], SD3_DROPOUT), range(50)), dropped[:50])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", [{"seed": 1}, {"purpose": "step 2"}])
def test_other_seeds_and_purposes_draw_others(change, dropped):
    found = ~kept_of(PromptCondition([VECTORS], SD3_DROPOUT), range(500), **change)
    equal = (found == dropped[:500]).double().mean().item()
    expected = SD3_DROPOUT**2 + (1 - SD3_DROPOUT) ** 2
    assert equal == pytest.approx(expected, abs=tolerance(expected, 1500))


def test_columns_are_encoders_in_the_order_of_the_prompts(dropped):
    both = kept_of(PromptCondition([VECTORS, SOUND], SD3_DROPOUT), range(100))
    turned = kept_of(PromptCondition([SOUND, VECTORS], SD3_DROPOUT), range(100))
    assert both.shape == (100, 4)
    assert torch.equal(~both[:, :3], dropped[:100])
    assert torch.equal(turned, both[:, [3, 0, 1, 2]])
    assert not torch.equal(both[:, 3], both[:, 0])


@pytest.mark.parametrize(("is_training", "dropout"), [(False, SD3_DROPOUT), (True, 0.0)])
def test_nothing_is_lost_in_validation_or_without_dropout(is_training, dropout):
    condition = PromptCondition([VECTORS], dropout)
    assert condition.inputs(batch_of([0, 1]), 0, "step", is_training).keys() == {"prompts"}


def test_with_a_dropout_of_one_all_is_lost():
    assert not kept_of(PromptCondition([VECTORS], 1.0), range(200)).any()


def test_prompts_come_by_their_names_and_nothing_else_does():
    text, speech = torch.arange(8).reshape(2, 4), torch.arange(6).reshape(2, 3)
    pooled = torch.randn(2, 5)
    batch = batch_of([0, 1], prompt_text=text, prompt_speech=speech, prompt_text_pooled=pooled)
    batch["latent_std"] = torch.ones(2, 3, 2, 2)
    condition = PromptCondition([IDS, SOUND], 0.1)
    assert condition.encode(batch) is batch  # there is nothing to encode
    for is_training in (True, False):
        prompts = condition.inputs(batch, 0, "step", is_training)["prompts"]
        assert prompts.keys() == {"text", "speech", "text_pooled"}
        assert prompts["text"] is text and prompts["speech"] is speech
        assert prompts["text_pooled"] is pooled


# --- frozen encoders ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(save_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return str(save_t5(tmp_path_factory.mktemp("t5"), seed=1))


def ids_of(encoders, *texts):
    """Keys as the loader names them, and the ids."""
    rows = [encoders.tokenizers.tokenize(text) for text in texts]
    ids = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    return {f"prompt_text_ids_{number}": part for number, part in enumerate(ids)}, ids


@pytest.mark.parametrize("order", ["clip, t5", "t5, clip"])
def test_ids_of_frozen_encoders_become_what_these_make_of_them(order, clip, t5, monkeypatch):
    folders = [{"clip": clip, "t5": t5}[name] for name in order.split(", ")]
    encoders = FrozenTextEncoders(folders, "cpu")
    loaded = []

    def load(folders, *rest, **options):
        loaded.append(folders)
        return FrozenTextEncoders(folders, *rest, **options)

    monkeypatch.setattr(text_encoders, "FrozenTextEncoders", load)
    condition = PromptCondition([encoders.spec], 0.1, folders)
    assert not loaded
    for texts in (("a red fox", "two bells"), ("a blue apple", "fox")):
        given, ids = ids_of(encoders, *texts)
        batch = batch_of([4, 7])
        del batch["prompt_text"]
        # The order of the keys decides nothing.
        batch |= dict(reversed(given.items()))
        before = batch.copy()
        found = condition.encode(batch)
        assert batch == before
        embeddings, pooled = encoders.encode_ids(ids)
        assert torch.equal(found["prompt_text"], embeddings) and embeddings.any()
        assert torch.equal(found["prompt_text_pooled"], pooled) and pooled.any()
        names = {"input", "sample_index", "prompt_text", "prompt_text_pooled"}
        assert found.keys() == names
        inputs = condition.inputs(found, 0, "step", is_training=True)
        assert inputs["prompts"].keys() == {"text", "text_pooled"}
        assert inputs["kept"].shape == (2, 2)
        assert not inputs["prompts"]["text"].requires_grad
    assert loaded == [folders]  # once


def test_encoders_without_a_pooled_embedding_add_none(t5):
    encoders = FrozenTextEncoders([t5], "cpu")
    given, ids = ids_of(encoders, "a red fox", "two bells")
    found = PromptCondition([encoders.spec], 0.1, [t5]).encode({**batch_of([0, 1]), **given})
    assert found.keys() == {"input", "sample_index", "prompt_text"}
    assert torch.equal(found["prompt_text"], encoders.encode_ids(ids)[0])


def test_encoders_compute_in_the_type_that_was_asked_for(clip):
    encoders = FrozenTextEncoders([clip], "cpu", dtype=torch.bfloat16)
    given, ids = ids_of(encoders, "a red fox")
    condition = PromptCondition([encoders.spec], 0.1, [clip], "bfloat16")
    found = condition.encode({**batch_of([0]), **given})["prompt_text"]
    assert torch.equal(found, encoders.encode_ids(ids)[0]) and found.dtype == torch.float32
    assert not torch.equal(found, FrozenTextEncoders([clip], "cpu").encode_ids(ids)[0])


# --- classes --------------------------------------------------------------------------------------


def test_classes_are_lost_in_training_alone_and_so_is_noise_of_routers():
    condition = ClassCondition(num_classes=7, dropout=0.25, router_noise=(2, 3))
    batch = batch_of(range(COUNT), class_labels=torch.arange(COUNT) % 7)
    assert condition.encode(batch) is batch
    found = condition.inputs(batch, 0, "step", is_training=True)
    is_null = found["class_labels"] == 7
    assert is_null.double().mean().item() == pytest.approx(0.25, abs=tolerance(0.25))
    assert torch.equal(found["class_labels"][~is_null], batch["class_labels"][~is_null])
    noise = found["router_noise"]
    assert noise.shape == (COUNT, 2, 3)
    assert noise.mean().abs() < 5 / noise.numel() ** 0.5
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    part = {name: tensor[40:47] for name, tensor in batch.items()}
    for name, tensor in condition.inputs(part, 0, "step", is_training=True).items():
        assert torch.equal(tensor, found[name][40:47])
    validation = condition.inputs(batch, 0, "step", is_training=False)
    assert validation.keys() == {"class_labels"}
    assert torch.equal(validation["class_labels"], batch["class_labels"])


def test_without_routers_there_is_no_noise():
    batch = batch_of([0, 1], class_labels=torch.tensor([3, 4]))
    found = ClassCondition(num_classes=7, dropout=0.0).inputs(batch, 0, "step", is_training=True)
    assert found.keys() == {"class_labels"}
    assert torch.equal(found["class_labels"], batch["class_labels"])
