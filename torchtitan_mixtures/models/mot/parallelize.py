"""Where a Mixture-of-Transformers may be cut."""

from __future__ import annotations

from torch import nn
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims

from torchtitan_mixtures.parallelize import Cuts, parallelize

CUTS = Cuts(
    units_before=[["tok_embeddings"]],
    units_after=[["norm", "output"]],
)


def parallelize_mot(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """Apply the job's parallelism to a MoT; see `torchtitan_mixtures.parallelize`."""
    return parallelize(model, parallel_dims, job_config, CUTS)
