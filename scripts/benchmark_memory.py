"""What `scripts/benchmark.py memory` measures: planned bytes against those that ranks allocate.

Every case trains a few steps of a debug configuration on gloo processes of this machine, and is
planned as if they were not there; rank 0 of both is compared.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

# First: it points TorchTitan at the CPU if need be.
import torchtitan_mixtures  # noqa: F401  # isort: skip

import torch
from benchmark_parallel import (  # pyrefly: ignore [missing-import]  # beside this script
    MarkdownTable,
    require_cpu,
)
from torchtitan.tools.logging import logger

from torchtitan_mixtures import benchmark as measure
from torchtitan_mixtures.local_ranks import run_ranks
from torchtitan_mixtures.planning.measure import STEPS, Measured, measure_steps
from torchtitan_mixtures.planning.running import BACKEND
from torchtitan_mixtures.planning.step import Memory, plan_step
from torchtitan_mixtures.train import quiet_the_host

CONFIGS = Path(__file__).parent.parent / "train_configs"
FAMILIES = ("mot", "mom", "mone", "mmdit", "mixdiff")
QUANTITIES = ("parameters", "gradients", "optimizer_state", "activations", "peak")
MIB = 2**20

PARALLEL = "--parallelism"
PIPELINE = (
    f"{PARALLEL}.pipeline_parallel_degree=2",
    f"{PARALLEL}.pipeline_parallel_schedule=1F1B",
    "--training.local_batch_size=4",
)
SEQ_512 = "--training.seq_len=512"
"""Of rows that would take long: bfloat16 and graphs are slow on a CPU, four processes share it."""

MIXED = "--training.mixed_precision_param=bfloat16"
LAYOUTS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "1 process": (1, ()),
    "FSDP 2": (2, ()),
    "TP 2": (2, (f"{PARALLEL}.tensor_parallel_degree=2",)),
    "CP 2": (2, (f"{PARALLEL}.context_parallel_degree=2",)),
    "DDP 2": (2, (f"{PARALLEL}.data_parallel_replicate_degree=2",)),
    "PP 2, 1F1B": (2, PIPELINE),
    "FSDP 2, full AC": (2, ("--activation_checkpoint.mode=full",)),
    "FSDP 2, selective AC": (
        2,
        (
            "--activation_checkpoint.mode=selective",
            "--activation_checkpoint.selective_ac_option=op",
        ),
    ),
    "FSDP 2, 2 microbatches": (2, ("--training.global_batch_size=8",)),
    "1 process, mixed bfloat16, seq 512": (1, (SEQ_512, MIXED)),
    "FSDP 2, mixed bfloat16, seq 512": (2, (SEQ_512, MIXED)),
    "FSDP 2, all bfloat16, seq 512": (2, (SEQ_512, MIXED, "--training.dtype=bfloat16")),
    "FSDP 2, compiled, seq 512": (
        2,
        (
            SEQ_512,
            "--compile.enable",
            "--compile.components=model",
            # The planner's own: inductor leaves the same bytes, and takes longer to.
            f"--compile.backend={BACKEND}",
        ),
    ),
    "TP 2 x FSDP 2, seq 512": (4, (SEQ_512, f"{PARALLEL}.tensor_parallel_degree=2")),
    "PP 2 x FSDP 2, 1F1B, seq 512": (4, (SEQ_512, *PIPELINE)),
}
"""Name -> ranks, and what is added to the command line."""

CASES = (
    *(("mot", layout) for layout in LAYOUTS),
    *(
        (family, layout)
        for family in FAMILIES[1:]
        for layout in ("1 process", "FSDP 2", "TP 2", "CP 2", "FSDP 2, full AC")
    ),
    ("mom", "FSDP 2, selective AC"),
)

SHORT = (
    f"--training.steps={STEPS}",
    "--lr_scheduler.warmup_steps=1",
    "--checkpoint.no-enable",
    "--validation.no-enable",
    "--sampling.interval=0",
    "--metrics.no-enable-tensorboard",
)
"""A few steps and nothing beside them."""

NEEDED = {("mone", "CP 2"): ("--nested.tokens_multiple=2",)}
"""What a family asks for in a layout."""


def job_of(family: str, layout: str) -> tuple[int, list[str]]:
    """Ranks and command line of a case; the folder it writes to is missing."""
    ranks, flags = LAYOUTS[layout]
    own = NEEDED.get((family, layout), ())
    config = CONFIGS / family / "debugmodel.toml"
    return ranks, [f"--config={config}", *SHORT, *own, *flags]


def compare(family: str, layout: str) -> tuple[Measured, Memory]:
    """Measure and plan a case; each in processes of its own."""
    ranks, arguments = job_of(family, layout)
    with tempfile.TemporaryDirectory() as folder:
        arguments.append(f"--job.dump_folder={folder}")
        real = run_ranks(_measure, ranks, arguments, timeout=600, init=False)[0]
    (plan,) = run_ranks(_plan, 1, arguments, ranks, timeout=600, init=False)
    return real, plan


def _measure(arguments: Sequence[str]) -> Measured:
    _quiet()
    return measure_steps(arguments)


def _plan(arguments: Sequence[str], world_size: int) -> Memory:
    _quiet()
    return plan_step(arguments, world_size).memory


def _quiet() -> None:
    quiet_the_host()
    logger.setLevel(logging.ERROR)


def measure_memory(options: argparse.Namespace, device: torch.device) -> Iterator[measure.Table]:
    """Compare plans with what was allocated."""
    require_cpu(device)
    columns = ["family", "layout", *(name.replace("_", " ") for name in QUANTITIES)]
    table = MarkdownTable("Planned memory of rank 0 to measured, MiB: CPU, gloo", columns)
    for family, layout in CASES[:3] if options.quick else CASES:
        real, plan = compare(family, layout)
        cells, errors = [], {}
        for name in QUANTITIES:
            found, planned = getattr(real, name), getattr(plan, name)
            if found is None:
                cells.append("-")
                continue
            errors[name] = planned / found - 1
            cells.append(f"{planned / MIB:.1f} / {found / MIB:.1f} ({errors[name]:+.1%})")
        table.add(family, layout, *cells, family=family, layout=layout, errors=errors)
    table.notes += [
        "Debug configurations as they are, float32 unless said, with a batch of 4 in pipelines; "
        f"compiled by {BACKEND}. Measured by "
        "PyTorch's profiler: activations and peak of the second to fourth step, the least of each.",
        "Activations of a pipeline, whose passes alternate, are in its peak only.",
    ]
    yield table


ROWS: dict[str, Callable[[argparse.Namespace, torch.device], Iterable[measure.Table]]] = {
    "memory": measure_memory
}
