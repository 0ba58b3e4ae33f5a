"""Domains: parts that images are divided into, one for each expert of a mixture of diffusers.

What divides them says `multimodal.domains`: `style` (of emoji), `class` (an image's class), or a
JSON file (`domain_file.py`), which `scripts/prepare_data.py cluster` or the user made. With
`multimodal.domain_column` a column of a data set says it.

Experts are called what domains are, and so are modules, so names have letters, digits, `_` and `-`
alone: other characters in classes and columns become one `_` ("Food & Drink": "Food_Drink").
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.assumed_images import assumed_images
from torchtitan_mixtures.data.domain_file import CLUSTER_COMMAND, KINDS, read_domain_file
from torchtitan_mixtures.data.emoji import STYLES, EmojiCorpus
from torchtitan_mixtures.data.image_data import image_spec
from torchtitan_mixtures.data.image_sets import ImageSet
from torchtitan_mixtures.data.loader import multimodal_section
from torchtitan_mixtures.data.sources import epoch_order

if TYPE_CHECKING:
    from torchtitan_mixtures.data.prompt_sets import PromptedSet
    from torchtitan_mixtures.job_config import Multimodal

DOMAIN_KEYS = ("domains", "domain_column", "train_domains", "domain_shares")
"""Keys of `[multimodal]` about domains."""


class Domains:
    """The domain of each image of a split, and which images are taken.

    Args:
        names: Of all domains.
        labels: Number of the domain of each image, `(images,)` int64.
        taken: Numbers of the domains whose images are taken.
        shares: Share of the samples of an epoch that each of `taken` has; none: as many as images.

    Attributes:
        names: Of all domains.
        labels: Number of the domain of each image, `(images,)` int64.
        chosen: The images that are taken, `(chosen,)` int64, ascending.
        counts: With shares, samples of an epoch that each of `taken` has.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        labels: NDArray[np.int64],
        taken: Sequence[int],
        shares: Sequence[float] = (),
    ) -> None:
        self.names = names
        self.labels = labels
        self._members = {number: np.flatnonzero(labels == number) for number in taken}
        self.chosen = np.sort(np.concatenate(list(self._members.values())))
        self.counts = _apportion(shares, len(self.chosen)) if shares else ()

    def members_like(self, index: int) -> NDArray[np.int64]:
        """The images of the domain of a chosen one, ascending."""
        return self._members[int(self.labels[index])]

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The image of each sample of an epoch, `(chosen,)` int64.

        With shares each domain has a line of its own, in which all its images stand once, in a new
        order, then all once more, and so on; an epoch takes the next of it. So images of a domain
        are used equally often, up to one, whatever its share.
        """
        if not self.counts:
            return self.chosen[epoch_order(seed, epoch, len(self.chosen))]
        parts = [
            _cut_line(members, epoch * count, count, seed, f"domain {self.names[number]}")
            for (number, members), count in zip(self._members.items(), self.counts, strict=True)
        ]
        mixed = epoch_order(seed, epoch, len(self.chosen), "domains")
        return np.concatenate(parts)[mixed]


def _cut_line(
    members: NDArray[np.int64], start: int, count: int, seed: int, name: str
) -> NDArray[np.int64]:
    """So many places, from one on, of the line in which all members stand again and again."""
    first, last = start // len(members), (start + count - 1) // len(members)
    rounds = [members[epoch_order(seed, n, len(members), name)] for n in range(first, last + 1)]
    begin = start - first * len(members)
    return np.concatenate(rounds)[begin : begin + count]


def _apportion(shares: Sequence[float], total: int) -> tuple[int, ...]:
    """Whole numbers that add up to `total`, each within one of its share (largest remainders)."""
    quotas = np.array(shares, np.float64) / math.fsum(shares) * total
    counts = np.floor(quotas).astype(np.int64)
    by_remainder = np.argsort(counts - quotas, kind="stable")
    counts[by_remainder[: total - int(counts.sum())]] += 1
    return tuple(counts.tolist())


# --- what a job says ------------------------------------------------------------------------------


def domain_names(job_config: JobConfig) -> tuple[str, ...]:
    """Name the domains of a job's images, without reading any; none if there are no domains.

    With `multimodal.train_domains` those are all that there are, in the order of the data.

    Args:
        job_config: The whole configuration; read is its section multimodal.

    Raises:
        ValueError: Names the key that does not fit, its value and the remedy.
    """
    if (assumed := assumed_images()) is not None:
        return assumed.domains
    names, wanted = _all_names(job_config), multimodal_section(job_config).train_domains
    return tuple(name for name in names if name in wanted) if wanted else names


def _all_names(job_config: JobConfig) -> tuple[str, ...]:
    """Name all domains of the data, whichever a job trains on."""
    config = multimodal_section(job_config)
    if config.domain_column:
        return _column_names(config)
    if not config.domains:
        return ()
    if config.domains == "style":
        if config.source != "emoji":
            raise ValueError(
                f'multimodal.domains = "style": multimodal.source = "{config.source}" has no '
                f'styles, only "emoji" has; set "class" or a file of `{CLUSTER_COMMAND}`.'
            )
        return STYLES
    if config.domains == "class":
        where = 'multimodal.domains = "class": the classes'
        return clean_names(image_spec(job_config).class_names, where)
    return read_domain_file(config.domains).names


def check_domains(job_config: JobConfig, is_prompted: bool) -> None:
    """Check what a job says of domains, as far as no image must be looked at.

    Args:
        job_config: The whole configuration.
        is_prompted: Whether images have prompts instead of classes.

    Raises:
        ValueError: Names the key that does not fit, its value and the remedy.
    """
    config = multimodal_section(job_config)
    if config.domain_column:
        _check_column(config)
    if config.domains == "class" and is_prompted:
        raise ValueError(
            'multimodal.domains = "class": images with prompts have no classes; set "style" (of '
            f"emoji), a file of `{CLUSTER_COMMAND}`, or multimodal.domain_column (of datasets)."
        )
    is_file = config.domains not in ("", *KINDS)
    if is_prompted and is_file and config.source == "emoji" and config.scene_fraction > 0:
        raise ValueError(
            f"multimodal.scene_fraction = {config.scene_fraction}: scenes are composed anew and "
            f'are in no file; with multimodal.domains = "{config.domains}" set it to 0.'
        )
    names = _all_names(job_config)
    for key in ("train_domains", "domain_shares"):
        named = getattr(config, key)
        if named and not names:
            raise ValueError(
                f"multimodal.{key} = {named}: there are no domains; say what they are with "
                "multimodal.domains, or remove the key."
            )
        if unknown := [name for name in named if name not in names]:
            raise ValueError(
                f'multimodal.{key} = {named}: there is no domain "{unknown[0]}"; the domains are '
                f"{', '.join(names)}."
            )
    _check_shares(config)


def _check_column(config: Multimodal) -> None:
    column = f'multimodal.domain_column = "{config.domain_column}"'
    if config.source != "datasets":
        raise ValueError(
            f'{column}: is a column of multimodal.source = "datasets", which is "{config.source}"; '
            "remove the key."
        )
    if config.domains:
        raise ValueError(
            f'{column}: says what the domains are, and so does multimodal.domains = "'
            f'{config.domains}"; remove one of them.'
        )


def _check_shares(config: Multimodal) -> None:
    shares = config.domain_shares
    if not shares:
        return
    key = f"multimodal.domain_shares = {shares}"
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{key}: that of {name!r} must be between 0 and 1.")
        if share > 0 and config.train_domains and name not in config.train_domains:
            raise ValueError(
                f"{key}: {name!r} is not in multimodal.train_domains = {config.train_domains}; "
                "add it there, or give it no share."
            )
    total = math.fsum(shares.values())
    if abs(total - 1) > 1e-6:
        raise ValueError(f"{key}: add up to {total:g}, but must to 1 (what is not named has 0).")
    if len(config.aspect_ratios) > 1:
        raise ValueError(
            f"{key}: cannot be kept with several multimodal.aspect_ratios "
            f"({', '.join(config.aspect_ratios)}), each of which fills whole batches; remove one "
            "of the keys."
        )


def domain_fingerprint(config: Multimodal) -> dict[str, Any]:
    """What samples depend on of domains; nothing if there are none."""
    if not config.domains and not config.domain_column:
        return {}
    values = {f"multimodal.{key}": getattr(config, key) for key in DOMAIN_KEYS}
    values["multimodal.train_domains"] = sorted(config.train_domains)
    if config.domains not in ("", *KINDS):  # a file may have moved; its content says what it is
        content = Path(config.domains).expanduser().read_bytes()
        values["multimodal.domains"] = f"a file of sha256 {hashlib.sha256(content).hexdigest()}"
    return values


# --- the images of a split ------------------------------------------------------------------------


def open_domains(
    job_config: JobConfig,
    key: str,
    split: str,
    images: ImageSet | PromptedSet,
    *,
    is_prompted: bool = False,
) -> Domains | None:
    """Find the domains of a split's images; None if the job has none.

    Args:
        job_config: The whole configuration.
        key: The key that names the split: `multimodal.train_split` means training, whose samples
            have the shares that the job asks for.
        split: The split.
        images: Its images.
        is_prompted: Whether they have prompts instead of classes.

    Raises:
        ValueError: Names the key that does not fit, or the images without a domain.
    """
    config = multimodal_section(job_config)
    check_domains(job_config, is_prompted)
    names = _all_names(job_config)
    if not names:
        return None
    labels = _read_labels(config, key, split, images)
    sizes = np.bincount(labels, minlength=len(names))
    described = ", ".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
    logger.info(f'Domains of split "{split}": {described}')
    is_training = key == "multimodal.train_split"
    shares = config.domain_shares if is_training else {}
    wanted = config.train_domains or names
    if shares:
        wanted = [name for name in wanted if shares.get(name, 0) > 0]
    taken = sorted({names.index(name) for name in wanted})
    empty = [number for number in taken if not sizes[number]]
    explicit = "domain_shares" if shares else "train_domains"
    if (config.train_domains or shares) and (empty if is_training else len(empty) == len(taken)):
        raise ValueError(
            f"multimodal.{explicit} = {getattr(config, explicit)}: {key} "
            f'"{split}" has no images of "{names[empty[0]]}" (it has {described}). '
            + ("Leave it out." if is_training else "Leave out the split.")
        )
    amounts = [shares[names[number]] for number in taken if shares]
    domains = _renumbered(domain_names(job_config), names, labels, taken, amounts)
    if 0 in domains.counts:
        name = names[taken[domains.counts.index(0)]]
        raise ValueError(
            f"multimodal.domain_shares = {shares}: that of {name!r} is less than one of the "
            f"{len(domains.chosen)} samples of an epoch; raise it, or set it to 0."
        )
    return domains


def _renumbered(
    kept: tuple[str, ...],
    names: tuple[str, ...],
    labels: NDArray[np.int64],
    taken: Sequence[int],
    shares: Sequence[float],
) -> Domains:
    """Make domains that are numbered as the job names them; images of others have -1."""
    numbers = np.array([kept.index(name) if name in kept else -1 for name in names], np.int64)
    return Domains(kept, numbers[labels], [int(numbers[number]) for number in taken], shares)


def _read_labels(
    config: Multimodal, key: str, split: str, images: ImageSet | PromptedSet
) -> NDArray[np.int64]:
    """The number of the domain of each image, `(images,)`."""
    if config.domain_column:
        from torchtitan_mixtures.data.domain_column import open_domain_column

        return open_domain_column(config).read(key, split)
    if config.domains == "style":
        drawings = EmojiCorpus.load().drawings(split)
        return np.array([STYLES.index(drawing.style) for drawing in drawings], np.int64)
    if config.domains == "class":
        return images.labels()  # pyrefly: ignore [missing-attribute] (checked: these have classes)
    entries = read_domain_file(config.domains).of_split(key, split)
    keys = [images.relative_key(index) for index in range(len(images))]
    missing = [name for name in keys if name not in entries]
    if missing:
        raise ValueError(
            f'multimodal.domains = "{config.domains}": has no domain for {len(missing)} of '
            f'{len(keys)} images of split "{split}", the first of them "{missing[0]}". Add them, '
            f"or make it again with `{CLUSTER_COMMAND}`."
        )
    if len(entries) > len(keys):
        logger.info(
            f'multimodal.domains = "{config.domains}": {len(entries) - len(keys)} entries of split '
            f'"{split}" are of no image there is'
        )
    return np.array([entries[name] for name in keys], np.int64)


# --- names ----------------------------------------------------------------------------------------


def clean_names(values: Sequence[str], where: str) -> tuple[str, ...]:
    """Make names of domains of others, see above.

    Args:
        values: Any names.
        where: What they are, for the message.

    Raises:
        ValueError: Two of them would have one name, or one none.
    """
    names: dict[str, str] = {}
    for value in values:
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", value).strip("_")
        if not name or name in names:
            why = f"would be called what {names[name]!r} is" if name else "has no letter or digit"
            raise ValueError(
                f"{where} cannot name domains: {value!r} {why} (A-Z, a-z, 0-9, _ and - are kept)."
            )
        names[name] = value
    return tuple(names)


def _column_names(config: Multimodal) -> tuple[str, ...]:
    _check_column(config)
    # Imported late: `datasets` takes a second, which other runs need not pay.
    from torchtitan_mixtures.data.domain_column import open_domain_column

    where = f'multimodal.domain_column = "{config.domain_column}": its values'
    return clean_names(open_domain_column(config).values, where)
