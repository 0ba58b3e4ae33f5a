"""Plans a job before there are GPUs: `python scripts/estimate.py CONFIG.toml --world-size 64`.

It builds the configuration's model in its layout on this machine's CPU, allocates nothing, and
prints what a rank needs and what a step costs at least. Any key of training may follow, as in
`--activation_checkpoint.mode full`. Leaves with code 1 if a job does not fit its device, and names
the nearest change with which it does; with `--sweep` it looks for the fastest layout that fits.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before the package looks for a device: a plan needs none, and is the same on every machine.
os.environ["TORCHTITAN_MIXTURES_DEVICE"] = "cpu"

# First: it points TorchTitan at the CPU, and registers the families.
import torchtitan_mixtures  # noqa: F401  # isort: skip

from torchtitan.tools.logging import logger

from torchtitan_mixtures.planning.devices import DEVICES, GIB, Device, find_device
from torchtitan_mixtures.planning.fit import (
    RESERVE,
    Remedy,
    fewest_ranks_for_state,
    find_remedy,
    fits,
    heaviest,
    plan_deciding,
)
from torchtitan_mixtures.planning.jobs import fewest_ranks
from torchtitan_mixtures.planning.report import as_table, format_plan
from torchtitan_mixtures.planning.step import Plan, plan_step
from torchtitan_mixtures.planning.sweep import sweep
from torchtitan_mixtures.planning.sweep_report import format_sweep, header_of, sweep_as_table
from torchtitan_mixtures.planning.timing import Times, step_times
from torchtitan_mixtures.planning.toml_edit import check_target, write_config
from torchtitan_mixtures.train import quiet_the_host
from torchtitan_mixtures.user_errors import one_message


def parse(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line: options, and the command line of training."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s CONFIG.toml [options] [--section.key value ...]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", metavar="CONFIG.toml", help="a configuration of training")
    add("--world-size", type=int, help="number of devices (default: as many as the layout needs)")
    add("--device", default="h100-80g", help=f"one of {', '.join(DEVICES)} (default: %(default)s)")
    add("--rank", type=int, help="which rank (default: 0; of a pipeline the heavier end)")
    add("--reserve", type=float, default=RESERVE / GIB, metavar="GIB",
        help="memory left to CUDA, NCCL and the allocator (default: %(default).0f)")  # fmt: skip
    add("--json", action="store_true", help="print numbers for programs")
    add("--sweep", action="store_true", help="look for the fastest layout of --world-size devices")
    add("--out", type=Path, help="with --sweep: the TOML to write")
    options, others = parser.parse_known_args(arguments)
    if options.world_size is not None and options.world_size < 1:
        parser.error(f"--world-size {options.world_size}: must be 1 or more")
    if options.sweep and options.world_size is None:
        parser.error("--sweep: needs --world-size")
    if options.sweep and options.rank is not None:
        parser.error("--rank: does not go with --sweep")
    if any(key == "--config" or key.startswith(("--config=", "--job.config")) for key in others):
        parser.error("--config: the configuration is the first argument, and there is one")
    if options.out is not None and not options.sweep:
        parser.error("--out: goes with --sweep")
    if not 0 <= options.reserve < math.inf:
        parser.error(f"--reserve {options.reserve}: must be a number of GiB, 0 or more")
    return options, [f"--config={options.config}", *others]


def quiet() -> None:
    """Leave what libraries log of building a model to training: here it is built many times."""
    quiet_the_host()
    logger.setLevel(logging.ERROR)
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)


def say(message: str) -> None:
    """Tell people what is being done; numbers go to the standard output."""
    print(message, file=sys.stderr, flush=True)


def estimate(options: argparse.Namespace, arguments: Sequence[str], device: Device) -> int:
    """Plan one layout; return the exit code."""
    world_size = options.world_size or fewest_ranks(arguments)
    reserve = round(options.reserve * GIB)
    if options.rank is None:
        plans = plan_deciding(arguments, world_size)
    else:
        plans = [plan_step(arguments, world_size, options.rank)]
    plan = heaviest(plans)
    times, slowest_rank = slowest(plans, device)
    if not options.json:
        print(format_plan(plan, times, device, reserve, slowest_rank))
    misfit = None
    if not fits(plan, device, reserve):
        misfit = missing(arguments, plan, device, reserve)
    if options.json:
        table = as_table(plan, times, device, reserve)
        print(json.dumps(table | {"remedy": misfit and as_numbers(misfit.remedy)}, indent=1))
    if misfit is None:
        return 0
    say(f"error: {misfit.text}")
    return 1


@dataclass(frozen=True)
class Misfit:
    """By how much a job does not fit, and with what it would; None: with nothing that was tried."""

    text: str
    remedy: Remedy | None


def slowest(plans: Sequence[Plan], device: Device) -> tuple[Times, int]:
    """How long the slowest rank takes, and which it is."""
    plan = max(plans, key=lambda each: step_times(each, device).step)
    return step_times(plan, device), plan.rank


def as_numbers(remedy: Remedy | None) -> dict[str, Any] | None:
    """Give a remedy to programs."""
    if remedy is None:
        return None
    return {
        "world_size": remedy.world_size,
        "overrides": list(remedy.overrides),
        "peak": remedy.plan.memory.peak,
    }


def missing(arguments: Sequence[str], plan: Plan, device: Device, reserve: int) -> Misfit:
    """Say by how much a job does not fit, and look for what makes it fit."""
    usable = device.memory - reserve
    text = (
        f"{plan.memory.peak / GIB:.1f} GiB of rank {plan.rank} do not fit in the "
        f"{usable / GIB:.1f} GiB of {device.name} that are not reserved."
    )
    remedy = find_remedy(arguments, plan, device, reserve, say)
    if remedy is not None:
        ranks = "" if remedy.world_size == plan.world_size else f"--world-size {remedy.world_size} "
        peak = remedy.plan.memory.peak / GIB
        changes = shlex.join(remedy.overrides)
        return Misfit(f"{text} It fits ({peak:.1f} GiB) with {ranks}{changes}", remedy)
    needed = fewest_ranks_for_state(plan, device, reserve)
    return Misfit(
        f"{text} No change that was tried helps; parameters, gradients and optimizer state alone "
        f"need {needed} ranks. Try --sweep with as many or more, or a device with more memory.",
        None,
    )


def look_for_layouts(options: argparse.Namespace, arguments: Sequence[str], device: Device) -> int:
    """Sweep over layouts, and write the best as a configuration; return the exit code."""
    if options.out is not None:
        check_target(options.out)
    reserve = round(options.reserve * GIB)
    result = sweep(arguments, options.world_size, device, reserve, say)
    if options.json:
        print(json.dumps(sweep_as_table(result, device, reserve), indent=1))
    else:
        print(format_sweep(result, device, reserve))
    if result.best is None:
        say(f"error: {result.remedy}")
        return 1
    if options.out is not None:
        chosen = result.best.score.candidate.overrides()
        command = shlex.join(["scripts/estimate.py", *sys.argv[1:]])
        header = header_of(command, result.best, device)
        write_config(Path(options.config), [*arguments[1:], *chosen], header, options.out)
        say(f"wrote {options.out}")
    return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    options, training = parse(arguments)
    quiet()
    with one_message():
        device = find_device(options.device)
        do = look_for_layouts if options.sweep else estimate
        sys.exit(do(options, training, device))


if __name__ == "__main__":
    main()
