"""Small checkpoints for tests of tools that read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torchtitan.protocols.train_spec import get_train_spec

from tests.jobs import TRAIN_CONFIGS, debug_job, load_job
from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.models.mixdiff import MixtureOfDiffusers
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


def save_tiny_mixdiff(run: Path, *overrides: str, flavor: str = "debugmodel") -> Any:
    """Save a mixture of diffusers of random weights as a checkpoint of `run`; return the model."""
    config = TRAIN_CONFIGS / "mixdiff" / f"{flavor}.toml"
    job = load_job(config, "--ema.decay=0", "--sampling.interval=0", *overrides)
    args: Any = get_train_spec("mixdiff").model_args[job.model.flavor]
    args.update_from_config(job)
    model = MixtureOfDiffusers(args)
    model.init_weights()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():  # nothing is zero, and router and experts have opinions
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
        model.router.head.weight.mul_(20)
    folder = run / "checkpoint" / "step-20"
    checkpoint_config.write(folder, job, args)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dcp.save({**weights, "train_state": {"step": 20}}, checkpoint_id=folder, no_dist=True)
    return model.eval()
