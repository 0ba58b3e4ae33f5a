"""Checkpoints that conversions write: weights alone, to be loaded with `initial_load_path`."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torchtitan.protocols import BaseModelArgs

from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.job_config import MixtureJobConfig


def check_out(out: Path) -> None:
    """Raise ValueError if a folder that is to be written has something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: exists and is not an empty folder; name another one.")


def write_weights(
    out: Path, job_config: MixtureJobConfig, model_args: BaseModelArgs, state: dict[str, Tensor]
) -> None:
    """Write a checkpoint of weights, in one process.

    Args:
        out: A new or empty folder.
        job_config: Of the run that the weights are for.
        model_args: The model's arguments, complete.
        state: All parameters by name.
    """
    job_config = copy.deepcopy(job_config)
    job_config.ema.decay = 0.0  # it has no average of its own
    checkpoint_config.write(out, job_config, model_args, weights_only=True)
    with warnings.catch_warnings():
        # One process is what is meant; DCP finds that worth a warning.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        with torch.no_grad():
            dcp.save(state, checkpoint_id=out, no_dist=True)
