"""Activation checkpointing that saves the same of a block however many towers it has.

TorchTitan wraps the blocks, for every mode and with every key. Ours is the policy of
`selective_ac_option = "op"` alone: TorchTitan's saves every second matrix product of a block in the
order of their calls, so that of a dense Llama's wq, wk, wv, wo, w1, w3, w2 it keeps wq, wv, w1 and
w2. With several towers a projection is several products, and every second one would be one tower
of every projection. Here every second *projection* is saved, for all its towers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, cast

import torch
import torchtitan.models.attention  # noqa: F401  (registers variable-length attention)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac

import torchtitan_mixtures.models.common.grouped_mm  # noqa: F401  (registers the operator)

# What one projection of one tower, or of all towers at once, is computed with.
MATRIX_PRODUCTS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,  # with a bias
        torch.ops.aten._scaled_mm.default,  # float8
        torch.ops.torchtitan_mixtures.grouped_mm.default,
    }
)

# What is saved instead of being computed again; of the matrix products, every second projection.
SAVED_OPS = MATRIX_PRODUCTS | {
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_attention_math.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,  # context parallelism
    torch.ops.aten.max.default,  # of absolute values, for the scales of float8
    torch.ops.torch_attn._varlen_attn.default,
    torch._higher_order_ops.flex_attention,
    torch._higher_order_ops.inductor_compiled_code,
}


def checkpoint_blocks(
    model: nn.Module,
    config: ActivationCheckpoint,
    saved_ops: Collection[Any],
    products: Mapping[str, int] | None,
    *,
    product_ops: Collection[Any] = (),
    compiled: bool,
    base_folder: str,
) -> None:
    """Wrap the blocks in `model.layers` for activation checkpointing.

    Args:
        model: The model; changed in place.
        config: The job's section; its mode is not "none".
        saved_ops: What is saved under `selective_ac_option = "op"`.
        products: The projections of a block in the order of their calls: path in the block ->
            number of matrix products. None: TorchTitan's own policy.
        product_ops: Further operators that compute them, beside `MATRIX_PRODUCTS`.
        compiled: Whether the blocks will be compiled.
        base_folder: Where plots of memory budgets go.
    """
    layers = model.get_submodule("layers")
    saved_ops = {*saved_ops, *product_ops}
    plans: dict[str, list[bool]] = {}
    if products and config.mode == "selective" and config.selective_ac_option == "op":
        names = config.per_op_sac_force_recompute_mm_shapes_by_fqns
        for name, block in layers.named_children():
            plans[name] = saved_products(block, f"layers.{name}", products, names)
        # TorchTitan asks for names of linear layers; these are names of projections.
        config = dataclasses.replace(config, per_op_sac_force_recompute_mm_shapes_by_fqns=[])
    apply_ac(
        model,
        config,
        model_compile_enabled=compiled,
        # pyrefly: ignore [bad-argument-type]  # higher-order operators are saved too
        op_sac_save_list=set(saved_ops),
        base_folder=base_folder,
    )
    for name, plan in plans.items():
        wrapper = cast(CheckpointWrapper, layers.get_submodule(name))
        contexts = _contexts(frozenset(saved_ops), MATRIX_PRODUCTS | {*product_ops}, plan)
        wrapper.checkpoint_fn = partial(wrapper.checkpoint_fn, context_fn=contexts)


def saved_products(
    block: nn.Module, prefix: str, products: Mapping[str, int], forced_names: Sequence[str]
) -> list[bool]:
    """Say of each matrix product of a block, in the order of calls, whether it is saved.

    Args:
        block: The block; each projection holds weights of one shape.
        prefix: The block's path in the model.
        products: As in `checkpoint_blocks`.
        forced_names: Parts of paths. Projections of the shape of one that is named are never
            saved, and not counted, as in TorchTitan.

    Raises:
        ValueError: If a name fits something else than a projection.
    """
    forced = _forced_shapes(block, prefix, products, forced_names)
    saved: list[bool] = []
    position = 0
    for path, number in products.items():
        is_forced = _weight_shape(block, path) in forced
        position += not is_forced
        saved += [not is_forced and position % 2 == 1] * number
    return saved


def _forced_shapes(
    block: nn.Module, prefix: str, products: Mapping[str, int], forced_names: Sequence[str]
) -> set[torch.Size]:
    shapes = set()
    # Stacked weights are no modules of their own.
    paths = [path for path, _ in (*block.named_modules(), *block.named_parameters())]
    for path in paths:
        names = [name for name in forced_names if name in f"{prefix}.{path}"]
        if not names:
            continue
        # A name may be that of a projection or of one of its towers.
        projection = next((p for p in products if f"{path}.".startswith(f"{p}.")), None)
        if projection is None:
            raise ValueError(
                "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns = "
                f"{names[0]!r}: fits {prefix}.{path}, which is no projection; name one of "
                f"{', '.join(products)}."
            )
        shapes.add(_weight_shape(block, projection))
    return shapes


def _weight_shape(block: nn.Module, path: str) -> torch.Size:
    weights = (w for name, w in block.named_parameters() if f"{name}.".startswith(f"{path}."))
    return next(weights).shape


def _contexts(
    saved_ops: frozenset[Any], product_ops: frozenset[Any], plan: Sequence[bool]
) -> Callable[[], Any]:
    """Make the function that a checkpoint calls for its two contexts, once per forward pass."""

    def contexts() -> Any:
        calls = count()

        def policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            is_saved = func in saved_ops
            if func in product_ops:
                call = next(calls)
                if call >= len(plan):
                    raise RuntimeError(
                        f"a block computes more than the {len(plan)} matrix products that its "
                        "family declares in Cuts.products"
                    )
                is_saved = is_saved and plan[call]
            return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    return contexts
