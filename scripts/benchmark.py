"""Measures a family against what it should cost: `python scripts/benchmark.py mot [--quick]`.

`parallel` in place of `mot` measures layouts of two processes, see `benchmark_parallel.py`;
`memory` compares plans of memory with what is allocated, see `benchmark_memory.py`; `data` measures
sources and packing, see `benchmark_data.py`.

All in one process: variants run alternately and in random order, forward and backward, and ratios
are formed within each round. Design targets stand beside the ratios; the baseline's ratio to itself
says how much of a difference is noise. Flags of block rows multiply: `--dtypes fp32 bf16 --modes
eager compiled` measures four cases; without any of them a selection is measured.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

# First: it points TorchTitan at the CPU if need be.
import torchtitan_mixtures  # noqa: F401  # isort: skip

import benchmark_data  # pyrefly: ignore [missing-import]  # beside this script
import benchmark_memory  # pyrefly: ignore [missing-import]
import benchmark_mixdiff  # pyrefly: ignore [missing-import]
import benchmark_mmdit  # pyrefly: ignore [missing-import]
import benchmark_mom  # pyrefly: ignore [missing-import]
import benchmark_mone  # pyrefly: ignore [missing-import]
import benchmark_mot  # pyrefly: ignore [missing-import]
import benchmark_parallel  # pyrefly: ignore [missing-import]
import benchmark_sampling  # pyrefly: ignore [missing-import]
import torch

from torchtitan_mixtures import benchmark as measure
from torchtitan_mixtures.device import has_accelerator

Row = Callable[[argparse.Namespace, torch.device], Iterable[measure.Table]]


def add_mot(parser: argparse.ArgumentParser) -> Mapping[str, Row]:
    """Flags of the family's own; its rows."""
    add = parser.add_argument
    dispatches = list(benchmark_mot.DISPATCHES)
    add("--dispatches", nargs="+", choices=dispatches, default=dispatches)
    add("--dtypes", nargs="+", choices=list(benchmark_mot.DTYPES), help="of block rows")
    add("--modes", nargs="+", choices=["eager", "compiled"], help="of block rows")
    add("--masks", nargs="+", choices=["causal", "document"], help="of block rows")
    add("--mixes", nargs="+", type=int, choices=range(3), help="of block rows: 0 is the even one")
    return {**benchmark_mot.ROWS, **benchmark_sampling.ROWS}


def add_mom(parser: argparse.ArgumentParser) -> Mapping[str, Row]:
    """Flags of the family's own; its rows."""
    add = parser.add_argument
    add("--sizes", nargs="+", choices=benchmark_mom.SIZES, help="of block rows")
    add("--dtypes", nargs="+", choices=list(benchmark_mom.DTYPES), help="of block rows")
    add("--modes", nargs="+", choices=["eager", "compiled"], help="of block rows")
    return benchmark_mom.ROWS


def add_mone(parser: argparse.ArgumentParser) -> Mapping[str, Row]:
    """Flags of the family's own; its rows."""
    add = parser.add_argument
    add("--sizes", nargs="+", choices=benchmark_mone.SIZES, help="default: both")
    add("--dtypes", nargs="+", choices=list(benchmark_mone.DTYPES), help="default: both")
    add("--modes", nargs="+", choices=["eager", "compiled"], help="of block rows")
    add("--capacities", nargs="+", type=float, help="effective ones, 0.125 to 1")
    add("--batch", type=int, default=benchmark_mone.BATCH, help="images")
    add("--layers", type=int, default=benchmark_mone.LAYERS, help="of models; all: 12")
    return benchmark_mone.ROWS


def add_mmdit(parser: argparse.ArgumentParser) -> Mapping[str, Row]:
    """Flags of the family's own; its rows."""
    add = parser.add_argument
    modalities = list(benchmark_mmdit.LENGTHS)
    add("--widths", nargs="+", type=int, help=f"default: {benchmark_mmdit.WIDTHS}")
    add("--modalities", nargs="+", type=int, choices=modalities, help="of block rows")
    add("--masks", nargs="+", choices=benchmark_mmdit.MASKS, help="of block rows")
    add("--dtypes", nargs="+", choices=list(benchmark_mmdit.DTYPES), help="default: both")
    add("--modes", nargs="+", choices=["eager", "compiled"], help="of block rows")
    add("--batch", type=int, default=benchmark_mmdit.BATCH, help="samples")
    return benchmark_mmdit.ROWS


def add_mixdiff(parser: argparse.ArgumentParser) -> Mapping[str, Row]:
    """Flags of the family's own; its rows."""
    add = parser.add_argument
    experts, top_k = benchmark_mixdiff.EXPERTS, list(benchmark_mixdiff.TOP_K)
    add("--expert", choices=experts, default=experts[0], help="what all experts are")
    add("--num-experts", nargs="+", type=int, help=f"default: {benchmark_mixdiff.NUM_EXPERTS}")
    add("--top-k", nargs="+", type=int, default=top_k, help=f"default: {top_k}")
    add("--dtypes", nargs="+", choices=list(benchmark_mixdiff.DTYPES), help="default: both")
    add("--batch", type=int, default=benchmark_mixdiff.BATCH, help="samples")
    return benchmark_mixdiff.ROWS


def add_parallel(parser: argparse.ArgumentParser) -> Mapping[str, Row]:
    """Flags of the layouts of two processes; their rows."""
    layouts = list(benchmark_parallel.LAYOUTS)
    parser.add_argument("--layouts", nargs="+", choices=layouts, default=layouts)
    return benchmark_parallel.ROWS


def add_memory(parser: argparse.ArgumentParser) -> Mapping[str, Row]:
    """No flags; the row of plans against allocations."""
    return benchmark_memory.ROWS


def add_data(parser: argparse.ArgumentParser) -> Mapping[str, Row]:
    """No flags; the rows of sources and packing."""
    return benchmark_data.ROWS


FAMILIES = {
    "mot": add_mot,
    "mom": add_mom,
    "mone": add_mone,
    "mmdit": add_mmdit,
    "mixdiff": add_mixdiff,
    "parallel": add_parallel,
    "memory": add_memory,
    "data": add_data,
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; `table` of the result holds the rows of the family."""
    parser = argparse.ArgumentParser(description=__doc__)
    subcommands = parser.add_subparsers(required=True, metavar="family")
    for family, add_family in FAMILIES.items():
        subcommand = subcommands.add_parser(family, help=f"rows of {family}")
        rows = add_family(subcommand)
        add = subcommand.add_argument
        add("--rows", nargs="+", choices=list(rows), default=list(rows), help="default: all")
        add("--rounds", type=int, help="rounds of each timing")
        add("--quick", action="store_true", help="fewer cases and rounds: noise, but soon")
        add("--json", type=Path, help="file to write all numbers to")
        subcommand.set_defaults(table=rows)
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for; print each table as soon as it is complete."""
    options = parse(arguments)
    device = torch.device("cpu")
    if has_accelerator():
        device = torch.accelerator.current_accelerator() or device
        print("Not tested on accelerators: judge the numbers accordingly.")
    facts = measure.machine_facts(device)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    start = time.perf_counter()
    tables = []
    for name in options.rows:
        for table in options.table[name](options, device):
            print(f"\n{table}", flush=True)
            tables.append(table.as_json())
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "tables": tables}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
