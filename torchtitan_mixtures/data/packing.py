"""Packing: sequences of fixed length hold whole documents; what is left over is padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from torchtitan_mixtures.data.encoding import Tokens

BUFFER_DOCUMENTS = 32
"""Documents from which `best_fit` chooses, more if they do not make one and a half sequences."""


class Packer:
    """Fills sequences with documents, the oldest waiting one always first.

    `best_fit` chooses the others out of a small buffer: the subset whose lengths add up nearest to
    what is left (exactly, if any subset does), preferring older ones. None waits for longer than
    there are documents in the buffer. `greedy` takes the next ones in order until one does not fit.

    Args:
        seq_len: Length of a sequence.
        method: How to choose.
    """

    def __init__(self, seq_len: int, method: Literal["best_fit", "greedy"] = "best_fit") -> None:
        self._seq_len = seq_len
        self._is_greedy = method == "greedy"
        self._buffer: list[Tokens] = []  # oldest first
        self._sources: list[int] = []  # of those
        self._num_waiting = 0  # tokens in the buffer

    def pack(
        self, documents: Iterator[list[Tokens]], source_of_last: Callable[[], int] = lambda: 0
    ) -> Iterator[list[Tokens]]:
        """Yield sequences as lists of documents, at most `seq_len` tokens in all.

        The state between two sequences, together with the state of the source, is all it takes to
        continue.

        Args:
            documents: Each as the pieces that fit a sequence, see `DocumentEncoder.encode`.
            source_of_last: Number of the source that the latest of them is of.
        """
        while self._fill(documents, source_of_last) or self._buffer:
            chosen = self._choose()
            sequence = [self._buffer[i] for i in chosen]
            taken = set(chosen)
            left = [i for i in range(len(self._buffer)) if i not in taken]
            self._buffer = [self._buffer[i] for i in left]
            self._sources = [self._sources[i] for i in left]
            self._num_waiting -= sum(len(tokens) for tokens in sequence)
            yield sequence

    def state_dict(self) -> dict[str, Any]:
        """The documents in the buffer, as arrays: a state is made for every sequence."""
        return {"buffer": list(self._buffer), "sources": list(self._sources)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state, of arrays or of the lists that JSON makes of them."""
        self._buffer = [np.asarray(tokens, np.int64) for tokens in state["buffer"]]
        self._sources = list(state["sources"])
        self._num_waiting = sum(len(tokens) for tokens in self._buffer)

    def _fill(self, documents: Iterator[list[Tokens]], source_of_last: Callable[[], int]) -> bool:
        """Refill the buffer; False once there are no more documents."""
        while self._wants_more():
            pieces = next(documents, None)
            if pieces is None:
                return False
            self._buffer.extend(pieces)
            self._sources.extend([source_of_last()] * len(pieces))
            self._num_waiting += sum(len(tokens) for tokens in pieces)
        return True

    def _wants_more(self) -> bool:
        if self._is_greedy:  # up to the first document that does not fit
            return self._num_waiting <= self._seq_len
        return len(self._buffer) < BUFFER_DOCUMENTS or self._num_waiting < 1.5 * self._seq_len

    def _choose(self) -> list[int]:
        lengths = [len(tokens) for tokens in self._buffer]
        if not self._is_greedy:
            return choose_documents(lengths, self._seq_len)
        ends = np.cumsum(lengths)
        return list(range(int(np.searchsorted(ends, self._seq_len, side="right"))))


def choose_documents(lengths: Sequence[int], space: int) -> list[int]:
    """Choose the documents of one sequence.

    Args:
        lengths: Lengths of the waiting documents, oldest first, each at most `space`.
        space: Length of the sequence.

    Returns:
        Ascending indices, 0 among them, whose lengths add up to the most that `space` admits.
    """
    # Bit t of a reach says that some subset has t tokens: sets of sums as big integers, for which
    # adding a document is one shift.
    within = (1 << (space + 1)) - 1
    reaches = [1 << lengths[0]]
    for length in lengths[:0:-1]:  # newest to second oldest
        reaches.append((reaches[-1] | reaches[-1] << length) & within)
    total = reaches[-1].bit_length() - 1
    chosen = [0]
    for index in range(1, len(lengths)):
        without = reaches[len(lengths) - 1 - index]
        rest = total - lengths[index]
        if rest >= 0 and without >> rest & 1:
            chosen.append(index)
            total = rest
    return chosen
