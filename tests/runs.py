"""Runs of the real trainer in test processes."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from tests.jobs import debug_job


def run_to_the_end(trainer: Any) -> None:
    """Train, without the two seconds that the host's rank 0 waits for others at the end.

    The processes of tests end when all have told their results.
    """
    without_pause = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda seconds: None)
    with patch("torchtitan.train.time", without_pause):
        trainer.train()


def train(family: str, *overrides: str) -> dict:
    """Run the trainer; return losses by step, gradient norms, and the final weights' checksum."""
    return train_until(None, family, *overrides)


def train_until(stop: int | None, family: str, *overrides: str) -> dict:
    """As `train`, but leave the run after some step of those that the job asks for."""
    from torchtitan_mixtures.trainer import MixtureTrainer

    job = debug_job(family, *overrides)
    trainer = MixtureTrainer(job)
    if stop is not None:
        trainer.should_continue_training = lambda: trainer.step < stop
    records: dict = {"loss": {}, "grad_norm": {}, "scalars": {}, "validation": {}}
    processor = trainer.metrics_processor

    # Every rank's numbers as the processor reports them, reduced over all that have a part in them.
    def log(scalars, step, *, original=processor.logger.log):
        if "grad_norm" in scalars:
            records["loss"][step] = scalars["loss_metrics/global_avg_loss"]
            records["grad_norm"][step] = scalars["grad_norm"]
            records["scalars"][step] = scalars
        original(scalars, step)

    processor.logger.log = log
    if job.validation.enable:
        original = processor.log_validation

        def log_validation(loss, step, **rest):
            records["validation"][step, rest["split"]] = loss
            original(loss, step, **rest)

        processor.log_validation = log_validation
    run_to_the_end(trainer)
    records["weights"] = {}
    for name, p in [item for part in trainer.model_parts for item in part.named_parameters()]:
        name = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        records["weights"][name] = whole.detach().double().sum().item()
    if trainer.ema is not None:
        averages = trainer.ema.state_dict().items()
        records["averages"] = {name: t.double().sum().item() for name, t in averages}
    trainer.close()
    return records


QUICK = (
    "--metrics.no_enable_tensorboard",
    "--checkpoint.no_enable",
    "--validation.no_enable",
)
