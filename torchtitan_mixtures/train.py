"""Entry point: `torchrun --nproc_per_node=N -m torchtitan_mixtures.train --config FILE.toml`.

`--config` is a short form of TorchTitan's `--job.config_file`; everything else is passed on.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import cast

# First: it points TorchTitan at the CPU if need be, and registers the families.
import torchtitan_mixtures  # noqa: F401  # isort: skip

import torch
from torchtitan.config import ConfigManager
from torchtitan.tools.logging import init_logger, logger

from torchtitan_mixtures.checks import check_arguments, check_job
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.trainer import MixtureTrainer


def parse_job(arguments: Sequence[str]) -> MixtureJobConfig:
    """Turn command-line arguments into a checked job configuration.

    Raises:
        ValueError: Names the key or file, its value and what is allowed.
    """
    renamed = [
        "--job.config_file" + a.removeprefix("--config")
        if a == "--config" or a.startswith("--config=")
        else a
        for a in arguments
    ]
    check_arguments(renamed)
    job_config = cast(MixtureJobConfig, ConfigManager().parse_args(renamed))
    check_job(job_config)
    return job_config


def quiet_the_host() -> None:
    """Drop warnings of the libraries below that say nothing to whoever launched a job."""
    # TorchTitan looks for a tokenizer there; ours are named in [multimodal].
    logger.addFilter(lambda record: not record.getMessage().startswith("HF assets path"))
    # float32 "mixed precision" on a CPU: it says that it does nothing, which is what is meant.
    warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype")
    # torchdata calls it whenever a loader is built.
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the arguments say; exit with code 2 and one message if they cannot be meant so."""
    init_logger()
    quiet_the_host()
    try:
        job_config = parse_job(sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    trainer = MixtureTrainer(job_config)
    try:
        if job_config.checkpoint.create_seed_checkpoint:
            trainer.save_seed_checkpoint()
        else:
            trainer.train()
    finally:
        trainer.close()
    torch.distributed.destroy_process_group()
    logger.info("Process group destroyed")


if __name__ == "__main__":
    main()
