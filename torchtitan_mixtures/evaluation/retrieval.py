"""Questions about one thing in two modalities, answered by comparing likelihoods.

*From text to image among 20*: which of 20 images does the model hold for the most likely
continuation of a caption? A plain image is a likelier continuation of anything than a busy one, so
the likelihood without the caption is subtracted: the score is `log p(image | text) - log p(image)`,
the pointwise mutual information. The plain likelihood is reported beside it.

Classification works in the same way: a group's score for an image is the mean, over names of things
in the group, of `p(name | image) / p(name)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torchtitan.protocols import ModelProtocol

from torchtitan_mixtures.data.encoding import Tokens
from torchtitan_mixtures.evaluation.items import Things
from torchtitan_mixtures.evaluation.likelihood import Progress, score_continuations
from torchtitan_mixtures.evaluation.rates import Rate, classification_rate, retrieval_rate


@dataclass(frozen=True)
class Scores:
    """Log-likelihoods of targets after sources, in nats."""

    conditional: NDArray[np.float64]
    """`(sources, targets)`."""

    alone: NDArray[np.float64]
    """Of each target as a document of its own, `(targets,)`."""

    @property
    def information(self) -> NDArray[np.float64]:
        """Pointwise mutual information, `(sources, targets)`."""
        return self.conditional - self.alone


def no_progress(done: int, total: int) -> None:
    """Tell nobody."""


def score_pairs(
    model: ModelProtocol,
    things: Things,
    sources: Sequence[Tokens],
    targets: Sequence[Tokens],
    progress: Progress = no_progress,
) -> Scores:
    """Score the documents `<bos> source target <eos>` of all pairs.

    The likelihood of the end counts too: else the first word of a caption would beat the caption.

    Args:
        model: A decoder over token ids, in evaluation mode.
        things: Says how documents begin and end.
        sources: What comes first.
        targets: Whose likelihood is taken.
        progress: Called with how many sources are done, and how many there are.
    """
    beginnings = [np.concatenate([[things.bos], source]) for source in sources]
    endings = [np.concatenate([target, [things.eos]]) for target in targets]
    alone = score_continuations(model, [np.array([things.bos])], endings)[0]
    return Scores(score_continuations(model, beginnings, endings, progress), alone)


def score_direction(
    model: ModelProtocol,
    things: Things,
    source: str,
    target: str,
    progress: Progress = no_progress,
) -> Scores:
    """Score one modality of every item after another modality of every item."""
    return score_pairs(
        model,
        things,
        [item.tokens[source] for item in things.items],
        [item.tokens[target] for item in things.items],
        progress,
    )


def retrieve(scores: Scores, pools: Sequence[int]) -> dict[int, dict[str, Rate]]:
    """Top-1 rates among pools of each size: by information, and by likelihood alone.

    Pools that the items do not fill are left out.
    """
    return {
        pool: {
            "information": retrieval_rate(scores.information, pool),
            "likelihood": retrieval_rate(scores.conditional, pool),
        }
        for pool in pools
        if pool <= len(scores.alone)
    }


def classify_groups(model: ModelProtocol, things: Things, progress: Progress = no_progress) -> Rate:
    """Tell the group of each item's image by the likelihood of names from every group."""
    groups = list(things.names)
    owners = np.repeat(np.arange(len(groups)), [len(names) for names in things.names.values()])
    images = [item.tokens["image"] for item in things.items]
    names = [name for group in groups for name in things.names[group]]
    information = score_pairs(model, things, images, names, progress).information
    scores = np.stack(
        [
            np.logaddexp.reduce(information[:, owners == group], axis=1)
            - np.log(np.count_nonzero(owners == group))
            for group in range(len(groups))
        ],
        axis=1,
    )  # (items, groups): log of the mean
    labels = np.array([groups.index(item.group) for item in things.items])
    return classification_rate(scores, labels)
