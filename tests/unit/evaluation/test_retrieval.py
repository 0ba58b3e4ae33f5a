"""Retrieval, groups and rates, on scores that are known and on models that know the answer."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import torchtitan_mixtures  # noqa: F401
from torchtitan_mixtures.data.emoji import EmojiCorpus
from torchtitan_mixtures.evaluation.items import Item, Things, choose_drawings, choose_names
from torchtitan_mixtures.evaluation.rates import Rate, classification_rate, retrieval_rate
from torchtitan_mixtures.evaluation.retrieval import (
    Scores,
    classify_groups,
    retrieve,
    score_direction,
)

BOS, EOS, TEXT, IMAGE = 0, 1, 10, 30  # first ids of text and image codes


class Bigrams(nn.Module):
    """A decoder that knows how likely each token is anywhere in a document, given its first.

    Documents here are `<bos> source target <eos>` of one token each, so this is all there is to
    know.
    """

    def __init__(self, table):
        super().__init__()
        self.log_probs = nn.Parameter(table)  # (tokens, tokens)
        self.model_args = SimpleNamespace(max_seq_len=100)

    def forward(self, tokens, positions, attention_masks):
        return self.log_probs[tokens]


def table(**rows):
    logits = torch.zeros(50, 50, dtype=torch.float64)
    for name, row in rows.items():
        for token, value in row.items():
            logits[int(name[1:]), token] = value
    return logits.log_softmax(-1)


def things(count, **options):
    items = [
        Item({"text": np.array([TEXT + i]), "image": np.array([IMAGE + i])}) for i in range(count)
    ]
    return Things(items, BOS, EOS, **options)


def test_scores_are_those_of_the_documents_and_of_the_targets_alone():
    known = table(_0={IMAGE: 3.0}, _10={IMAGE: 1.0, IMAGE + 1: 2.0}, _11={IMAGE + 1: 0.5})
    scores = score_direction(Bigrams(known), things(2), "text", "image")
    for j in range(2):
        end = known[IMAGE + j, EOS]
        assert scores.alone[j] == pytest.approx((known[BOS, IMAGE + j] + end).item())
        for i in range(2):
            expected = (known[TEXT + i, IMAGE + j] + end).item()
            assert scores.conditional[i, j] == pytest.approx(expected)
    np.testing.assert_allclose(scores.information, scores.conditional - scores.alone[None])


def test_a_likely_target_wins_by_likelihood_and_not_by_information():
    # Image 0 is likely after anything; each text makes its own image somewhat likelier.
    rows = {f"_{TEXT + i}": {IMAGE: 5.0, IMAGE + i: 6.0 if i == 0 else 2.0} for i in range(4)}
    model = Bigrams(table(_0={IMAGE: 5.0}, **rows))
    rates = retrieve(score_direction(model, things(4), "text", "image"), [2, 4, 5])
    assert list(rates) == [2, 4]  # five do not fit
    assert rates[4]["information"].hits == 4
    assert rates[4]["likelihood"].hits == 1
    assert rates[2]["likelihood"].hits == 3  # all but the one that image 0 competes with


def test_the_group_with_the_likeliest_names_wins():
    # Names 20, 21 are of group a; 22 of group b. Image 1 has one excellent name in a.
    names = {"a": [np.array([20]), np.array([21])], "b": [np.array([22])]}
    rows = {"_30": {22: 1.0}, "_31": {20: 5.0, 22: 1.0}, "_32": {20: 1.5, 21: 1.5, 22: 2.0}}
    images = things(3, names=names)
    items = [Item(item.tokens, group) for item, group in zip(images.items, "baa", strict=True)]
    rate = classify_groups(Bigrams(table(**rows)), Things(items, BOS, EOS, names))
    assert (rate.hits, rate.trials) == (2, 3)  # the last: mean of two at 1.5 is below 2.0
    assert rate.chance == pytest.approx(2 / 3)


def test_retrieval_counts_strictly_highest_scores_in_disjoint_pools():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(23, 23)) + 1.5 * np.eye(23)
    scores[4, 3] = scores[4, 4]  # a tie
    hits = 0
    for question in range(20):  # three are left over
        pool = [q for q in range(20) if q // 5 == question // 5]
        others = [scores[question, q] for q in pool if q != question]
        hits += all(scores[question, question] > other for other in others)
    assert retrieval_rate(scores, 5) == Rate(hits, 20, 0.2)
    assert 0 < hits < 20


def test_the_share_of_the_commonest_class_is_chance():
    scores = np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert classification_rate(scores, np.array([0, 1, 1, 1])) == Rate(2, 4, 0.75)


def test_intervals_cover_as_often_as_they_say():
    def coverage(share, n=100):
        """Probability that the interval of a binomial share holds the true one."""
        total = 0.0
        for k in range(n + 1):
            low, high = Rate(k, n, 0.05).interval
            if low <= share <= high:
                total += math.comb(n, k) * share**k * (1 - share) ** (n - k)
        return total

    found = [coverage(share) for share in np.linspace(0.02, 0.98, 97)]
    assert 0.945 <= np.mean(found) <= 0.96
    assert min(found) >= 0.9
    assert Rate(10, 100, 0.05).interval == pytest.approx((0.0552, 0.1744), abs=1e-4)
    assert Rate(0, 10, 0.1).interval[0] == 0
    assert Rate(10, 10, 0.1).interval[1] == pytest.approx(1)
    assert Rate(12, 100, 0.05).excludes_chance
    assert not Rate(8, 100, 0.05).excludes_chance


@pytest.mark.parametrize("split", ["train", "unseen_concept", "unseen_style"])
def test_things_of_one_question_are_of_different_families(split):
    corpus = EmojiCorpus.load()
    drawings = choose_drawings(corpus.drawings(split), 100, seed=0)
    assert len({drawing.concept.family for drawing in drawings}) == len(drawings) == 100
    assert {drawing.split for drawing in drawings} == {split}
    assert drawings == choose_drawings(corpus.drawings(split), 100, seed=0)
    assert drawings != choose_drawings(corpus.drawings(split), 100, seed=1)
    # Not only the first drawings of each family: all styles occur.
    styles = {drawing.style for drawing in drawings}
    assert len(styles) == 3


def test_names_of_groups_are_of_trained_things_and_not_of_those_asked_about():
    corpus = EmojiCorpus.load()
    drawings = choose_drawings(corpus.drawings("train"), 100, seed=0)
    names = choose_names(corpus, drawings, seed=0)
    assert list(names) == list(corpus.groups)
    assert all(len(chosen) == len(set(chosen)) == 16 for chosen in names.values())
    asked = {drawing.concept.family for drawing in drawings}
    for group, chosen in names.items():
        for name in chosen:
            plain = name.removeprefix("an ").removeprefix("a ")
            named = [c for c in corpus.concepts if plain in (c.name, name)]
            assert any(
                c.group == group and c.split == "train" and c.family not in asked for c in named
            )


def test_plain_likelihoods_are_not_changed_by_the_information():
    scores = Scores(np.zeros((2, 2)), np.array([1.0, 2.0]))
    assert (scores.information == np.array([[-1.0, -2.0], [-1.0, -2.0]])).all()
