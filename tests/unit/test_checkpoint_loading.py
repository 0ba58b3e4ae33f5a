"""Models out of checkpoints: the weights saved, harmless reading, messages."""

import dataclasses
import json
import pickle
import shutil

import pytest
import torch

from tests.checkpoints import save_tiny_mot
from torchtitan_mixtures.checkpoint_loading import find_checkpoint, load_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with a whole checkpoint, an older one and one cut off; the saved weights."""
    run = tmp_path_factory.mktemp("run")
    save_tiny_mot(run, 3)
    model = save_tiny_mot(run, 20)
    shutil.copytree(run / "checkpoint/step-20", run / "checkpoint/step-30")
    (run / "checkpoint/step-30/.metadata").unlink()
    return run, model


@pytest.mark.parametrize("name", ["", "checkpoint", "checkpoint/step-20"])
def test_the_newest_whole_checkpoint_is_found(saved, name):
    run, model = saved
    loaded = load_checkpoint(run / name)
    assert (loaded.path, loaded.step) == (run / "checkpoint/step-20", 20)
    assert loaded.codecs.modalities.vocab_ranges == ((0, 2048), (2048, 3072))
    assert not loaded.model.training
    weights = dict(loaded.model.named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


def test_the_loaded_model_computes_the_same(saved):
    run, model = saved
    tokens = torch.randint(0, 3072, (2, 40))
    loaded = load_checkpoint(run)
    assert torch.equal(loaded.model(tokens), model(tokens))
    assert loaded.job_config.multimodal.image_tokenizer == "emoji_32px"
    assert dataclasses.asdict(loaded.model_args) == dataclasses.asdict(model.model_args)


def test_an_index_that_would_run_code_is_refused(saved, tmp_path):
    run, _ = saved
    folder = tmp_path / "step-20"
    shutil.copytree(run / "checkpoint/step-20", folder)
    witness = tmp_path / "witness"

    class Evil:
        def __reduce__(self):
            return (open, (str(witness), "w"))

    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"step-20.*refers to .*open, which has no place"):
        load_checkpoint(folder)
    assert not witness.exists()


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: edit_config(f, family="mox"), "family = 'mox' is none of this version's"),
        (lambda f: edit_config(f, model_args={"dims": 3}), "does not fit this version.*dims"),
        (lambda f: edit_config(f, job_config={"jobs": {}}), "does not fit this version"),
        (
            lambda f: edit_config(f, tokenizers={"image_tokenizer": "another"}),
            "multimodal.image_tokenizer = 'emoji_32px' is not what the model was trained with",
        ),
        (
            lambda f: edit_config(f, vocab_ranges={"text": [0, 2048], "image": [2048, 9999]}),
            "vocabulary ranges are .*9999.*restore",
        ),
        (lambda f: (f / ".metadata").unlink(), "no complete checkpoint"),
        (lambda f: (f / ".metadata").write_bytes(b"junk"), "weights cannot be read"),
        (lambda f: (f / "__0_0.distcp").unlink(), "weights cannot be read.*__0_0.distcp"),
        (lambda f: (f / "__0_0.distcp").write_bytes(b"junk"), "weights cannot be read"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_said(saved, tmp_path, damage, message):
    run, _ = saved
    folder = tmp_path / "step-20"
    shutil.copytree(run / "checkpoint/step-20", folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_a_run_without_checkpoints_is_said(tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)
