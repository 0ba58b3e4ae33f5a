"""Frozen text encoders: what they make, how it is joined, and folders that are refused.

The oracle is `transformers`, called by hand.
"""

from __future__ import annotations

import importlib
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.unit.data.tiny_encoders import CLIP_WINDOW, OTHER_WINDOW, save_clip, save_other, save_t5
from torchtitan_mixtures import data
from torchtitan_mixtures.data.prompt_spec import EncoderSpan
from torchtitan_mixtures.data.text_encoder_families import read_encoder_files
from torchtitan_mixtures.data.text_encoder_files import hash_encoder
from torchtitan_mixtures.data.text_encoders import (
    FrozenTextEncoders,
    PromptTokenizers,
    frozen_prompt_spec,
)
from torchtitan_mixtures.job_config import Multimodal
from torchtitan_mixtures.objectives.conditions import PromptCondition

TEXTS = ["a red fox", "two green apple above a blue bell"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    save_clip(root / "projected", seed=1)
    save_clip(root / "plain", "CLIPTextModel", seed=2)
    save_clip(root / "whole", "CLIPModel", seed=3)
    save_t5(root / "t5", seed=4)
    save_other(root / "bert", seed=5)
    return root


@pytest.fixture
def copied(root, tmp_path):
    """Copies a folder so that a test can break it."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(root / name, tmp_path / name))

    return copy


def folders(root, *names):
    return [str(root / name) for name in names]


def change_json(path, **values):
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def naive_clip(folder, kind, texts):
    """Hidden states before the last layer, and the pooled embedding; text by text."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    model = getattr(transformers, kind).from_pretrained(folder)
    states, vectors = [], []
    for text in texts:
        ids = tokenizer.encode(text)
        if len(ids) > CLIP_WINDOW:
            ids = [*ids[: CLIP_WINDOW - 1], tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (CLIP_WINDOW - len(ids))
        inputs = {"input_ids": torch.tensor([ids])}
        half = model if kind == "CLIPTextModel" else model.text_model
        with torch.no_grad():
            hidden = half(**inputs, output_hidden_states=True).hidden_states
            assert len(hidden) == 4  # embeddings and three layers
            states.append(hidden[2])
            if kind == "CLIPModel":
                vectors.append(model.get_text_features(**inputs).pooler_output)
            elif kind == "CLIPTextModelWithProjection":
                vectors.append(model(**inputs).text_embeds)
            else:
                end = ids.index(tokenizer.eos_token_id)
                vectors.append(half.final_layer_norm(hidden[3])[:, end])
    return torch.cat(states), torch.cat(vectors)


def naive_t5(folder, texts, window):
    words = json.loads((Path(folder) / "tokenizer.json").read_text())["model"]["vocab"]
    model = transformers.T5EncoderModel.from_pretrained(folder)
    rows = []
    for text in texts:
        ids = [*[words[word] for word in text.split()][: window - 1], 1]
        rows.append(ids + [0] * (window - len(ids)))
    with torch.no_grad():
        return model(torch.tensor(rows)).last_hidden_state


def test_embeddings_are_joined_as_in_stable_diffusion_3(root):
    names = folders(root, "projected", "whole", "t5")
    encoders = FrozenTextEncoders(names, "cpu")
    embeddings, pooled = encoders.encode(TEXTS)
    first, first_pooled = naive_clip(names[0], "CLIPTextModelWithProjection", TEXTS)
    second, second_pooled = naive_clip(names[1], "CLIPModel", TEXTS)
    t5 = naive_t5(names[2], TEXTS, 9)
    # 11 rows of 32 + 32 channels; below them 9 rows of 48 channels and 16 zeros.
    expected = torch.zeros(2, 20, 64)
    expected[:, :11, :32], expected[:, :11, 32:] = first, second
    expected[:, 11:, :48] = t5
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-5)
    expected_pooled = torch.cat([first_pooled, second_pooled], 1)
    torch.testing.assert_close(pooled, expected_pooled, atol=1e-5, rtol=1e-5)
    spec = encoders.spec
    assert (spec.name, spec.kind) == ("text", "embeddings")
    assert (spec.length, spec.dim, spec.pooled_dim) == (20, 64, 48)
    assert spec.spans == (
        EncoderSpan("clip", (0, 11), (0, 32), (0, 24)),
        EncoderSpan("clip_2", (0, 11), (32, 64), (24, 48)),
        EncoderSpan("t5", (11, 20), (0, 48)),
    )


def test_a_clip_without_projection_pools_its_last_hidden_state(root):
    name = str(root / "plain")
    embeddings, pooled = FrozenTextEncoders([name], "cpu").encode(TEXTS)
    states, vectors = naive_clip(name, "CLIPTextModel", TEXTS)
    torch.testing.assert_close(embeddings, states, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, vectors, atol=1e-5, rtol=1e-5)
    assert frozen_prompt_spec([name]).pooled_dim == 32


@pytest.mark.parametrize("kind", ["T5", "MT5", "UMT5"])
def test_the_encoder_of_any_t5_can_be_used_alone(kind, tmp_path):
    folder = save_t5(tmp_path / "t5", kind)
    encoders = FrozenTextEncoders([str(folder)], "cpu")
    embeddings, pooled = encoders.encode(TEXTS)
    ids = torch.stack([encoders.tokenizers.tokenize(text)[0] for text in TEXTS])
    whole = getattr(transformers, f"{kind}ForConditionalGeneration").from_pretrained(folder)
    with torch.no_grad():
        expected = whole.encoder(input_ids=ids).last_hidden_state
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-5)
    assert pooled.shape == (2, 0)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert", "GPT2"])
def test_any_other_model_gives_its_last_hidden_states(kind, tmp_path):
    folder = save_other(tmp_path / "model", kind)
    encoders = FrozenTextEncoders([str(folder)], "cpu")
    embeddings, pooled = encoders.encode(TEXTS)
    model = transformers.AutoModel.from_pretrained(folder)
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    for row, text in zip(embeddings, TEXTS, strict=True):
        ids = torch.tensor([[*[words[word] for word in text.split()], 1]])
        count = ids.shape[1]
        # With what fills it up hidden, a text is what it is without.
        alone = model(ids).last_hidden_state[0]
        torch.testing.assert_close(row[:count], alone, atol=1e-5, rtol=1e-5)
    assert embeddings.shape == (2, OTHER_WINDOW, 16) and pooled.shape == (2, 0)
    name = {"Bert": "bert", "Roberta": "roberta", "DistilBert": "distilbert", "GPT2": "gpt2"}[kind]
    assert encoders.spec.spans == (EncoderSpan(name, (0, OTHER_WINDOW), (0, 16)),)
    assert encoders.encode([""])[0].isfinite().all()


def test_other_models_follow_below(root):
    names = folders(root, "bert", "projected", "t5", "bert")
    spec = frozen_prompt_spec(names)
    first, last = CLIP_WINDOW + OTHER_WINDOW, CLIP_WINDOW + OTHER_WINDOW + 9
    assert (spec.length, spec.dim, spec.pooled_dim) == (last + OTHER_WINDOW, 48, 24)
    assert spec.spans == (
        EncoderSpan("bert", (CLIP_WINDOW, first), (0, 16)),
        EncoderSpan("clip", (0, CLIP_WINDOW), (0, 32), (0, 24)),
        EncoderSpan("t5", (first, last), (0, 48)),
        EncoderSpan("bert_2", (last, last + OTHER_WINDOW), (0, 16)),
    )
    whole, _ = FrozenTextEncoders(names, "cpu").encode(TEXTS)
    alone, _ = FrozenTextEncoders(names[:1], "cpu").encode(TEXTS)
    torch.testing.assert_close(whole[:, CLIP_WINDOW:first, :16], alone)


def test_a_model_without_its_pooling_layer_can_be_used(copied):
    folder = copied("bert")
    expected, _ = FrozenTextEncoders([str(folder)], "cpu").encode(TEXTS)
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("pooler.")}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(FrozenTextEncoders([str(folder)], "cpu").encode(TEXTS)[0], expected)
    kept.pop("encoder.layer.0.output.dense.weight")
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weight encoder\.layer\.0\.output"):
        FrozenTextEncoders([str(folder)], "cpu")


@pytest.mark.parametrize("limit", [None, 5, 9000])
def test_the_window_of_other_models_is_what_both_parts_allow(copied, limit):
    folder = copied("bert")
    change_json(folder / "tokenizer_config.json", model_max_length=limit)
    assert frozen_prompt_spec([str(folder)]).length == min(OTHER_WINDOW, limit or OTHER_WINDOW)
    change_json(folder / "config.json", max_position_embeddings=8192)
    assert frozen_prompt_spec([str(folder)]).length == min(512, limit or 512)


def test_models_that_only_code_of_their_own_can_make_are_refused(copied):
    folder = copied("bert")
    (folder / "evil.py").write_text("raise SystemExit('this was run')\n")
    code = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    change_json(folder / "config.json", model_type="evil", auto_map=code)
    with pytest.raises(ValueError, match=r'text_encoders: ".*" has a tokenizer that cannot be'):
        FrozenTextEncoders([str(folder)], "cpu")


def test_every_encoder_owns_its_span_alone(root):
    """What a dropped span leaves is what the other encoders make."""
    names = folders(root, "t5", "plain", "projected")  # whatever the order they are named in
    encoders = FrozenTextEncoders(names, "cpu")
    embeddings, pooled = encoders.encode(TEXTS)
    owners = torch.zeros(encoders.spec.length, encoders.spec.dim)
    for name, span in zip(names, encoders.spec.spans, strict=True):
        alone, alone_pooled = FrozenTextEncoders([name], "cpu").encode(TEXTS)
        rows, channels, own_pooled = (slice(*r) for r in (span.rows, span.channels, span.pooled))
        assert torch.equal(embeddings[:, rows, channels], alone)
        assert torch.equal(pooled[:, own_pooled], alone_pooled)
        owners[rows, channels] += 1
    assert owners.max() == 1
    assert not embeddings[:, owners == 0].any() and embeddings[:, owners == 1].abs().min() > 0


def test_encoders_are_frozen_and_leave_the_random_generator_alone(root):
    names = folders(root, "projected", "t5")
    state = torch.random.get_rng_state()
    encoders = FrozenTextEncoders(names, "cpu")
    first = encoders.encode(TEXTS)
    second = encoders.encode(TEXTS)
    assert torch.equal(torch.random.get_rng_state(), state)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other) and not one.requires_grad and one.dtype == torch.float32
    for model in encoders._models:
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_embeddings_are_float32_whatever_the_default_type_is(root):
    names = folders(root, "projected", "t5")
    expected = FrozenTextEncoders(names, "cpu").encode(TEXTS)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = FrozenTextEncoders(names, "cpu").encode(TEXTS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_half_precision_computes_about_the_same(root):
    names = folders(root, "projected", "t5")
    exact = FrozenTextEncoders(names, "cpu").encode(TEXTS)
    rough = FrozenTextEncoders(names, "cpu", dtype=torch.bfloat16).encode(TEXTS)
    for one, other in zip(rough, exact, strict=True):
        assert one.dtype == torch.float32 and not torch.equal(one, other)
        assert (one - other).norm() < 0.05 * other.norm()


def test_encoders_beside_a_model_compute_in_the_type_of_the_configuration(root):
    names = folders(root, "projected", "t5")
    exact, rough = (
        PromptCondition((frozen_prompt_spec(names),), 0.0, names, dtype)
        for dtype in ("float32", "bfloat16")
    )
    ids = PromptTokenizers(names).tokenize(TEXTS[0])
    batch = {f"prompt_text_ids_{number}": row[None] for number, row in enumerate(ids)}
    expected = FrozenTextEncoders(names, "cpu", dtype=torch.bfloat16).encode(TEXTS[:1])
    found = rough.encode(batch)
    assert torch.equal(found["prompt_text"], expected[0])
    assert torch.equal(found["prompt_text_pooled"], expected[1])
    assert not torch.equal(exact.encode(batch)["prompt_text"], expected[0])


def test_a_type_of_encoders_that_are_not_there_is_refused():
    Multimodal(text_encoders=["clip"], text_encoder_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"text_encoder_dtype = 'float16': there are no"):
        Multimodal(text_encoder_dtype="float16")


def test_ids_fill_the_windows_and_long_texts_are_cut_and_counted(root):
    names = folders(root, "projected", "t5")
    tokenizers = PromptTokenizers(names)
    clip, t5 = tokenizers.tokenize("a red fox")
    assert t5.tolist() == [3, 4, 7, 1, 0, 0, 0, 0, 0] and t5.dtype == torch.int64
    assert clip.shape == (CLIP_WINDOW,) and tokenizers.truncated == [0, 0]
    end = int(clip[-1])  # which fills up as well
    tokenizers.tokenize("red fox red fox red fox red fox")
    assert tokenizers.truncated == [0, 0]  # 10 and 9 tokens with the special ones
    clip, t5 = tokenizers.tokenize("red fox red fox red fox red fox red")
    assert tokenizers.truncated == [0, 1]
    assert t5.tolist() == [4, 7] * 4 + [1]
    clip, _ = tokenizers.tokenize("a bell")
    assert tokenizers.truncated == [0, 1]
    clip, _ = tokenizers.tokenize("apple apple apple")
    assert tokenizers.truncated == [1, 1] and len(clip) == CLIP_WINDOW and clip[-1] == end
    assert clip[-2] != end


def test_long_texts_are_refused_by_choice(root):
    tokenizers = PromptTokenizers(folders(root, "projected", "t5"), "refuse")
    tokenizers.tokenize("a red fox")
    message = (
        r"'red red red red red red red red red' has 10 tokens for the encoder t5, whose window is 9"
        r'.*shorten it, or set multimodal\.long_prompts = "truncate"'
    )
    with pytest.raises(ValueError, match=message):
        tokenizers.tokenize("red " * 9)
    assert tokenizers.truncated == [0, 0]


def test_tokenizers_go_to_other_processes(root):
    tokenizers = PromptTokenizers(folders(root, "projected", "t5"))
    copy = pickle.loads(pickle.dumps(tokenizers))
    for one, other in zip(copy.tokenize(TEXTS[0]), tokenizers.tokenize(TEXTS[0]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("limit", "window"), [(None, 77), (10**30, 77), (512, 77), (77, 77), (20, 20)]
)
def test_the_window_of_t5_is_77_or_what_its_tokenizer_allows(copied, limit, window):
    folder = copied("t5")
    change_json(folder / "tokenizer_config.json", model_max_length=limit)
    assert frozen_prompt_spec([str(folder)]).length == window
    assert len(PromptTokenizers([str(folder)]).tokenize("a fox")[0]) == window


def test_a_pipeline_has_its_tokenizers_beside_its_encoders(root, tmp_path):
    for number, name in (("", "projected"), ("_3", "t5")):
        shutil.copytree(root / name, tmp_path / f"text_encoder{number}")
        (tmp_path / f"tokenizer{number}").mkdir()
        for path in (tmp_path / f"text_encoder{number}").glob("tokenizer*"):
            path.rename(tmp_path / f"tokenizer{number}" / path.name)
    found = FrozenTextEncoders(folders(tmp_path, "text_encoder", "text_encoder_3"), "cpu")
    expected = FrozenTextEncoders(folders(root, "projected", "t5"), "cpu")
    assert found.spec == expected.spec
    for one, other in zip(found.encode(TEXTS), expected.encode(TEXTS), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match=r'has no config\.json; name "\S+/text_encoder" "\S+_3"'):
        frozen_prompt_spec([str(tmp_path)])


def test_files_of_older_versions_and_in_parts_are_read(copied):
    """Older names of weights, a tokenizer as vocabulary and merges, several files of weights."""
    folder = copied("plain")
    expected = FrozenTextEncoders([str(folder)], "cpu").encode(TEXTS)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    older = {f"text_model.{name}": weight for name, weight in weights.items()}
    parts = {"one.safetensors": sorted(older)[::2], "two.safetensors": sorted(older)[1::2]}
    index = {}
    for file, names in parts.items():
        save_file({name: older[name] for name in names}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]) + "\n")
    for one, other in zip(
        FrozenTextEncoders([str(folder)], "cpu").encode(TEXTS), expected, strict=True
    ):
        assert torch.equal(one, other)
    (folder / "two.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"lacks two\.safetensors, which model\.safetensors\.index"
    ):
        FrozenTextEncoders([str(folder)], "cpu")


def test_the_end_of_the_first_clip_models_is_found(copied):
    """They say `eos_token_id = 2`, which is another token."""
    folder = copied("projected")
    expected = FrozenTextEncoders([str(folder)], "cpu").encode(TEXTS)
    change_json(folder / "config.json", eos_token_id=2)
    for one, other in zip(
        FrozenTextEncoders([str(folder)], "cpu").encode(TEXTS), expected, strict=True
    ):
        assert torch.equal(one, other)


def test_what_embeddings_are_is_read_without_transformers_and_weights(copied, monkeypatch):
    folder = copied("projected")
    expected = frozen_prompt_spec([str(folder)])
    monkeypatch.setitem(sys.modules, "transformers", None)  # what is imported later fails
    for name in ("text_encoders", "text_encoder_families", "text_encoder_files"):
        monkeypatch.setattr(data, name, getattr(data, name))  # importing sets it: to be undone
        monkeypatch.delitem(sys.modules, f"torchtitan_mixtures.data.{name}")
    fresh = importlib.import_module("torchtitan_mixtures.data.text_encoders")
    with pytest.raises(ValueError, match=r'pip install "torchtitan_mixtures\[text\]"'):
        fresh.FrozenTextEncoders([str(folder)], "cpu")
    (folder / "model.safetensors").unlink()
    assert fresh.frozen_prompt_spec([str(folder)]) == expected


def test_a_pickle_of_weights_is_never_read(copied):
    folder = copied("t5")
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    message = r"multimodal\.text_encoders: .*pytorch_model\.bin, a pickle.*convert them to safetens"
    with pytest.raises(ValueError, match=message):
        FrozenTextEncoders([str(folder)], "cpu")


def test_code_in_a_folder_is_never_run(copied):
    folder = copied("t5")
    expected = FrozenTextEncoders([str(folder)], "cpu").encode(TEXTS)
    (folder / "evil.py").write_text("raise SystemExit('this was run')\n")
    auto_map = {"AutoTokenizer": [None, "evil.Evil"], "AutoModel": "evil.Evil"}
    for name in ("tokenizer_config.json", "config.json"):
        change_json(folder / name, auto_map=auto_map)
    found = FrozenTextEncoders([str(folder)], "cpu").encode(TEXTS)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_folder_that_is_missing_is_not_looked_up(tmp_path):
    with pytest.raises(ValueError, match=r"is not a local folder; name .*Nothing is downloaded"):
        frozen_prompt_spec(["openai/clip-vit-large-patch14"])
    with pytest.raises(ValueError, match=r"multimodal\.text_encoders: .* has no config\.json"):
        frozen_prompt_spec([str(tmp_path)])
    with pytest.raises(ValueError, match="name at least one folder"):
        frozen_prompt_spec([])


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("t5", {"model_type": "bart"}, r"'bart', an encoder with a decoder; of such only t5, mt5"),
        ("t5", {"model_type": None}, r"has model_type = None in config\.json; name a folder"),
        ("bert", {"vocab_size": None}, r"has vocab_size = None in config\.json"),
        ("bert", {"hidden_size": None}, r"has hidden_size = None in config\.json"),
        ("bert", {"max_position_embeddings": 1}, r"takes 1 tokens by config\.json"),
        ("t5", {"d_model": "wide"}, r"d_model = 'wide' in config\.json"),
        ("plain", {"hidden_size": 0}, r"hidden_size = 0 in config\.json; it must be a number, 1"),
        ("plain", {"architectures": ["CLIPVisionModel"]}, r"it must name one of CLIPTextModel, "),
        ("plain", {"architectures": None}, r"has architectures = None"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(copied, name, values, message):
    folder = copied(name)
    change_json(folder / "config.json", **values)
    with pytest.raises(ValueError, match=message):
        frozen_prompt_spec([str(folder)])


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_corrupt_configuration_is_refused(copied, content):
    folder = copied("t5")
    for name in ("config.json", "tokenizer_config.json"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=rf"has a corrupt {name}"):
            frozen_prompt_spec([str(folder)])
        (folder / name).write_bytes(before)


def test_a_window_that_is_none_is_refused(copied):
    folder = copied("t5")
    change_json(folder / "tokenizer_config.json", model_max_length="many")
    with pytest.raises(ValueError, match=r"model_max_length = 'many' in tokenizer_config\.json"):
        frozen_prompt_spec([str(folder)])


def test_broken_weights_are_refused(copied):
    folder = copied("projected")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:5000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        FrozenTextEncoders([str(folder)], "cpu")
    path.write_bytes(whole)
    tensors = load_file(path)
    projection = tensors.pop("text_projection.weight")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weight text_projection\.weight"):
        FrozenTextEncoders([str(folder)], "cpu")
    tensors["text_projection.weight"] = projection[:5].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="cannot be loaded"):
        FrozenTextEncoders([str(folder)], "cpu")
    path.rename(folder / "model.fp16.safetensors")
    with pytest.raises(ValueError, match=r"no model\.safetensors; rename model\.fp16\.safetensors"):
        FrozenTextEncoders([str(folder)], "cpu")


def test_a_tokenizer_that_is_missing_or_broken_is_refused(copied):
    folder = copied("t5")
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="has a tokenizer that cannot be loaded"):
        PromptTokenizers([str(folder)])
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json; copy the files"):
        PromptTokenizers([str(folder)])
    (folder / "spiece.model").write_bytes(b"pieces")
    with pytest.raises(ValueError, match=r"spiece\.model alone; with sentencepiece"):
        PromptTokenizers([str(folder)])
    (folder / "tokenizer.json").write_bytes(whole)
    change_json(folder / "tokenizer_config.json", pad_token=None)
    with pytest.raises(ValueError, match="does not say how to fill texts up; set pad_token"):
        PromptTokenizers([str(folder)])


def test_the_tokenizer_of_another_model_is_refused(copied):
    folder = copied("projected")
    change_json(folder / "config.json", eos_token_id=3)
    with pytest.raises(ValueError, match="does not end texts with token 3, the eos_token_id"):
        PromptTokenizers([str(folder)])
    folder = copied("t5")
    change_json(folder / "config.json", vocab_size=6)
    tokenizers = PromptTokenizers([str(folder)])
    tokenizers.tokenize("red green")
    with pytest.raises(ValueError, match=r"makes the token 7 of 'a fox', but .* those below 6"):
        tokenizers.tokenize("a fox")


def test_the_hash_of_an_encoder_covers_its_weights_and_its_tokenizer(copied):
    folder = copied("projected")
    before = hash_encoder(read_encoder_files(str(folder)))
    (folder / "README.md").write_text("more")
    moved = folder.rename(folder.with_name("moved"))
    assert hash_encoder(read_encoder_files(str(moved))) == before
    tensors = load_file(moved / "model.safetensors")
    whole = (moved / "model.safetensors").read_bytes()
    save_file({name: t + 1 for name, t in tensors.items()}, moved / "model.safetensors")
    assert hash_encoder(read_encoder_files(str(moved))) != before
    (moved / "model.safetensors").write_bytes(whole)
    assert hash_encoder(read_encoder_files(str(moved))) == before
    change_json(moved / "tokenizer_config.json", pad_token="a")
    assert hash_encoder(read_encoder_files(str(moved))) != before
