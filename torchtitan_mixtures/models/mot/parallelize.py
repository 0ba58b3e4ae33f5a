"""Where a Mixture-of-Transformers may be cut."""

from __future__ import annotations

import math
from typing import cast

from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel
from torch.distributed.tensor.parallel.style import ParallelStyle
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model import BaseModelArgs

from torchtitan_mixtures.context_parallel import AllToAllAttention
from torchtitan_mixtures.float8 import row_multiple
from torchtitan_mixtures.models.common.dispatch import RowNorm
from torchtitan_mixtures.models.mot.args import MoTModelArgs
from torchtitan_mixtures.models.mot.model import MoTTransformer
from torchtitan_mixtures.parallelize import ContextCuts, Cuts, TensorCuts, parallelize
from torchtitan_mixtures.tensor_parallel import (
    GatheredInput,
    GatheredOutput,
    RowNormParallel,
    ScatteredInput,
    SubLayer,
    VocabParallel,
)

ATTENTION = "layers.*.attention.inner_attention"


def tensor_parallel_styles(model: nn.Module, loss_parallel: bool) -> dict[str, ParallelStyle]:
    """Say how each layer is cut over the ranks of tensor parallelism.

    Args:
        model: A MoT or one pipeline stage of it.
        loss_parallel: Whether logits stay cut along the vocabulary, for the loss to join.

    Returns:
        Module path -> style; `*` stands for any layer or tower.
    """
    model = cast(MoTTransformer, model)
    # The stream is (rows, dim) in tower order, (batch, seq, dim) where there are no towers.
    stream = 0 if model.model_args.is_untied else 1
    styles: dict[str, ParallelStyle] = {
        "layers.*.attention": SubLayer(stream),
        "layers.*.attention.wo.*": RowwiseParallel(output_layouts=Partial()),
        "layers.*.feed_forward": SubLayer(stream),
        "layers.*.feed_forward.w2.*": RowwiseParallel(output_layouts=Partial()),
        "layers.*.attention_norm": RowNormParallel(),
        "layers.*.ffn_norm": RowNormParallel(),
    }
    for name in (
        "attention.wq",
        "attention.wk",
        "attention.wv",
        "feed_forward.w1",
        "feed_forward.w3",
    ):
        styles[f"layers.*.{name}.*"] = GatheredInput(ColwiseParallel())
    if model.model_args.qk_normalization:
        # Each rank norms its own heads, (..., heads, head_dim).
        for name in ("q_norm", "k_norm"):
            styles[f"layers.*.attention.{name}.*"] = SequenceParallel(
                sequence_dim=stream + 1, use_local_output=True
            )

    # Between pipeline stages the stream is whole; a stage may have no layers.
    layers = list(model.layers.keys())
    if not layers:
        styles = {}
    if model.tok_embeddings is not None:
        layout = Shard(stream) if layers else Replicate()
        styles["tok_embeddings"] = VocabParallel(input_layouts=Replicate(), output_layouts=layout)
    elif layers:
        styles[f"layers.{layers[0]}"] = ScatteredInput(stream)
    if model.norm is not None:
        norm_style: ParallelStyle = RowNormParallel()
        if not isinstance(model.norm, RowNorm):
            norm_style = SequenceParallel(sequence_dim=stream, use_local_output=True)
        norm_style = GatheredOutput(stream, Partial(), norm_style)
        styles["norm"] = norm_style if layers else ScatteredInput(stream, norm_style)
        if loss_parallel:
            head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
            styles["output"] = GatheredInput(head)
        else:
            styles["output"] = GatheredOutput(2, Replicate(), GatheredInput(ColwiseParallel()))
    elif layers:
        last = f"layers.{layers[-1]}"
        styles[last] = GatheredOutput(stream, Replicate(), styles.get(last))
    return styles


def tensor_parallel_sizes(model_args: BaseModelArgs) -> dict[str, int]:
    """What the degree of tensor parallelism must divide: description -> number."""
    args = cast(MoTModelArgs, model_args)
    return {
        "heads": args.n_heads,
        "key and value heads": args.num_kv_heads,
        "hidden units of the feed-forward network": args.ffn_hidden_dim,
        "entries of the vocabulary": args.total_vocab_size,
    }


def matrix_products(model_args: BaseModelArgs) -> dict[str, int]:
    """The projections of a block in the order of their calls -> matrix products of each."""
    args = cast(MoTModelArgs, model_args)
    is_grouped = args.dispatch == "grouped"
    attention = 1 if is_grouped else len(args.names_of(args.untie_attention))
    ffn = 1 if is_grouped else len(args.names_of(args.untie_ffn))
    return {
        **{f"attention.{name}": attention for name in ("wq", "wk", "wv", "wo")},
        **{f"feed_forward.{name}": ffn for name in ("w1", "w3", "w2")},
    }


CUTS = Cuts(
    units_before=[["tok_embeddings"]],
    units_after=[["norm", "output"]],
    products=matrix_products,
    tensor_parallel=TensorCuts(tensor_parallel_styles, tensor_parallel_sizes),
    context_parallel=ContextCuts(
        styles=lambda model, job_config: {ATTENTION: AllToAllAttention()},
        sizes=lambda args: {"heads": cast(MoTModelArgs, args).n_heads},
        ring=ATTENTION,
    ),
)


def parallelize_mot(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """Apply the job's parallelism to a MoT; see `torchtitan_mixtures.parallelize`."""
    mot = cast(MoTTransformer, model)
    # Each rank of tensor parallelism holds an equal share of the rows; float8 takes blocks of them.
    mot.row_multiple = math.lcm(mot.row_multiple, parallel_dims.tp, row_multiple(job_config))
    return parallelize(model, parallel_dims, job_config, CUTS)
