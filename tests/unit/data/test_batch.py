"""The batch contract: good batches pass, and every violation is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchtitan_mixtures.data.batch import check_batch

RANGES = [(0, 10), (10, 14)]


def good_batch() -> tuple[dict[str, Tensor], Tensor]:
    tokens = torch.tensor([[1, 5, 3, 10, 11, 4, 2, 0], [1, 3, 12, 13, 4, 2, 0, 0]])
    is_image = tokens >= 10
    batch = {
        "input": tokens,
        "modality_masks": torch.stack([~is_image, is_image], 1),
        "document_ids": torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 1, 1]]),
        "image_ids": torch.where(is_image, 0, -1),
        "positions": torch.arange(8).expand(2, 8),
        "loss_weights": torch.ones(2, 8),
    }
    labels = torch.full((2, 8), -100)
    labels[:, :-1] = tokens[:, 1:]
    return batch, labels


def test_good_batch_passes() -> None:
    batch, labels = good_batch()
    check_batch(batch, labels, RANGES)
    del batch["loss_weights"]
    check_batch(batch, labels, RANGES)


@pytest.mark.parametrize(
    "key", ["input", "modality_masks", "document_ids", "image_ids", "positions"]
)
def test_missing_key_is_named(key: str) -> None:
    batch, labels = good_batch()
    del batch[key]
    with pytest.raises(ValueError, match=f"'{key}' is missing"):
        check_batch(batch, labels, RANGES)


@pytest.mark.parametrize("key", ["modality_masks", "document_ids", "image_ids", "loss_weights"])
def test_wrong_shape_and_dtype_are_shown(key: str) -> None:
    batch, labels = good_batch()
    batch[key] = batch[key][..., :-1]
    with pytest.raises(ValueError, match=rf"'{key}' must be \(2, .*8\).*found \(2, .*7\)"):
        check_batch(batch, labels, RANGES)
    batch, labels = good_batch()
    batch[key] = batch[key].to(torch.int32)
    with pytest.raises(ValueError, match=f"'{key}' must be .*found .* int32"):
        check_batch(batch, labels, RANGES)


def _set(key: str, where: tuple[int, ...], value: float) -> tuple[dict[str, Tensor], Tensor]:
    batch, labels = good_batch()
    tensors = {**batch, "labels": labels}
    tensors[key] = tensors[key].clone()
    tensors[key][where] = value
    labels = tensors.pop("labels")
    return tensors, labels


@pytest.mark.parametrize(
    ("key", "where", "value", "message"),
    [
        ("modality_masks", (0, 0, 3), True, "exactly one modality, found 2 at row 0, position 3"),
        ("modality_masks", (1, 0, 1), False, "exactly one modality, found 0 at row 1, position 1"),
        ("input", (0, 1), 12, r"'input' must lie in \[0, 10\) where the modality is 0, found 12"),
        ("input", (0, 3), 2, r"'input' must lie in \[10, 14\) where the modality is 1, found 2"),
        ("labels", (0, 1), 14, r"'labels' must lie in \[0, 14\) or be -100, found 14"),
        ("labels", (1, 7), -1, "'labels' must .* found -1 at row 1, position 7"),
        ("document_ids", (0, 4), 1, "'document_ids' must not decrease"),
        ("document_ids", (0, 0), -1, "'document_ids' must be >= 0"),
        ("image_ids", (0, 0), 0, "one unbroken run per image, found image 0 of row 0 in 2 runs"),
        ("image_ids", (0, 2), 0, "'image_ids' must be -1 at text positions, found 0 at row 0"),
        ("image_ids", (0, 0), -2, "'image_ids' must be -1"),
        ("positions", (0, 0), -1, "'positions' must be >= 0"),
        ("loss_weights", (0, 0), float("nan"), "'loss_weights' must be finite"),
    ],
)
def test_violation_is_named(key: str, where: tuple[int, ...], value: float, message: str) -> None:
    batch, labels = _set(key, where, value)
    with pytest.raises(ValueError, match=message):
        check_batch(batch, labels, RANGES)


def test_image_across_documents_is_named() -> None:
    batch, labels = good_batch()
    batch["document_ids"][0, 4:] = 1
    with pytest.raises(ValueError, match="keep an image inside one document"):
        check_batch(batch, labels, RANGES)


def test_input_must_be_two_dimensional() -> None:
    with pytest.raises(ValueError, match=r"'input' must be \(batch, seq\)"):
        check_batch({"input": torch.zeros(3, dtype=torch.int64)}, torch.zeros(3), RANGES)
