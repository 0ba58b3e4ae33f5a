"""MoNE beside ViT on emoji of 32 pixels: `python scripts/study_mone.py run --out DIR`; `report`.

Protocol, fixed before the final runs:

- Task: the group of an emoji, of 8, tested on `unseen_concept` (455 drawings of emoji that no model
  has seen) and `unseen_style` (146: a withheld style of known emoji). Which of 1,479 emoji it is
  cannot be learned in the time: after 400 steps a dense model had none of `unseen_style` right.
- Primary metric: the loss on `unseen_concept`. Top-1, and both on `unseen_style`, are beside it.
- Models: `debugmodel_dense`, a ViT; two narrower ones, of 64 and 96 channels, that cost about what
  a nested one does at e_c 0.2 and 0.6; `debugmodel`, the MoNE of the ViT's size, trained at e_c
  0.2, 0.4, 0.6 and 0.8; once for all capacities (`adaptive`: each step draws one of 0.15, 0.25,
  ..., 0.95); with random routing at e_c 0.2 and 0.6; and at e_c 0.4 for as many multiply-adds as
  the dense model ("same FLOPs"). Alpha begins at 0, as in the paper; at e_c 0.2 and in `adaptive`
  also at 0.1, as with 0 a router learns nothing until alpha has moved.
- Training: `train_configs/mone/debugmodel.toml` for all, with the changes in `overrides`: equal
  steps (but of "same FLOPs") of equal batches, learning rate, warm-up and augmentation.
- The learning rate is the TOML's, and was chosen on test data: of two trainings of the dense model,
  500 steps of seed 100, the one with 1e-3 had 51 % right of `unseen_concept`, the one with 2e-3
  45 % (of `unseen_style` 45 % and 40 %). It is the same for all models; nothing was tuned for any
  other one.
- Seeds 0, 1 and 2. A seed decides initial weights, order and crops of images, capacities of steps
  and random routing; images and crops of a step are the same for all models of a seed, so models
  are compared by seed.
- Measured: the average of the parameters after the last step, on all images of a split; nested
  models at e_c 0.2, 0.3, 0.4, 0.6, 0.8 and 1.0. At what it was trained for (adaptive: at 0.2 and
  0.6) a model is asked three times: with its router, with the router's initial weights put back,
  and with random routing, the mean of 5 draws; so are models trained with random routing. A draw is
  the same for all models. Also alpha, entropy of the router, and cosine between its weights and the
  initial ones.
- Time forward of 64 images on one thread, all capacities and the dense models interleaved in one
  process, when nothing else of the study runs.
- Reported: mean and standard deviation over seeds; differences of equal seeds, with a paired
  bootstrap interval over seeds and emoji. Whichever way they come out.

All of it takes about 105 minutes on two cores (a step takes a dense model 0.29 s of one core, a
nested one 0.14 to 0.24 s, narrow ones 0.10 and 0.17 s: 3 s for all models with what is around it,
so 90 minutes of training; the rest is start-up and measuring), can be stopped at any moment, and
goes on with the same command.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# First: it points TorchTitan at the CPU if need be.
import torchtitan_mixtures  # noqa: F401  # isort: skip

from torchtitan_mixtures.studies import mone_capacities
from torchtitan_mixtures.studies.mone_capacities import CAPACITIES, TIMES, VARIANTS, Variant
from torchtitan_mixtures.studies.mone_report import write_report
from torchtitan_mixtures.studies.pieces import (
    SETTINGS_NAME,
    Command,
    Piece,
    Processes,
    leave_on_sigterm,
    note_settings,
    only_one,
    run_pieces,
)
from torchtitan_mixtures.user_errors import one_message

CONFIG = Path(__file__).parent.parent / "train_configs" / "mone" / "debugmodel.toml"


@dataclass(frozen=True)
class Protocol:
    """The numbers of the protocol; other ones are for trying the study out."""

    steps: int = 1200
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    validation_batches: int = -1
    """Of 64 images of each split; -1 = all."""

    rounds: int = 60
    """How often each model's time is measured."""

    def overrides(self, variant: Variant, seed: int) -> list[str]:
        """What differs from the TOML in one training."""
        return [
            *variant.overrides(),
            f"--debug.seed={seed}",
            f"--multimodal.seed={seed}",
            f"--training.steps={self.steps}",
            f"--training.local_batch_size={self.batch_size}",
            f"--optimizer.lr={self.learning_rate}",
            f"--lr_scheduler.warmup_steps={min(self.warmup_steps, self.steps)}",
            "--checkpoint.interval=100",
            "--metrics.log_freq=50",
            "--metrics.no_enable_tensorboard",
            "--validation.no_enable",
        ]


# --- the pieces -----------------------------------------------------------------------------------


def make_pieces(out: Path, protocol: Protocol, seeds: Sequence[int]) -> list[Piece]:
    """The trainings of the study and what is measured of each, seed by seed."""
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    single |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    threads = {"OMP_NUM_THREADS": "1"}
    measure = [sys.executable, __file__, "measure", "--out", str(out), "--run"]
    pieces = []
    longest_first = sorted(VARIANTS, key=lambda v: v.steps(protocol.steps), reverse=True)
    for seed in seeds:
        for variant in longest_first:
            name = f"{variant.name.replace(',', '').replace(' ', '-')}-{seed}"
            run = out / "runs" / name
            train = [sys.executable, "-m", "torchtitan_mixtures.train", f"--config={CONFIG}"]
            train += [f"--job.dump_folder={run}", *protocol.overrides(variant, seed)]
            # Its checkpoint is complete when this file is there.
            step = f"step-{variant.steps(protocol.steps)}"
            trained = run / "checkpoint" / step / ".metadata"
            commands = [
                Command(train, trained, threads | single),
                Command(
                    [*measure, name, "--variant", variant.name],
                    out / "results" / f"{name}.json",
                    threads,
                ),
            ]
            pieces.append(Piece(name, commands))
    return pieces


def make_timing(out: Path) -> Piece:
    """The measurement of time, for which nothing else should run."""
    measure = [sys.executable, __file__, "measure", "--out", str(out), "--times"]
    done = out / f"{TIMES}.json"
    return Piece(TIMES, [Command(measure, done, {"OMP_NUM_THREADS": "1"})])


# --- commands -------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Do what is left of the study, then report."""
    protocol = Protocol(
        steps=options.steps, validation_batches=options.batches, rounds=options.rounds
    )
    leave_on_sigterm()
    with only_one(options.out) as lock:
        note_settings(options.out, dataclasses.asdict(protocol))
        processes = Processes(options.out / "logs", [lock])
        progress = partial(print, flush=True)
        pieces = make_pieces(options.out, protocol, options.seeds)
        run_pieces(pieces, options.jobs, processes, progress)
        run_pieces([make_timing(options.out)], 1, processes, progress)
    report(options)


def measure(options: argparse.Namespace) -> None:
    """Measure one trained model, or time (`run` calls this)."""
    out: Path = options.out
    protocol = Protocol(**json.loads((out / SETTINGS_NAME).read_text()))
    if options.times:
        mone_capacities.measure_times(out, protocol.rounds)
        return
    batches = protocol.validation_batches
    variant = next(v for v in VARIANTS if v.name == options.variant)
    mone_capacities.measure_run(out, options.run, variant, CAPACITIES, batches)


def report(options: argparse.Namespace) -> None:
    """Write report.json, report.md and capacities.png of what is done, and print the tables."""
    print(write_report(options.out))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    protocol = Protocol()
    for name, function in (("run", run), ("report", report), ("measure", measure)):
        command = commands.add_parser(name, help=str(function.__doc__).splitlines()[0])
        command.set_defaults(function=function)
        command.add_argument("--out", type=Path, required=True, help="folder of the study")
        if name == "run":
            add, other = command.add_argument, "other than the protocol's"
            add("--jobs", type=int, default=os.cpu_count(), help="at a time, of one thread each")
            add("--seeds", type=int, nargs="+", default=[0, 1, 2])
            add("--steps", type=int, default=protocol.steps, help=other)
            add("--batches", type=int, default=protocol.validation_batches, help=other)
            add("--rounds", type=int, default=protocol.rounds, help=other)
        if name == "measure":
            group = command.add_mutually_exclusive_group(required=True)
            group.add_argument("--run", help="name of a training")
            group.add_argument("--times", action="store_true")
            command.add_argument(
                "--variant",
                choices=[v.name for v in VARIANTS],
                help="the model's name in the study",
            )
    options = parser.parse_args(arguments)
    if options.command == "run" and min(options.jobs, options.steps, options.rounds) < 1:
        parser.error("--jobs, --steps and --rounds must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    options = parse(arguments)
    with one_message():
        options.function(options)


if __name__ == "__main__":
    main()
