"""Tells the stages of a pipeline what comes and goes, which they would otherwise ask each other."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.pipelining._utils import _StageMeta, _TensorMeta
from torch.distributed.pipelining.stage import InferenceMode
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims

from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.pipeline import Pipeline


def tell_shapes(
    pipeline: Pipeline, job_config: MixtureJobConfig, model_args: Any, dims: ParallelDims
) -> None:
    """Set the shapes of a microbatch's tensors on all stages of this rank.

    Args:
        pipeline: What TorchTitan's trainer would step.
        job_config: The job's configuration.
        model_args: The flavour's arguments, complete; a model of tokens.
        dims: The job's layout.
    """
    schedule = pipeline.schedule
    rows = job_config.training.local_batch_size // schedule._n_microbatches
    seq = job_config.training.seq_len // dims.cp
    name = "mixed_precision_param" if dims.fsdp_enabled else "dtype"
    dtype = TORCH_DTYPE_MAP[getattr(job_config.training, name)]

    def meta(width: int | None, requires_grad: bool, dtype: torch.dtype = dtype) -> _TensorMeta:
        shape = (rows, seq) if width is None else (rows, seq, width)
        stride = torch.empty(shape, device="meta").stride()
        return _TensorMeta(torch.Size(shape), stride, dtype, requires_grad)

    stream, gradient = meta(model_args.dim, True), meta(model_args.dim, False)
    for stage in pipeline.stages:
        is_first, is_last = stage.is_first, stage.is_last
        outputs = meta(model_args.total_vocab_size, True) if is_last else stream
        stage._user_meta = _StageMeta(
            inputs=(meta(None, False, torch.int64) if is_first else stream,),
            outputs=(outputs,),
            input_grads=(None if is_first else gradient,),
            output_grads=None if is_last else (gradient,),
        )

    def warm_up(stages: list[Any], has_backward: bool, p2p_done: bool) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    schedule._warmup_p2p = warm_up
