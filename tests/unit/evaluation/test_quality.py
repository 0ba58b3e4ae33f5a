"""The Frechet distance, and the classifier whose features it compares."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from torchtitan_mixtures.data.emoji import STYLES, EmojiCorpus
from torchtitan_mixtures.evaluation import quality
from torchtitan_mixtures.evaluation.quality import (
    FILE_NAME,
    EmojiClassifier,
    Recipe,
    features_of,
    frechet_distance,
    gaussian_distance,
    load_or_train,
    make_reference,
    real_pictures,
    reference_rows,
    shift,
    to_images,
    train,
)

QUICK = Recipe(steps=3, batch_size=16)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def few_drawings(monkeypatch):
    """A corpus of the first 60 drawings of each split."""
    whole = EmojiCorpus.load()
    small = SimpleNamespace(
        groups=whole.groups,
        images=whole.images,
        drawings=lambda split: whole.drawings(split)[:60],
    )
    monkeypatch.setattr(EmojiCorpus, "load", lambda: small)


@pytest.fixture(scope="module")
def classifier():
    """One that has learned next to nothing: enough to be asked."""
    corpus = EmojiCorpus.load()
    model = EmojiClassifier(len(corpus.groups), len(STYLES))
    train(model, real_pictures(corpus.drawings("unseen_style")), QUICK)
    return model


def test_the_distance_of_gaussians_along_the_axes_is_that_of_their_deviations():
    first, second = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 1.0, 2.0])
    mean, other = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
    found = gaussian_distance(
        mean.double(), first.diag().double(), other.double(), second.diag().double()
    )
    assert found == pytest.approx((1 + 4) + (1 - 3) ** 2 + (2 - 1) ** 2 + 2)


def test_the_distance_takes_the_root_of_the_product_of_covariances():
    roots = draw(4, 4), draw(4, 4, seed=1)
    first, second = (root @ root.T for root in roots)
    # The product is not symmetric, but has positive eigenvalues.
    eigenvalues = np.linalg.eigvals((first @ second).numpy())
    assert np.abs(eigenvalues.imag).max() < 1e-9
    expected = first.trace() + second.trace() - 2 * np.sqrt(eigenvalues.real).sum()
    zero = torch.zeros(4, dtype=torch.float64)
    assert gaussian_distance(zero, first, zero, second) == pytest.approx(float(expected))
    assert gaussian_distance(zero, second, zero, first) == pytest.approx(float(expected))


def test_equal_sets_have_no_distance_and_a_shift_its_square():
    features = draw(200, 6) @ draw(6, 6, seed=1)
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-9)
    found = [frechet_distance(features, features + by) for by in (0.0, 0.1, 1.0, 3.0)]
    assert found == pytest.approx([6 * by**2 for by in (0.0, 0.1, 1.0, 3.0)], abs=1e-8)


def test_fewer_images_than_features_still_have_a_distance():
    few = draw(5, 16)
    assert math.isfinite(frechet_distance(few, draw(300, 16, seed=1)))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_a_shift_moves_each_image_alone_and_fills_with_white():
    images = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    moved = shift(images, 2, torch.Generator().manual_seed(1))
    corners = torch.randint(0, 5, (2, 2), generator=torch.Generator().manual_seed(1)).tolist()
    for image, before, (top, left) in zip(moved, images, corners, strict=True):
        for row in range(8):
            for column in range(8):
                source = row + top - 2, column + left - 2
                is_inside = all(0 <= place < 8 for place in source)
                expected = before[:, source[0], source[1]] if is_inside else torch.ones(3)
                assert (image[:, row, column] == expected).all()


def test_training_is_the_same_again_and_leaves_the_global_generator_alone(classifier):
    corpus = EmojiCorpus.load()
    again = EmojiClassifier(len(corpus.groups), len(STYLES))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(again, real_pictures(corpus.drawings("unseen_style")), QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_classifier_learns_what_it_is_shown():
    few = real_pictures(EmojiCorpus.load().drawings("train")[::200])
    model = EmojiClassifier(8, 3)
    train(model, few, Recipe(steps=40, batch_size=len(few.pictures), max_shift=0))
    found = quality.accuracy(model, few)
    assert found["group"] > 0.9 and found["style"] > 0.9


def test_features_are_64_and_decide_the_answer_alone(classifier):
    pictures = EmojiCorpus.load().images(EmojiCorpus.load().drawings("unseen_style")[:3])
    features = features_of(classifier, pictures)
    assert features.shape == (3, 64) and features.dtype == torch.float64
    group, style = classifier(to_images(pictures))
    assert torch.allclose(classifier.group(features.float()), group)
    assert torch.allclose(classifier.style(features.float()), style)


def test_a_folder_keeps_the_classifier_of_its_recipe(tmp_path, monkeypatch, few_drawings):
    folder = tmp_path / "new"
    said = []
    first = load_or_train(folder, QUICK, said.append)
    assert [path.name for path in folder.iterdir()] == [FILE_NAME]
    with monkeypatch.context() as patched:
        patched.setattr(quality, "train", None)  # calling it would fail
        again = load_or_train(folder, QUICK, said.append)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert not again.training and not said
    trained = []
    monkeypatch.setattr(quality, "train", lambda *arguments: trained.append(arguments[2]))
    other = Recipe(steps=2, batch_size=16)
    load_or_train(folder, other)
    (folder / FILE_NAME).write_bytes(b"cut off")
    load_or_train(folder, other, said.append)
    assert trained == [other, other]
    assert len(said) == 1 and "made anew" in said[0]


def test_the_reference_leaves_out_what_samples_are_compared_for(classifier, few_drawings):
    reference = make_reference(classifier, 10, seed=3)
    drawings = EmojiCorpus.load().drawings("train")
    kept_out = torch.randperm(len(drawings), generator=torch.Generator().manual_seed(3))[:10]
    expected = real_pictures([drawings[number] for number in kept_out.tolist()])
    assert (reference.kept_out.pictures == expected.pictures).all()
    assert (reference.kept_out.groups == expected.groups).all()
    assert len(reference.features) == len(drawings) - 10
    rows = reference_rows(classifier, reference)
    assert [row["images"] for row in rows.values()] == [10, 60, 10, 10]
    distances = [row["frechet"] for row in rows.values()]
    assert max(distances[:3]) < distances[3]  # even hardly trained features tell noise
