"""Counts the images of loaders, and stops a run whose images are broken."""

from __future__ import annotations

from torchtitan_mixtures.data.image_batches import CollatedDraws
from torchtitan_mixtures.data.samples import SampleJudge
from torchtitan_mixtures.job_config import Multimodal


class BrokenImageCounter:
    """Counts images and stops the run if too many are broken; see `SampleJudge`.

    Each image counts once, however many epochs there are. Each rank judges those that it found to
    be broken, from the start or the resumption of the run on: among those that it has read, and
    from the end of the first epoch on among all, which all ranks together have read by then.

    Args:
        config: The `[multimodal]` section.
        split: Name of the split, for messages.
        num_images: Images of an epoch, of all ranks together.
    """

    def __init__(self, config: Multimodal, split: str, num_images: int) -> None:
        self._judge = SampleJudge(config.max_bad_fraction, f'split "{split}"')
        self._counts = self._judge.new_counts()
        self._num_images = num_images
        self._broken: set[str] = set()  # keys

    def add(self, batch: CollatedDraws) -> None:
        """Count the images of a batch."""
        self._counts.good_in_epoch += batch.num_read
        self._see(batch.num_read)
        for key, reason in batch.broken:
            if key not in self._broken:
                self._broken.add(key)
                self._see(1)
                self._judge.count_bad(self._counts, key, ValueError(reason))

    def end_epoch(self) -> None:
        """Judge a whole epoch, however few images it has."""
        if not self._counts.seen:  # a rank for which no image was left
            return
        self._counts.seen = self._num_images
        self._judge.end_epoch(self._counts)

    def _see(self, count: int) -> None:
        # Images that stand in for broken ones are read twice.
        self._counts.seen = min(self._counts.seen + count, self._num_images)
