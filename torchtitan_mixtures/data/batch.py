"""The batch contract of token models: what the data loader yields and the models accept.

A batch is `(input_dict, labels)`. `input_dict["input"]` and the other keys go to the model's
`forward`, so keys and parameters agree. All are tensors with the batch dimension first, so that
pipeline stages can chunk them.

| key              | shape, dtype                           | meaning                          |
|------------------|----------------------------------------|----------------------------------|
| `input`          | `(batch, seq)` int64                   | token ids of all modalities      |
| `modality_masks` | `(batch, modalities, seq)` bool        | exactly one True per position    |
| `document_ids`   | `(batch, seq)` int64                   | 0, 1, ... along the sequence     |
| `image_ids`      | `(batch, seq)` int64                   | number of its image, or -1       |
| `positions`      | `(batch, seq)` int64                   | rotary positions                 |
| `loss_weights`   | `(batch, seq)` float32, may be missing | weight of the target; missing: 1 |
| labels           | `(batch, seq)` int64                   | the next token, -100 = no loss   |

Modality 0 is text; padding and sentinels belong to it. Every token id lies in the range of its own
modality. An image is one unbroken run inside one document. The tower of a position is chosen by its
input token, its loss bucket by its target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position without loss; TorchTitan's own."""


def check_batch(
    input_dict: Mapping[str, Tensor], labels: Tensor, vocab_ranges: Sequence[tuple[int, int]]
) -> None:
    """Check a batch against the contract.

    Args:
        input_dict: What the data loader yields beside the labels.
        labels: The next token or -100, `(batch, seq)`, int64.
        vocab_ranges: Half-open range of token ids of each modality, text first.

    Raises:
        ValueError: Names the key, what is expected and what was found.
    """
    if "input" not in input_dict:
        raise ValueError(f"batch: key 'input' is missing; found {sorted(input_dict)}.")
    tokens = input_dict["input"]
    if tokens.dim() != 2:
        raise ValueError(f"batch: 'input' must be (batch, seq), found {tuple(tokens.shape)}.")
    batch, seq = tokens.shape
    expected = {
        "input": ((batch, seq), torch.int64),
        "modality_masks": ((batch, len(vocab_ranges), seq), torch.bool),
        "document_ids": ((batch, seq), torch.int64),
        "image_ids": ((batch, seq), torch.int64),
        "positions": ((batch, seq), torch.int64),
        "labels": ((batch, seq), torch.int64),
    }
    if "loss_weights" in input_dict:
        expected["loss_weights"] = ((batch, seq), torch.float32)
    found = {**input_dict, "labels": labels}
    for key, (shape, dtype) in expected.items():
        _check_tensor(key, found, shape, dtype)
    _check_tokens(tokens, input_dict["modality_masks"], labels, vocab_ranges)
    _check_spans(input_dict["document_ids"], input_dict["image_ids"])
    is_free_of_text = (input_dict["image_ids"] < 0) | ~input_dict["modality_masks"][:, 0]
    _require(is_free_of_text, "image_ids", "be -1 at text positions", input_dict["image_ids"])
    _require(input_dict["positions"] >= 0, "positions", "be >= 0", input_dict["positions"])
    if "loss_weights" in input_dict:
        weights = input_dict["loss_weights"]
        _require((weights >= 0) & weights.isfinite(), "loss_weights", "be finite, >= 0", weights)


def _check_tensor(
    key: str, found: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    wanted = f"{shape} {str(dtype).removeprefix('torch.')}"
    if key not in found:
        raise ValueError(f"batch: key '{key}' is missing; expected {wanted}.")
    tensor = found[key]
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"batch: '{key}' must be {wanted}, found {tuple(tensor.shape)} "
            f"{str(tensor.dtype).removeprefix('torch.')}."
        )


def _check_tokens(
    tokens: Tensor, masks: Tensor, labels: Tensor, vocab_ranges: Sequence[tuple[int, int]]
) -> None:
    coverage = masks.sum(dim=1)  # (batch, seq)
    _require(coverage == 1, "modality_masks", "be True for exactly one modality", coverage)
    for modality, (start, end) in enumerate(vocab_ranges):
        in_range = (tokens >= start) & (tokens < end)
        allowed = f"lie in [{start}, {end}) where the modality is {modality}"
        _require(in_range | ~masks[:, modality], "input", allowed, tokens)
    end = vocab_ranges[-1][1]
    is_label = ((labels >= 0) & (labels < end)) | (labels == IGNORE_INDEX)
    _require(is_label, "labels", f"lie in [0, {end}) or be {IGNORE_INDEX}", labels)


def _check_spans(document_ids: Tensor, image_ids: Tensor) -> None:
    _require(document_ids >= 0, "document_ids", "be >= 0", document_ids)
    is_ordered = torch.ones_like(document_ids, dtype=torch.bool)
    is_ordered[:, 1:] = document_ids[:, 1:] >= document_ids[:, :-1]
    _require(is_ordered, "document_ids", "not decrease along the sequence", document_ids)
    _require(image_ids >= -1, "image_ids", "be -1 or the number of an image", image_ids)

    is_start = image_ids >= 0  # of a run of one image
    is_start[:, 1:] &= image_ids[:, 1:] != image_ids[:, :-1]
    for row, ids in enumerate(image_ids):
        starts = ids[is_start[row]].tolist()
        if len(starts) != len(set(starts)):
            twice = next(image for image in starts if starts.count(image) > 1)
            raise ValueError(
                f"batch: 'image_ids' must be one unbroken run per image, found image {twice} of "
                f"row {row} in {starts.count(twice)} runs."
            )
    is_split = (image_ids[:, 1:] >= 0) & (image_ids[:, 1:] == image_ids[:, :-1])
    is_split &= document_ids[:, 1:] != document_ids[:, :-1]
    _require(~is_split, "image_ids", "keep an image inside one document", image_ids[:, 1:])


def _require(holds: Tensor, key: str, expectation: str, values: Tensor) -> None:
    """Raise a `ValueError` that shows the first position where `holds`, `(batch, seq)`, fails."""
    if not holds.all():
        row, position = (~holds).nonzero()[0].tolist()
        raise ValueError(
            f"batch: '{key}' must {expectation}, found {values[row, position].item()} "
            f"at row {row}, position {position}."
        )
