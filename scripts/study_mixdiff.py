"""Mixture of Diffusers beside one DiT on emoji: `python scripts/study_mixdiff.py run --out DIR`.

Protocol, fixed before the final runs:

- Data: the drawings of the embedded corpus, 32 px, as a folder that the study writes. Domains are
  the three styles (noto, noto_v1, fluent) and, for the second phase, a fourth: scenes composed of
  several drawings. A class is a group of emoji in a style, or a scene: it names the domain, as a
  prompt would.
- Phase 1, the three styles, 1,000 steps of 64 images, equal for all:
  `dit`: one DiT (`mom/debugmodel_dit`), of the active FLOPs of the mixture with one expert;
  `dit wide`: one DiT of the mixture's total size (`mom/debugmodel_dit_224`);
  `decentralised`: three `mom/debugmodel_dit`, each trained on its style, and a router, in one job:
  the training FLOPs of `dit` and the router's 4 %; asked with the likeliest expert, two, all, and
  with the expert of the true domain;
  `joint`: the same model trained on the weighted sum of two experts (twice the FLOPs).
  Beside these a router that reads the noisy image and the time and not the class
  (`diffusers.training = "router"`), for how well it finds the domain by noise level.
- Phase 2, scenes are added, 300 steps of 64 images from the models of phase 1 on:
  `decentralised`: old experts frozen, a fourth that begins as a copy of one, a new row of the
  router; 30 % of the images are of the old domains (replay); `dit`: fine-tuned on scenes alone; and
  with the same 30 % of old images. Experts begin as their averages, `dit` with its weights.
- Training: `debugmodel.toml` of mixdiff and `debugmodel_dit.toml` of mom, which agree in all that
  both have, but for what this file says; nothing was tuned for any model. DDPM of 1,000 linear
  steps with learned variance.
- Seeds 0, 1 and 2. A seed decides initial weights, order of images, times and noise.
- Measured of the average of the parameters (decay 0.99) after the last step:
  1. Denoising loss by domain, mean over 8 levels of noise, on all images of `unseen_concept`
     (emoji that no model has seen, and scenes of them) and `unseen_style`.
  2. How often the router's likeliest expert is that of the domain, over all levels and at each;
     the entropy of its probabilities, and the weights of the experts by domain.
  3. Frechet distance over the features of emoji-cnn (`evaluation/quality.py`) of 300 images, drawn
     of the classes of 300 training drawings that are kept out of the reference; and how often
     emoji-cnn sees the style that was asked for. 50 DDPM steps, guidance 1, equal noise for all.
  4. Forgetting: loss of the old domains after phase 2 minus before.
- Reported: mean and standard deviation over seeds, and differences to `dit` of equal seeds with a
  paired bootstrap interval over seeds and emoji. Whichever way they come out.

All of it takes less than two hours on two quiet cores, can be stopped at any moment, and goes on
with the same command.
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

from torchtitan_mixtures.studies import mixdiff_data, mixdiff_measures, mixdiff_report
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

CONFIGS = Path(__file__).parent.parent / "train_configs"
EXPERTS = Path(__file__).parent / "experts.py"

STYLES = ",".join(mixdiff_data.STYLES)
REPLAY = 0.3


@dataclass(frozen=True)
class Protocol:
    """The numbers of the protocol; other ones are for trying the study out."""

    steps: int = 1000
    further_steps: int = 300
    batch_size: int = 64
    images: int = 300
    sampling_steps: int = 50
    validation_batches: int = -1

    def common(self, out: Path, seed: int, steps: int) -> list[str]:
        """What all trainings have in common and the TOML has not."""
        data = out / mixdiff_data.FOLDER
        return [
            f"--debug.seed={seed}",
            f"--multimodal.seed={seed}",
            "--multimodal.source=folder",
            f"--multimodal.path={data}",
            "--multimodal.class_of=group",  # of emoji alone
            f"--multimodal.domains={data / mixdiff_data.DOMAINS}",
            f"--training.steps={steps}",
            f"--training.local_batch_size={self.batch_size}",
            f"--lr_scheduler.warmup_steps={min(20, steps)}",
            "--checkpoint.interval=100",
            "--metrics.log_freq=50",
            "--metrics.no_enable_tensorboard",
            "--validation.no_enable",
            "--sampling.interval=0",
        ]


TRAININGS = {
    "dit": [],
    "dit wide": ["--model.flavor=debugmodel_dit_224"],
    "decentralised": [],
    "joint": [
        "--diffusers.training=joint",
        "--mixture.router_noise=0.5",
        "--objective.balance_weight=0.01",
        "--objective.z_weight=1e-4",
    ],
    "router": ["--diffusers.training=router", "--diffusers.router_inputs=latent,time"],
}
"""Name of each training of phase 1 -> what differs from the TOML; see `config_of`."""

ALONE, REPLAYED = "dit, scenes alone", "dit, replay"
ADDED = "decentralised, replay"

FURTHER = (ADDED, ALONE, REPLAYED)
"""Trainings of phase 2."""


def further_overrides(name: str, out: Path, seed: int, protocol: Protocol) -> list[str]:
    """What differs from the TOML in a training of phase 2."""
    shares = [f"{style}={REPLAY / 3:.12g}" for style in mixdiff_data.STYLES]
    replay = f"--multimodal.domain_shares={','.join([*shares, f'scene={1 - REPLAY:.12g}'])}"
    if name == ADDED:
        return [
            "--diffusers.num_experts=4",
            f"--diffusers.start={out / 'experts' / str(seed)}",
            "--diffusers.new_expert_from=noto",
            f"--mixture.frozen_towers={STYLES}",
            replay,
        ]
    checkpoint = out / "runs" / f"dit-{seed}" / "checkpoint" / f"step-{protocol.steps}"
    first = f"--checkpoint.initial_load_path={checkpoint}"
    return [first, replay if name == REPLAYED else "--multimodal.train_domains=scene"]


def config_of(name: str) -> Path:
    """The TOML of a training."""
    is_dit = name.startswith("dit")
    return CONFIGS / ("mom/debugmodel_dit.toml" if is_dit else "mixdiff/debugmodel.toml")


# --- the pieces -----------------------------------------------------------------------------------


def make_pieces(out: Path, protocol: Protocol, seeds: Sequence[int]) -> list[Piece]:
    """The work of the study: the classifier first, which all measurements need."""
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    single |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    threads = {"OMP_NUM_THREADS": "1"}
    measure = [sys.executable, __file__, "measure", "--out", str(out)]
    name = mixdiff_measures.REFERENCES
    references = Command([*measure, "--references"], out / f"{name}.json", threads)
    pieces = [Piece(name, [references])]

    def training(name: str, seed: int, overrides: Sequence[str], steps: int) -> list[Command]:
        run = out / "runs" / f"{name}-{seed}"
        argv = [sys.executable, "-m", "torchtitan_mixtures.train"]
        argv += ["--config", str(config_of(name)), f"--job.dump_folder={run}"]
        argv += [*protocol.common(out, seed, steps), *overrides]
        done = run / "checkpoint" / f"step-{steps}" / ".metadata"
        result = out / "results" / f"{name}-{seed}.json"
        return [
            Command(argv, done, threads | single),
            Command([*measure, "--run", name, "--seed", str(seed)], result, threads),
        ]

    for seed in seeds:
        of_styles = f"--multimodal.train_domains={STYLES}"
        found = {
            name: training(name, seed, [*overrides, of_styles], protocol.steps)
            for name, overrides in TRAININGS.items()
        }
        more = {
            name: training(
                name, seed, further_overrides(name, out, seed, protocol), protocol.further_steps
            )
            for name in FURTHER
        }
        folder = out / "experts" / str(seed)
        export = [sys.executable, str(EXPERTS), "export", "--out", str(folder)]
        export += ["--checkpoint", str(out / "runs" / f"decentralised-{seed}")]
        taken = Command(export, folder / "config.json", threads)
        order = {
            "dit wide": found["dit wide"],
            "joint": found["joint"],
            "decentralised": [*found["decentralised"], taken, *more[ADDED]],
            "dit": [*found["dit"], *more[ALONE], *more[REPLAYED]],
            "router": found["router"],
        }
        pieces += [Piece(f"{name}-{seed}", commands) for name, commands in order.items()]
    return pieces


# --- commands -------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> None:
    """Do what is left of the study, then report."""
    chosen = {field.name: getattr(options, field.name) for field in dataclasses.fields(Protocol)}
    protocol = Protocol(**chosen)
    leave_on_sigterm()
    options.out = options.out.absolute()
    with only_one(options.out) as lock:
        note_settings(options.out, dataclasses.asdict(protocol))
        data = options.out / mixdiff_data.FOLDER
        if not (data / mixdiff_data.DOMAINS).exists():  # which is written last
            mixdiff_data.write_data(data)
        pieces = make_pieces(options.out, protocol, options.seeds)
        processes = Processes(options.out / "logs", [lock])
        run_pieces(pieces, options.jobs, processes, partial(print, flush=True))
    report(options)


def measure(options: argparse.Namespace) -> None:
    """Measure a trained model, or what is compared with (`run` calls this)."""
    out: Path = options.out
    protocol = Protocol(**json.loads((out / SETTINGS_NAME).read_text()))
    if options.references:
        mixdiff_measures.measure_references(out, protocol.images, partial(print, flush=True))
    else:
        mixdiff_measures.measure_run(
            out,
            options.run,
            options.seed,
            protocol.images if options.run in mixdiff_measures.DRAWN else 0,
            protocol.sampling_steps,
            protocol.validation_batches,
        )


def report(options: argparse.Namespace) -> None:
    """Write report.json, report.md and pictures of what is done, and print the tables."""
    print(mixdiff_report.write_report(options.out))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("run", run), ("report", report), ("measure", measure)):
        command = commands.add_parser(name, help=str(function.__doc__).splitlines()[0])
        command.set_defaults(function=function)
        command.add_argument("--out", type=Path, required=True, help="folder of the study")
        if name == "run":
            add = command.add_argument
            add("--jobs", type=int, default=os.cpu_count(), help="at a time, of one thread each")
            add("--seeds", type=int, nargs="+", default=[0, 1, 2])
            for field in dataclasses.fields(Protocol):
                flag = f"--{field.name.replace('_', '-')}"
                add(flag, type=int, default=field.default, help="other than the protocol's")
        if name == "measure":
            group = command.add_mutually_exclusive_group(required=True)
            group.add_argument("--run", help="name of a training")
            group.add_argument("--references", action="store_true")
            command.add_argument("--seed", type=int, help="that of the training")
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
