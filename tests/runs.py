"""Runs of the real trainer in test processes."""

from __future__ import annotations

from tests.jobs import debug_job


def train(family: str, *overrides: str) -> dict:
    """Run the trainer; return losses by step, gradient norms, and the final weights' checksum."""
    from torchtitan_mixtures.trainer import MixtureTrainer

    job = debug_job(family, *overrides)
    trainer = MixtureTrainer(job)
    records: dict = {"loss": {}, "grad_norm": {}, "validation": {}}
    processor = trainer.metrics_processor

    def log(step, loss, max_loss, grad_norm, extra_metrics=None, *, original=processor.log):
        records["loss"][step] = loss
        records["grad_norm"][step] = grad_norm
        original(step, loss, max_loss, grad_norm, extra_metrics)

    processor.log = log
    if job.validation.enable:
        original = processor.log_validation

        def log_validation(loss, step, **rest):
            records["validation"][step, rest["split"]] = loss
            original(loss, step, **rest)

        processor.log_validation = log_validation
    trainer.train()
    records["weights"] = {}
    for name, p in trainer.model_parts[0].named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        records["weights"][name] = whole.detach().double().sum().item()
    trainer.close()
    return records


QUICK = (
    "--metrics.no_enable_tensorboard",
    "--checkpoint.no_enable",
    "--validation.no_enable",
)
