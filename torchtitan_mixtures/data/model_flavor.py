"""What loaders must know of a job's model before its arguments are complete."""

from __future__ import annotations

from typing import Any

from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import get_train_spec


def model_flavor(job_config: JobConfig) -> Any:
    """Look up the arguments of a job's flavour, as they are before the data completes them.

    They say what a model is told (classes or prompts) and how it cuts images; so for a mixture of
    diffusers they have the experts that `[diffusers]` names.
    """
    model = job_config.model
    model_args: Any = get_train_spec(model.name).model_args[model.flavor]
    if hasattr(model_args, "take_experts"):
        model_args.take_experts(job_config)
    return model_args
