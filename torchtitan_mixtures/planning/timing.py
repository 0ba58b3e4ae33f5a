"""How long a step takes at least on a device: a bound by published peaks, no promise.

Kernels take what their FLOPs or their bytes take, whichever is more. Of a pipeline they wait for
its bubble. Tensor, context and pipeline parallelism communicate between kernels that need the
result, so that time is added; FSDP and replicas communicate beside kernels, so a step takes at
least as long as they do.

A group of ranks communicates over its node's links and, if it spans several nodes, over the
network. There its ranks in one node share what comes in from outside, as NCCL's rings do; exchanges
of all with all (context parallelism) and between stages of a pipeline share nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torchtitan_mixtures.planning.devices import Device
from torchtitan_mixtures.planning.step import Plan

EXPOSED = ("tp", "cp", "pp")
"""Dimensions whose communication kernels wait for."""

SHARED = ("tp", "fsdp", "dp_replicate")
"""Dimensions whose collectives go around in rings."""


@dataclass(frozen=True)
class Times:
    """Seconds of a step.

    Attributes:
        compute: What FLOPs take at the device's peak.
        memory: What the bytes of kernels and of the optimizer take.
        bubble: What ranks of a pipeline wait beside that.
        links: Dimension of the layout -> what its communication takes.
        step: All of it; no step is faster.
        limit: What most of `step` is: "compute", "memory", "bubble" or "link (dimension)".
        utilization: Share of the device's peak that the family's own FLOPs are in that time.
    """

    compute: float
    memory: float
    bubble: float
    links: Mapping[str, float]
    step: float
    limit: str
    utilization: float


def step_times(plan: Plan, device: Device) -> Times:
    """Say how long a planned step takes at least on a device."""
    peak = device.float32_flops if plan.precision == "float32" else device.bfloat16_flops
    # What is compiled is fused: all but products is then read and written with them.
    unfused = 0 if plan.is_compiled else plan.other_bytes
    compute = plan.flops / peak
    memory = (plan.product_bytes + unfused + plan.optimizer_bytes) / device.bandwidth
    kernels = max(compute, memory)
    bubble = kernels * plan.bubble / (1 - plan.bubble)
    links = {
        name: link_seconds(name, number, plan.degrees, device)
        for name, number in plan.sent.items()
        if name != "other"
    }
    exposed = sum(seconds for name, seconds in links.items() if name in EXPOSED)
    hidden = sum(seconds for name, seconds in links.items() if name not in EXPOSED)
    step = max(kernels + bubble + exposed, hidden)
    useful = plan.model_flops * plan.tokens / plan.world_size
    waiting = {"compute": compute, "memory": memory, "bubble": bubble}
    waiting |= {f"link ({name})": links[name] for name in links if name in EXPOSED}
    beside = {f"link ({name})": links[name] for name in links if name not in EXPOSED}
    # Of what the step consists of: what goes beside the rest counts where it is longer.
    parts = beside if hidden == step else waiting
    limit = max(parts, key=lambda name: parts[name])
    return Times(compute, memory, bubble, links, step, limit, useful / peak / step)


def link_seconds(name: str, number: float, degrees: Mapping[str, int], device: Device) -> float:
    """Seconds that a rank's bytes over one dimension of a layout take.

    Args:
        name: The dimension.
        number: Bytes that each rank moves over it.
        degrees: See `Plan`.
        device: What the ranks are.
    """
    ranks, inside = spread(name, degrees, device.of_a_node)
    within = number / device.link
    if ranks == inside:
        return within
    outside = number * (ranks - inside) / (ranks - 1)
    if name in SHARED:
        outside /= inside
    return max(within, outside / device.network)


def spread(name: str, degrees: Mapping[str, int], of_a_node: int) -> tuple[int, int]:
    """Say how many ranks a group of a dimension has, and how many of them are in one node.

    Ranks are numbered as TorchTitan does: those of tensor parallelism are neighbours, then those of
    context parallelism, of FSDP, of replicas, and of the pipeline.
    """
    order = ("tp", "cp", "dp_shard", "dp_replicate", "pp")
    sizes = {key: degrees.get(key, 1) for key in order}
    if name == "fsdp":  # ranks of context parallelism hold parts of the parameters too
        first, ranks = "cp", sizes["cp"] * sizes["dp_shard"]
    else:
        first, ranks = name, sizes[name]
    distance = 1
    for key in order[: order.index(first)]:
        distance *= sizes[key]
    return ranks, max(1, min(ranks, of_a_node // distance))
