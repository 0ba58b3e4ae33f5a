"""Jobs over images with prompts, data sets with captions, and ways to compare batches."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.unit.data.image_jobs import PATCH_SIZE, make_job, write_picture
from torchtitan_mixtures.data.prompt_loader import build_prompt_dataloader

PROMPT_LENGTH = 40
SPEECH_LENGTH = 90
Batch = tuple[dict[str, Tensor], Tensor]


def use_prompted_model(monkeypatch: Any, *prompt_names: str, **values: Any) -> None:
    """Let the loaders find a model of patches of `PATCH_SIZE` with these prompts."""
    defaults = {
        "patch_size": PATCH_SIZE,
        "prompt_length": PROMPT_LENGTH,
        "speech_length": SPEECH_LENGTH,
    }
    args = SimpleNamespace(
        is_prompted=True, prompt_names=prompt_names or ("text",), **{**defaults, **values}
    )
    spec = SimpleNamespace(model_args={"debugmodel": args})
    monkeypatch.setattr("torchtitan_mixtures.data.model_flavor.get_train_spec", lambda name: spec)


def emoji_job(**values: Any) -> Any:
    """Over the smallest split of the embedded corpus."""
    return make_job(**{"train_split": "unseen_style", "image_size": 16, **values})


def captioned_job(path: Path | str, global_batch_size: int = -1, **values: Any) -> Any:
    """Over a data set with captions."""
    defaults = {"source": "datasets", "path": str(path), "image_size": 8, "max_bad_fraction": 0.5}
    job = make_job(**{**defaults, "validation_splits": ["validation"], **values})
    job.training.global_batch_size = global_batch_size
    return job


def write_captioned(root: Path, split: str, sizes: list[tuple[int, int]], lists=False) -> Path:
    """A folder of pictures of these widths and heights with a `metadata.jsonl`."""
    lines = []
    for number, (width, height) in enumerate(sizes):
        write_picture(root / split / f"{number:03}.png", number, width, height)
        caption: Any = f"picture {number} of {split}"
        if lists:
            caption = [f"{caption}, text {i}" for i in range(number % 3 + 1)]
        lines.append(json.dumps({"file_name": f"{number:03}.png", "caption": caption}))
    (root / split / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def take(job: Any, count: int, rank: int = 0, ranks: int = 1, state: Any = None) -> list[Batch]:
    """The first batches of a rank."""
    loader = build_prompt_dataloader(ranks, rank, None, job)
    loader.load_state_dict(state or {})
    return list(itertools.islice(loader, count))


def by_number(batches: list[Batch]) -> dict[int, tuple[bytes, ...]]:
    """Everything of each sample, by its number."""
    samples = {}
    for inputs, _ in batches:
        keys = sorted(inputs.keys() - {"sample_index"})
        for row, number in enumerate(inputs["sample_index"].tolist()):
            assert number not in samples
            samples[number] = tuple(inputs[key][row].numpy().tobytes() for key in keys)
    return samples


def assert_same_batches(left: list[Batch], right: list[Batch]) -> None:
    """To the bit."""
    assert len(left) == len(right)
    for (inputs, labels), (others, other_labels) in zip(left, right, strict=True):
        assert inputs.keys() == others.keys()
        assert all(torch.equal(inputs[key], others[key]) for key in inputs)
        assert torch.equal(labels, other_labels)


def write_vae_config(folder: Path) -> str:
    """All that loaders read of a VAE, here one of factor 2 with 4 channels."""
    folder.mkdir()
    config = {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [8, 8]}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
