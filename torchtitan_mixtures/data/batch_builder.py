"""Batches: packed sequences become the arrays of the contract in `data/batch.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from torchtitan_mixtures.data.batch import IGNORE_INDEX
from torchtitan_mixtures.data.encoding import Modalities, Tokens


def number_runs(is_image: NDArray[np.bool_]) -> Tokens:
    """Number the images of each sequence: runs of codes, which sentinels keep apart.

    Args:
        is_image: Whether a token is a code of an image, `(batch, seq)`.

    Returns:
        `(batch, seq)` int64, from 0 on in each sequence, -1 outside images.
    """
    is_start = is_image.copy()
    is_start[:, 1:] &= ~is_image[:, :-1]
    return np.where(is_image, is_start.cumsum(axis=1) - 1, -1)


class BatchBuilder:
    """Turns packed sequences into the arrays of the batch contract (`data/batch.py`).

    Args:
        modalities: Names and token ranges.
        weights: Loss weight of targets of each modality; a weight of 0 makes labels -100.
        pad: Id of the padding token.
        seq_len: Length of a sequence.
        resets_positions: Count positions from 0 in every document.
    """

    def __init__(
        self,
        modalities: Modalities,
        weights: Sequence[float],
        pad: int,
        seq_len: int,
        resets_positions: bool,
    ) -> None:
        if not any(weights):
            keys = ", ".join(f"multimodal.{name}_weight" for name in modalities.names)
            raise ValueError(
                f"{keys} are all 0: nothing would be supervised. Give at least one a positive "
                "weight."
            )
        sizes = [end - start for start, end in modalities.vocab_ranges]
        self._modality_of_token = np.repeat(np.arange(len(sizes), dtype=np.int8), sizes)
        self._num_modalities = len(sizes)
        names = modalities.names
        self._image = names.index("image") if "image" in names else -1  # no token's modality
        self._weights = np.array(weights, np.float32)
        self._has_unsupervised = 0 in weights
        self._has_weights = any(weight not in (0, 1) for weight in weights)
        self._pad = pad
        self.seq_len = seq_len
        self._resets_positions = resets_positions

    def build(self, sequences: Sequence[Sequence[Tokens]]) -> tuple[dict[str, NDArray], Tokens]:
        """Build a batch.

        Args:
            sequences: Documents of each sequence, in which `~id` is a token without loss; none at
                all makes a sequence of padding, without loss.

        Returns:
            Arrays of `input_dict` and the labels. Padding is one more document, of text.
        """
        tokens = np.full((len(sequences), self.seq_len), self._pad, np.int64)
        document_ids = np.empty_like(tokens)
        is_padding = np.zeros(tokens.shape, bool)
        for row, sequence in enumerate(sequences):
            lengths = [len(document) for document in sequence]
            used = sum(lengths)
            if sequence:
                np.concatenate(sequence, out=tokens[row, :used])
            is_padding[row, used:] = True
            lengths.append(self.seq_len - used)
            document_ids[row] = np.repeat(np.arange(len(lengths)), lengths)

        has_no_loss = tokens < 0
        np.invert(tokens, out=tokens, where=has_no_loss)
        is_last = np.ones(tokens.shape, bool)  # of its document: nothing follows, no loss
        is_last[:, :-1] = document_ids[:, 1:] != document_ids[:, :-1]
        labels = np.full_like(tokens, IGNORE_INDEX)
        labels[:, :-1] = np.where(has_no_loss[:, 1:], IGNORE_INDEX, tokens[:, 1:])
        labels[is_last | is_padding] = IGNORE_INDEX

        modality = self._modality_of_token[tokens]  # (batch, seq)
        masks = modality[:, None] == np.arange(self._num_modalities)[:, None]
        arrays = {
            "input": tokens,
            "modality_masks": masks,
            "document_ids": document_ids,
            "image_ids": number_runs(modality == self._image),
            "positions": self._positions(is_last),
        }
        if self._has_unsupervised or self._has_weights:
            weights = self._weights[self._modality_of_token[np.maximum(labels, 0)]]
            labels[weights == 0] = IGNORE_INDEX
            if self._has_weights:
                weights[labels == IGNORE_INDEX] = 0
                arrays["loss_weights"] = weights
        return arrays, labels

    def _positions(self, is_last: NDArray[np.bool_]) -> Tokens:
        positions = np.broadcast_to(np.arange(self.seq_len), is_last.shape)
        if not self._resets_positions:
            return positions.copy()
        starts = np.zeros_like(positions)
        starts[:, 1:] = np.where(is_last[:, :-1], positions[:, 1:], 0)
        return positions - np.maximum.accumulate(starts, axis=1)
