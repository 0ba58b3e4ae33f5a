"""MoM beside DiT on emoji of 32 pixels: `python scripts/study_mom.py run --out DIR`, then `report`.

Protocol, fixed before the final runs:

- Models: `debugmodel_dit`, the baseline; `debugmodel_matched`, a MoM (typed top-2: one token and
  one channel mixer of four each) of equal multiply-adds; `debugmodel`, the same MoM with channel
  mixers eight times as wide, which costs about half as much again. Patches of 4 x 4 pixels, 4
  layers, width 128.
- Training: `train_configs/mom/debugmodel.toml` for all three, with the changes in `overrides`:
  equal steps of equal batches, learning rate, warm-up and clipping; class is the emoji's group,
  dropped for one image in ten. Nothing was tuned for any model. DDPM of 1000 linear steps with
  learned variance.
- Seeds 0, 1 and 2. A seed decides initial weights, order of images, times and noise; images, times
  and noise of a step are the same for all models of a seed, so models are compared by seed.
- Measured: the average of the parameters (decay 0.995) after the last step.
  1. Validation loss, mean over 8 levels of noise, on `unseen_style` (a withheld style of known
     concepts), `unseen_concept`, and the first 512 images of `train` in validation's order.
  2. Frechet distance over the features of emoji-cnn (`evaluation/quality.py`) of 500 images to the
     training drawings, without 500 of them: those whose classes the images are drawn of. 50 DDPM
     steps, guidance 1; the noise is the same for all models and seeds.
- Reported: mean and standard deviation over seeds, differences to the baseline of equal seeds, and
  distances of real drawings and of noise. Whichever way they come out.

Time and multiply-adds are what `scripts/benchmark.py mom` measures; two trainings side by side, as
here, say nothing about time. All of it takes under two hours on two cores, can be stopped at any
moment, and goes on with the same command. A first run of the same protocol with 1,000 steps ended
before any model drew anything that could be recognised; the number of steps was raised for that.
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

from torchtitan_mixtures.studies import mom_vs_dit
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

CONFIG = Path(__file__).parent.parent / "train_configs" / "mom" / "debugmodel.toml"


@dataclass(frozen=True)
class Protocol:
    """The numbers of the protocol; other ones are for trying the study out."""

    steps: int = 5000
    batch_size: int = 32
    ema_decay: float = 0.995
    warmup_steps: int = 50
    images: int = 500
    sampling_steps: int = 50
    validation_batches: int = 8
    """Of 64 images; `unseen_concept` and `unseen_style` have fewer and are scored whole."""

    def overrides(self, flavor: str, seed: int) -> list[str]:
        """What differs from the TOML in one training."""
        return [
            f"--model.flavor={flavor}",
            f"--debug.seed={seed}",
            f"--multimodal.seed={seed}",
            f"--training.steps={self.steps}",
            f"--training.local_batch_size={self.batch_size}",
            f"--ema.decay={self.ema_decay}",
            f"--lr_scheduler.warmup_steps={min(self.warmup_steps, self.steps)}",
            "--checkpoint.interval=100",
            "--metrics.log_freq=50",
            "--metrics.no_enable_tensorboard",
            "--validation.no_enable",
            "--sampling.interval=0",
        ]


# --- the pieces -----------------------------------------------------------------------------------


def make_pieces(out: Path, protocol: Protocol, seeds: Sequence[int]) -> list[Piece]:
    """The work of the study; the classifier first, which all measurements need."""
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    single |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    threads = {"OMP_NUM_THREADS": "1"}
    measure = [sys.executable, __file__, "measure", "--out", str(out)]
    references = Command([*measure, "--references"], out / f"{mom_vs_dit.REFERENCES}.json", threads)
    pieces = [Piece(mom_vs_dit.REFERENCES, [references])]
    for seed in seeds:
        for flavor in reversed(mom_vs_dit.FLAVORS):  # the longest first
            name = f"{flavor}-{seed}"
            run = out / "runs" / name
            train = [sys.executable, "-m", "torchtitan_mixtures.train", "--config", str(CONFIG)]
            train += [f"--job.dump_folder={run}", *protocol.overrides(flavor, seed)]
            # Its checkpoint is complete when this file is there.
            trained = run / "checkpoint" / f"step-{protocol.steps}" / ".metadata"
            commands = [
                Command(train, trained, threads | single),
                Command([*measure, "--run", name], out / "results" / f"{name}.json", threads),
            ]
            pieces.append(Piece(name, commands))
    return pieces


# --- commands -------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Do what is left of the study, then report."""
    protocol = Protocol(steps=options.steps, images=options.images)
    leave_on_sigterm()
    with only_one(options.out) as lock:
        note_settings(options.out, dataclasses.asdict(protocol))
        pieces = make_pieces(options.out, protocol, options.seeds)
        processes = Processes(options.out / "logs", [lock])
        run_pieces(pieces, options.jobs, processes, partial(print, flush=True))
    report(options)


def measure(options: argparse.Namespace) -> None:
    """Measure one trained model, or what is compared with (`run` calls this)."""
    out: Path = options.out
    protocol = Protocol(**json.loads((out / SETTINGS_NAME).read_text()))
    if options.references:
        mom_vs_dit.measure_references(out, protocol.images, partial(print, flush=True))
        return
    mom_vs_dit.measure_run(
        out,
        options.run,
        protocol.images,
        protocol.sampling_steps,
        protocol.validation_batches,
    )


def report(options: argparse.Namespace) -> None:
    """Write report.json, report.md and samples.png of what is done, and print the tables."""
    print(mom_vs_dit.write_report(options.out))


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
            add = command.add_argument
            add("--jobs", type=int, default=os.cpu_count(), help="at a time, of one thread each")
            add("--seeds", type=int, nargs="+", default=[0, 1, 2])
            add("--steps", type=int, default=protocol.steps, help="other than the protocol's")
            add("--images", type=int, default=protocol.images, help="other than the protocol's")
        if name == "measure":
            group = command.add_mutually_exclusive_group(required=True)
            group.add_argument("--run", help="name of a training")
            group.add_argument("--references", action="store_true")
    options = parser.parse_args(arguments)
    if options.command == "run" and min(options.jobs, options.steps, options.images - 1) < 1:
        parser.error("--jobs and --steps must be at least 1, --images at least 2")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says."""
    options = parse(arguments)
    with one_message():
        options.function(options)


if __name__ == "__main__":
    main()
