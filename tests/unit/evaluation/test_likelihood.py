"""Likelihoods of continuations that share rows, against one document at a time."""

import numpy as np
import pytest
import torch

import torchtitan_mixtures  # noqa: F401
from torchtitan_mixtures.evaluation import likelihood
from torchtitan_mixtures.evaluation.likelihood import score_continuations
from torchtitan_mixtures.models.mot.args import MoTModelArgs
from torchtitan_mixtures.models.mot.model import MoTTransformer


def make_model(**options):
    args = MoTModelArgs(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=40, max_seq_len=64, **options
    )
    args.code_vocab_sizes = [24]
    torch.manual_seed(1)
    with torch.device("cpu"):
        model = MoTTransformer(args)
    model.init_weights()
    return model.double().eval()


def documents(count, low, high, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 64, rng.integers(low, high)) for _ in range(count)]


def naive(model, beginnings, continuations, **inputs):
    """One forward pass a document, one term a token."""
    scores = np.empty((len(beginnings), len(continuations)))
    for i, beginning in enumerate(beginnings):
        for j, continuation in enumerate(continuations):
            tokens = torch.from_numpy(np.concatenate([beginning, continuation]))[None]
            kwargs = {key: make(tokens, len(beginning)) for key, make in inputs.items()}
            log_probs = model(tokens, **kwargs)[0].log_softmax(-1)
            scores[i, j] = sum(
                log_probs[place - 1, tokens[0, place]].item()
                for place in range(len(beginning), tokens.shape[1])
            )
    return scores


@pytest.mark.parametrize(
    "options", [{}, {"tower_of_modality": [0, 0]}, {"attn_type": "flex"}, {"norm_position": "post"}]
)
@pytest.mark.parametrize("row_tokens", [20, 33, 1024])
def test_sharing_rows_changes_nothing(monkeypatch, options, row_tokens):
    monkeypatch.setattr(likelihood, "ROW_TOKENS", row_tokens)
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 3 * row_tokens)
    model = make_model(**options)
    beginnings, continuations = documents(4, 1, 12, seed=2), documents(9, 1, 16, seed=3)
    told = []
    found = score_continuations(model, beginnings, continuations, lambda *of: told.append(of))
    np.testing.assert_allclose(found, naive(model, beginnings, continuations), rtol=1e-10)
    done = [number for number, total in told]
    assert done == sorted(done) and told[-1] == (4, 4) and {total for _, total in told} == {4}
    assert len(told) > 2 or row_tokens > 33


def test_images_that_were_given_are_seen_in_both_directions():
    model = make_model(attn_type="sdpa_dense", bidirectional_images=True)
    rng = np.random.default_rng(0)
    image = lambda: rng.integers(40, 64, 5)  # noqa: E731
    beginnings = [np.concatenate([[1], image(), [2], image()]), np.array([1, 3])]
    continuations = documents(3, 2, 6, seed=4)

    def image_ids(tokens, length):
        ids, current, was_code = torch.full_like(tokens, -1), -1, False
        for place in range(length):
            is_code = tokens[0, place] >= 40
            current += int(is_code and not was_code)
            ids[0, place] = current if is_code else -1
            was_code = is_code
        return ids

    found = score_continuations(model, beginnings, continuations)
    expected = naive(model, beginnings, continuations, image_ids=image_ids)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_probabilities_of_all_continuations_of_one_token_add_up_to_one():
    model = make_model()
    scores = score_continuations(
        model, [np.array([1, 50, 7])], [np.array([token]) for token in range(64)]
    )
    assert np.exp(scores).sum() == pytest.approx(1)


def test_a_document_beyond_the_positions_is_refused():
    with pytest.raises(ValueError, match="65 tokens is longer than the 64 positions"):
        score_continuations(make_model(), documents(1, 60, 61, 0), documents(1, 5, 6, 0))
