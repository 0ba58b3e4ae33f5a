"""What `scripts/benchmark.py parallel` measures: layouts of two gloo processes on a CPU.

Mixture-of-Transformers against TorchTitan's own llama3 of the same active size, on the same tokens.
Every layout runs in processes of its own, one thread each. What TorchTitan cannot do on a CPU shows
as its error.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from benchmark_layouts import (  # pyrefly: ignore [missing-import]  # beside this script
    FAMILIES,
    FULL,
    LAYOUTS,
    QUICK,
    Layout,
    Sizes,
    count_rank,
    time_rank,
)
from benchmark_ranks import run_layout  # pyrefly: ignore [missing-import]

from torchtitan_mixtures import benchmark as measure

ABOUT = (
    "CPU only, gloo, one thread per process; two modalities, half of the tokens each; fp32, eager"
)
ADAPTED = (
    "llama3 is TorchTitan's, with two adaptations in this benchmark: FSDP is told to sum "
    "(`set_force_sum_reduction_for_comms`, without which it stops with `Cannot use "
    "ReduceOp.PREMUL_SUM with Gloo`), and every layout starts from the same weights."
)


class MarkdownTable(measure.Table):
    """Printed as Markdown."""

    def __str__(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in lines]
        table = ["| " + " | ".join(cells) + " |" for cells in escaped]
        return "\n".join([self.title, "", *table, "", *(f"- {note}" for note in self.notes)])


def gradient_norm(counts: Sequence[dict[str, Any]], layout: Layout) -> float:
    """Norm of all gradients; ranks of a pipeline have different ones, others the same."""
    squares = [count["squared_gradient"] for count in counts]
    is_pipeline = layout.key == "pipeline_parallel_degree"
    return math.sqrt(sum(squares) if is_pipeline else squares[0])


def sizes_of(options: argparse.Namespace) -> Sizes:
    """Sizes that fit the patience asked for."""
    return QUICK if options.quick else FULL


def require_cpu(device: torch.device) -> None:
    """Refuse what is not measured here."""
    if device.type != "cpu":
        raise SystemExit(
            f"parallel: measures gloo processes on a CPU, and PyTorch finds {device.type}. Hide "
            "the accelerator, for example by CUDA_VISIBLE_DEVICES=''."
        )


def measure_time(options: argparse.Namespace, device: torch.device) -> Iterator[measure.Table]:
    """Time a step of both families in each layout."""
    require_cpu(device)
    sizes = sizes_of(options)
    columns = ["layout", "mot ms", "mot again / mot", "mot / llama3"]
    columns += [f"{family} / {family} in 1 process" for family in FAMILIES]
    table = MarkdownTable(f"Time of a step: {sizes}; {ABOUT}", columns)
    rounds = options.rounds or (2 if options.quick else 9)
    limit = 400 if options.rounds else 10 if options.quick else 40
    for name in options.layouts:
        arguments = (sizes, LAYOUTS[name], rounds, limit)
        ranks, error = LAYOUTS[name].ranks, None
        try:
            seconds = run_layout(time_rank, ranks, FAMILIES, *arguments)[0]
        except RuntimeError as failure:
            error = str(failure)
            seconds = run_layout(time_rank, ranks, ("mot",), *arguments)[0]
        pairs = [("mot again", "mot"), ("mot", "llama3")]
        pairs += [(family, f"{family} alone") for family in FAMILIES]
        found = {pair: measure.ratio(seconds, *pair) for pair in pairs if {*pair} <= {*seconds}}
        milliseconds = measure.Spread.of(seconds["mot"]).median * 1000
        cells = [str(found.get(pair, "-")) for pair in pairs]
        if error:
            cells[1] = f"llama3: {error}"
        table.add(
            *(name, f"{milliseconds:.0f}", *cells),
            layout=name,
            milliseconds=milliseconds,
            ratios={" / ".join(pair): [r.low, r.median, r.high] for pair, r in found.items()},
            rounds=len(seconds["mot"]),
            llama3_error=error,
        )
    table.notes += [
        "A step: forward, loss, backward, all communication; until the last rank is done. The same "
        "tokens in every layout.",
        "Median and quartiles of ratios within a round; all variants of a layout run in the same "
        "processes. Two cores that do twice as much as one would be 0.5 of 1 process.",
        f"Rounds: {', '.join(str(record['rounds']) for record in table.records)}.",
        ADAPTED,
    ]
    yield table


def measure_traffic(options: argparse.Namespace, device: torch.device) -> Iterator[measure.Table]:
    """Count collectives and bytes of a block and of a step, and compare gradients."""
    require_cpu(device)
    sizes = sizes_of(options)
    columns = ["layout", "model", "per block", "KiB", "per step", "KiB", "gradient"]
    table = MarkdownTable(f"Communication of each rank in a step: {sizes}; {ABOUT}", columns)
    norms: dict[str, float] = {}
    for name in ["1 process", *(name for name in options.layouts if name != "1 process")]:
        layout = LAYOUTS[name]
        results = run_layout(count_rank, layout.ranks, sizes, layout)
        for family in FAMILIES:
            counts = [result[family] for result in results]
            if error := counts[0].get("error"):
                table.add(name, family, error, *"----", layout=name, model=family, error=error)
                continue
            norm = gradient_norm(counts, layout)
            norms.setdefault(family, norm)
            table.add(
                *(name, family, *describe(counts), f"{norm / norms[family]:.4f}"),
                layout=name,
                model=family,
                ranks=counts,
                gradient=norm / norms[family],
            )
    table.notes += [
        "Per block: what each further block adds. Bytes received of an all-gather, sent of all "
        "else; `a / b`: rank 0 and rank 1.",
        "Gradient: norm of all gradients to that of the same model in 1 process. TorchTitan 0.2.2 "
        "averages gradients under DDP, and does not divide the loss of a pipeline by its tokens.",
        "TorchTitan shards parameters over the ranks of CP as well, so CP2 has the traffic of "
        "FSDP2, too.",
        ADAPTED,
    ]
    yield table


def describe(counts: Sequence[dict[str, Any]]) -> list[str]:
    """Cells of collectives and KiB, of a block and of a step."""
    cells = []
    for scope in ("block", "step"):
        calls, sizes = [], []
        for count in counts:
            kinds = [f"{n:g} {kind}" for kind, n in sorted(count[scope]["calls"].items())]
            calls.append(", ".join(kinds) or "0")
            sizes.append(f"{sum(count[scope]['bytes'].values()) / 1024:,.1f}")
        # dict: each text once, in the order of ranks
        cells += [" / ".join(dict.fromkeys(calls)), " / ".join(dict.fromkeys(sizes))]
    return cells


ROWS: dict[str, Callable[[argparse.Namespace, torch.device], Iterable[measure.Table]]] = {
    "time": measure_time,
    "traffic": measure_traffic,
}
