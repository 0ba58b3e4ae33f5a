"""A microbatch as a family's loader would yield it, in shape if not in content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtitan_mixtures.data.assumed_images import AssumedImages
from torchtitan_mixtures.data.model_flavor import model_flavor
from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.data.vae import read_vae_config
from torchtitan_mixtures.job_config import MixtureJobConfig

Batch = tuple[dict[str, Tensor], Tensor]


def images_to_assume(job_config: MixtureJobConfig) -> AssumedImages | None:
    """Say what to take the images of a job for, if they are not on this machine.

    Returns:
        The flavour's own channels and classes at `multimodal.image_size`, or None: the data is
        there, or the model is one of tokens, whose shapes do not depend on it.
    """
    data, args = job_config.multimodal, model_flavor(job_config)
    if data.source == "emoji" or hasattr(args, "modality_names"):
        return None
    if data.path and Path(data.path).expanduser().exists():
        return None
    channels = read_vae_config(data.vae).channels if data.vae else args.in_channels
    names = tuple(map(str, range(args.num_experts))) if hasattr(args, "expert_args") else ()
    return AssumedImages(channels, data.image_size, getattr(args, "num_classes", 0), names)


def make_batch(job_config: MixtureJobConfig, model_args: Any) -> Batch:
    """Make a microbatch of one data-parallel rank.

    Args:
        job_config: The job's configuration.
        model_args: The flavour's arguments, complete.

    Returns:
        `(input_dict, labels)`: see `data/batch.py`, `data/image_batches.py` and
        `data/prompt_batches.py`; what frozen encoders make of images and prompts is there already.
    """
    rows = job_config.training.local_batch_size
    if hasattr(model_args, "modality_names"):
        return _tokens(rows, job_config.training.seq_len, model_args.n_modalities)
    size = model_args.image_size
    inputs: dict[str, Tensor] = {"input": torch.zeros(rows, model_args.in_channels, size, size)}
    inputs["sample_index"] = torch.arange(rows)
    if getattr(model_args, "is_classifier", False):
        inputs["class_labels"] = torch.zeros(rows, dtype=torch.int64)
        return inputs, torch.zeros(rows, 1, dtype=torch.int64)
    if getattr(model_args, "is_prompted", False):
        for spec in model_args.prompts:
            inputs |= _prompt(spec, rows)
    else:
        inputs["class_labels"] = torch.zeros(rows, dtype=torch.int64)
    if hasattr(model_args, "expert_args"):
        inputs["domain_labels"] = torch.arange(rows) % model_args.num_experts
    return inputs, torch.zeros(rows, model_args.num_tokens, dtype=torch.int64)


def _tokens(rows: int, seq: int, modalities: int) -> Batch:
    positions = torch.arange(seq).expand(rows, seq)
    modality = torch.arange(modalities)[None, :, None]
    zeros = torch.zeros(rows, seq, dtype=torch.int64)
    inputs = {  # each with a storage of its own, as the loader's
        "input": zeros.clone(),
        "modality_masks": positions[:, None] % modalities == modality,
        "document_ids": zeros.clone(),
        "image_ids": zeros - 1,
        "positions": positions.clone(),
    }
    return inputs, zeros


def _prompt(spec: PromptSpec, rows: int) -> dict[str, Tensor]:
    key = f"prompt_{spec.name}"
    if spec.kind == "tokens":
        return {key: torch.zeros(rows, spec.length, dtype=torch.int64)}
    inputs = {key: torch.zeros(rows, spec.length, spec.dim)}
    if spec.pooled_dim:
        inputs[f"{key}_pooled"] = torch.zeros(rows, spec.pooled_dim)
    return inputs
