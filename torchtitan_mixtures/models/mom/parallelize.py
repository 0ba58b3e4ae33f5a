"""Where a Mixture of Mixers may be cut."""

from __future__ import annotations

import torch
from torch import nn
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims

from torchtitan_mixtures.checks import require_checked
from torchtitan_mixtures.parallelize import Cuts, parallelize

CUTS = Cuts(
    units_before=[["x_embedder", "t_embedder", "y_embedder"]],
    units_after=[["final_layer"]],
    # Matrix products of layers with a bias. With grouped ones, all are saved.
    saved_ops=[torch.ops.aten.addmm.default],
)


def parallelize_mom(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """Apply the job's parallelism to a MoM or DiT; see `torchtitan_mixtures.parallelize`."""
    # TorchTitan's trainer does not noise batches.
    require_checked(job_config, "a model of images")
    return parallelize(model, parallel_dims, job_config, CUTS)
