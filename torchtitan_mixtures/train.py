"""Entry point: `torchrun --nproc_per_node=N -m torchtitan_mixtures.train --config FILE.toml`.

`--config` is a short form of TorchTitan's `--job.config_file`; everything else is passed on.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import cast

# First: it points TorchTitan at the CPU if need be, and registers the families.
import torchtitan_mixtures  # noqa: F401  # isort: skip

import torch
from torchtitan.config import ConfigManager
from torchtitan.tools.logging import init_logger, logger

from torchtitan_mixtures.checks import check_arguments, check_job
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.trainer import MixtureTrainer
from torchtitan_mixtures.user_errors import one_message

_GRACE = 3
"""Seconds from Ctrl-C to the end of a process that is held up; others end at once."""


def parse_job(
    arguments: Sequence[str], check: Callable[[MixtureJobConfig], object] = check_job
) -> MixtureJobConfig:
    """Turn command-line arguments into a checked job configuration.

    Args:
        arguments: The command line after the program's name.
        check: What the configuration must pass; tools that do not train need less than training.

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
    try:
        job_config = cast(MixtureJobConfig, ConfigManager().parse_args(renamed))
    except AssertionError as error:  # how the host refuses values
        raise ValueError(f"{error or 'a value that TorchTitan does not take'}.") from None
    check(job_config)
    return job_config


def quiet_the_host() -> None:
    """Drop warnings of the libraries below that say nothing to whoever launched a job."""
    # TorchTitan looks for a tokenizer there; ours are named in [multimodal].
    logger.addFilter(lambda record: not record.getMessage().startswith("HF assets path"))
    # It says that only the last stage knows the loss; here all ranks are told.
    logger.addFilter(lambda record: "Parallel loss is not visible" not in record.getMessage())
    # float32 "mixed precision" on a CPU: it says that it does nothing, which is what is meant.
    warnings.filterwarnings("ignore", message="In CPU autocast, but the target dtype")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the arguments say.

    What is wrong with the arguments, the data or the checkpoint is printed as one message, and the
    process exits with code 2; after Ctrl-C it exits with 130. Anything else is a fault of the
    program and shows its traceback.
    """
    init_logger()
    quiet_the_host()
    # Not a clean exit: other ranks may be waiting in a collective.
    try:
        with one_message(leave=os._exit):
            train(parse_job(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        leave_interrupted()


def train(job_config: MixtureJobConfig) -> None:
    """Run a checked job to its end."""
    if job_config.training.mixed_precision_param == "float32":
        # There is nothing to be missed where the layout does not mix precisions.
        logger.addFilter(lambda record: "Mixed precision training with" not in record.getMessage())
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


def leave() -> None:
    """End the process with success, after what is registered for its end but without a teardown.

    A thread of gloo's may still have to free the tensors of the last collective. It needs the
    interpreter for that, and aborts the process (SIGABRT) if it finds it being torn down.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def leave_interrupted() -> None:
    """End the process and its workers after Ctrl-C, with one line and no wait for other ranks."""
    print("interrupted; finished checkpoints are kept", file=sys.stderr, flush=True)
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(128 + signal.SIGINT)  # as shells have it


def watch_for_interrupts() -> None:
    """See to it that Ctrl-C ends the process within seconds, whatever it is waiting for.

    Python raises `KeyboardInterrupt` only between two of its own instructions. A rank that is in a
    collective comes to none until the others take part, and they may be gone.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # gets the number of every signal

    def watch() -> None:
        while os.read(reading, 1)[0] != signal.SIGINT:
            pass
        time.sleep(_GRACE)
        leave_interrupted()

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    watch_for_interrupts()
    main()
    leave()
