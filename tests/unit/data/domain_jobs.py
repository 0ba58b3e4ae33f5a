"""Jobs over images with domains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from tests.unit.data.image_jobs import make_job, use_fake_model
from tests.unit.data.prompt_jobs import use_prompted_model
from torchtitan_mixtures.data import domain_column, image_datasets, prompt_datasets, prompt_loader
from torchtitan_mixtures.data.domains import open_domains
from torchtitan_mixtures.data.image_data import open_images
from torchtitan_mixtures.data.prompt_loader import open_prompted_images

TRAIN, VALIDATION = "multimodal.train_split", "multimodal.validation_splits"


def use_new_process(tmp_path: Path, monkeypatch: Any) -> None:
    """Fake models of either kind, and nothing left of what was opened before."""
    use_fake_model(monkeypatch)
    use_prompted_model(monkeypatch)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    image_datasets._class_dataset.cache_clear()
    prompt_datasets._open_captioned.cache_clear()
    prompt_loader._latent_index.cache_clear()
    domain_column._open_domain_column.cache_clear()


def emoji_job(**values: Any) -> Any:
    """The smallest split of the embedded corpus: 53 noto, 35 noto_v1 and 58 fluent."""
    defaults = {"train_split": "unseen_style", "image_size": 16, "domains": "style"}
    return make_job(**{**defaults, **values})


def domains_of(job: Any, split: str = "train", **options: Any) -> list[int]:
    """Domain of each image of a split, as training has it."""
    open_split = open_prompted_images if options else open_images
    domains = open_domains(job, TRAIN, split, open_split(job, TRAIN, split), **options)
    assert domains is not None
    return domains.labels.tolist()
