"""Small checkpoints for tests of tools that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from tests.jobs import debug_job
from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.models.mot.args import MoTModelArgs
from torchtitan_mixtures.models.mot.model import MoTTransformer


def save_tiny_mot(run: Path, step: int = 20, *overrides: str, **options: Any) -> MoTTransformer:
    """Save a MoT of random weights as a checkpoint of `run`, as TorchTitan lays it out."""
    settings: dict[str, Any] = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "vocab_size": 2048,
        "max_seq_len": 256,
        "code_vocab_sizes": [1024],
    }
    args = MoTModelArgs(**{**settings, **options})
    torch.manual_seed(0)
    model = MoTTransformer(args)
    model.init_weights()
    folder = run / "checkpoint" / f"step-{step}"
    checkpoint_config.write(folder, debug_job("mot", *overrides), args)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    # Other things are saved beside the weights, not tensors among them.
    dcp.save({**weights, "train_state": {"step": step}}, checkpoint_id=folder, no_dist=True)
    return model
