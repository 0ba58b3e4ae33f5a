"""Plans as text for people, and as numbers for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torchtitan_mixtures.planning.devices import GIB, Device
from torchtitan_mixtures.planning.step import Plan
from torchtitan_mixtures.planning.timing import EXPOSED, Times

NAMES = {"dp_replicate": "DP", "dp_shard": "FSDP", "cp": "CP", "tp": "TP", "pp": "PP"}
"""How layouts are written; most is said with the innermost dimension first."""

LINKS = {**NAMES, "fsdp": "FSDP"}


def layout(degrees: Mapping[str, int]) -> str:
    """Write a layout, as "TP 8 x FSDP 4"."""
    order = ("tp", "cp", "pp", "dp_shard", "dp_replicate")
    parts = [f"{NAMES[name]} {degrees[name]}" for name in order if name in degrees]
    return " x ".join(parts) or "1 process"


def format_plan(
    plan: Plan, times: Times, device: Device, reserve: int, slowest: int | None = None
) -> str:
    """Write a plan as a table and the line of its time.

    Args:
        plan: Of the rank that needs most.
        times: Of the slowest rank.
        device: What it runs on.
        reserve: Bytes that must be left free.
        slowest: The slowest rank; None: the planned one.
    """
    memory, usable = plan.memory, device.memory - reserve
    lines = [
        f"{plan.family} {plan.flavor}, {plan.world_size} x {device.name}: {layout(plan.degrees)} "
        f"(rank {plan.rank})",
        *_assumptions(plan),
        _row("parameters", memory.parameters, f"of {plan.num_parameters / 1e9:,.3f} B"),
        _row("gradients", memory.gradients),
        _row("optimizer state", memory.optimizer_state),
        _row("other state", memory.other_state, "buffers, averages, buckets of DDP"),
        _row("activations", memory.activations, _activations(plan)),
        _row(
            "peak",
            memory.peak,
            f"of {usable / GIB:.1f} GiB ({device.memory / GIB:.0f} less a reserve of "
            f"{reserve / GIB:.1f}): " + ("fits" if memory.peak <= usable else "DOES NOT FIT"),
        ),
        f"{'batch':<16} {plan.samples:,} samples, {plan.tokens:,} {_unit(plan)}s a step; "
        f"{plan.microbatches} microbatches a rank",
        f"{'FLOPs':<16} {plan.model_flops:,} per {_unit(plan)} (the family's formula); "
        f"{plan.flops:.3e} of this rank in a step as run{_overhead(plan)}",
    ]
    for name, number in sorted(plan.sent.items(), key=lambda item: -item[1]):
        kinds = ", ".join(f"{count} {kind}" for kind, count in plan.calls.get(name, {}).items())
        note = kinds or "all-reduce in buckets"
        lines.append(_row(f"sent over {LINKS.get(name, name)}", number, note))
    if "pp" in plan.degrees:
        lines.append(f"{'bubble':<16} {plan.bubble:.1%} of the time")
    lines.append(_step_line(plan, times, plan.rank if slowest is None else slowest))
    return "\n".join(lines)


def _row(name: str, number: int, note: str = "") -> str:
    return f"{name:<16} {number / GIB:9.3f} GiB  {note}".rstrip()


def _activations(plan: Plan) -> str:
    if "pp" in plan.degrees:
        return "at the peak, gathered weights and whole gradients among them"
    return "left by the forward pass of a microbatch"


def _assumptions(plan: Plan) -> list[str]:
    images = plan.assumed_images
    if images is None:
        return []
    classes = f", {images.num_classes:,} classes" if images.num_classes else ""
    return [
        f"(the data is not here: images of {images.channels} x {images.size} x {images.size}"
        f"{classes}, as the flavour has them)"
    ]


def _unit(plan: Plan) -> str:
    """What FLOPs are counted of: positions, or whole images of a classifier."""
    return "image" if plan.tokens == plan.samples else "position"


def _overhead(plan: Plan) -> str:
    """Say how much more runs than the formula has; ranks of a pipeline have unequal shares."""
    if "pp" in plan.degrees:
        return ""
    return f", {plan.flops * plan.world_size / (plan.model_flops * plan.tokens):.2f} x that"


def _step_line(plan: Plan, times: Times, slowest: int) -> str:
    """Write the time of a step in one line."""
    rank = "" if slowest == plan.rank else f" (rank {slowest})"
    parts = [f"compute {times.compute:.3g} s", f"memory {times.memory:.3g} s"]
    if times.bubble:
        parts.append(f"bubble {times.bubble:.3g} s")
    for name, seconds in times.links.items():
        beside = "" if name in EXPOSED else " beside"
        parts.append(f"{LINKS[name]} {seconds:.3g} s{beside}")
    return (
        f"{'step':<16} at least {times.step:.3g} s{rank}, "
        f"{plan.tokens / times.step:,.0f} {_unit(plan)}s/s, "
        f"{times.utilization:.0%} of the peak in {plan.precision}; "
        f"bound by {times.limit} ({', '.join(parts)})"
    )


def as_table(plan: Plan, times: Times, device: Device, reserve: int) -> dict[str, Any]:
    """Give a plan as numbers: bytes, FLOPs and seconds."""
    return {
        **dataclasses.asdict(plan),
        "device": dataclasses.asdict(device),
        "reserve": reserve,
        "fits": plan.memory.peak <= device.memory - reserve,
        "seconds": dataclasses.asdict(times),
    }
