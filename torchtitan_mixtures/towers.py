"""Per-tower keys of `[mixture]`: which parameters they are about, their checks, and freezing.

A family has towers if its arguments say `tower_of_parameter(name)` and `tower_names`. Parameters
that all towers share go by the name `shared`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from torchtitan_mixtures.checkpoint_config import parameter_shapes
from torchtitan_mixtures.job_config import Mixture, MixtureJobConfig
from torchtitan_mixtures.pipeline import stage_modules

SHARED = "shared"
KEYS = ("tower_lr", "tower_weight_decay", "frozen_towers")
_NOTED = "_tower_keys_of_torchtitan_mixtures"


def tower_namer(model_args: Any) -> Callable[[str], str]:
    """Return what maps a parameter's name to that of its tower, or to `shared`."""
    tower_of_parameter = getattr(model_args, "tower_of_parameter", lambda name: None)
    return lambda name: tower_of_parameter(name) or SHARED


def has_tower_keys(mixture: Mixture) -> bool:
    """Say whether a job sets anything per tower."""
    return any(getattr(mixture, key) for key in KEYS)


def check_towers(job_config: MixtureJobConfig, model_args: Any) -> None:
    """Check the names in the per-tower keys, and that something is left to train.

    Raises:
        ValueError: Names the key, its value and the towers there are.
    """
    mixture = job_config.mixture
    if not has_tower_keys(mixture):
        return
    tower_of = tower_namer(model_args)
    parameters = list(parameter_shapes(job_config.model.name, model_args))
    owners = {tower_of(name) for name in parameters}
    towers = [*getattr(model_args, "tower_names", ()), SHARED]
    towers = [name for name in towers if name in owners]
    for key in KEYS:
        value = getattr(mixture, key)
        if value and towers == [SHARED]:
            raise ValueError(
                f"mixture.{key} = {value}: model.flavor = {job_config.model.flavor!r} has no "
                "layers of several towers; remove the key and use [optimizer]."
            )
        for name in value:
            if name not in towers:
                raise ValueError(
                    f"mixture.{key} = {value}: {name!r} is not a tower of model.flavor = "
                    f"{job_config.model.flavor!r}; it has {', '.join(towers)}."
                )
    if job_config.optimizer.early_step_in_backward:
        key = next(key for key in KEYS if getattr(mixture, key))
        raise ValueError(
            f"optimizer.early_step_in_backward = true and mixture.{key} = {getattr(mixture, key)}: "
            "it makes an optimizer for each parameter, all alike; set it to false."
        )
    _check_trainable(job_config, model_args, towers, parameters)


def _check_trainable(
    job_config: MixtureJobConfig, model_args: Any, towers: Sequence[str], parameters: Sequence[str]
) -> None:
    frozen = job_config.mixture.frozen_towers
    if set(frozen) == set(towers):
        raise ValueError(
            f"mixture.frozen_towers = {frozen}: nothing is left to train; the towers are "
            f"{', '.join(towers)}."
        )
    if not frozen or job_config.parallelism.pipeline_parallel_degree == 1:
        return
    tower_of = tower_namer(model_args)
    trained = [name for name in parameters if tower_of(name) not in frozen]
    for modules in stage_modules(job_config.parallelism, model_args.n_layers):
        prefixes = tuple(f"{module}." for module in modules)
        if not any(name.startswith(prefixes) for name in trained):
            raise ValueError(
                f"mixture.frozen_towers = {frozen}: nothing is left to train in the pipeline "
                f"stage of {', '.join(modules)}; give it layers, with "
                "parallelism.module_fqns_per_model_part or fewer stages."
            )


def warn_of_empty_modalities(job_config: MixtureJobConfig, model_args: Any) -> None:
    """Warn of modalities that no batch can have, for want of codes."""
    names = getattr(model_args, "modality_names", ())
    ranges = getattr(model_args, "vocab_ranges", ())
    for name, (first, end) in zip(names, ranges, strict=True):
        if first < end or name in job_config.mixture.frozen_towers:
            continue
        key = f"{name}_tokenizer"
        has_key = hasattr(job_config.multimodal, key)
        why = f"multimodal.{key} has no codes" if has_key else f"there is no multimodal.{key}"
        own = name in getattr(model_args, "tower_names", ())
        logger.warning(
            f"model.flavor = {job_config.model.flavor!r} has the modality {name!r}, of which no "
            f"batch has a token: {why}."
            + (f' To keep its tower as it is, set mixture.frozen_towers = ["{name}"].' * own)
        )


def apply_tower_keys(model: nn.Module, job_config: JobConfig) -> None:
    """Freeze the towers that the job names, and note its keys for `tower_keys`.

    After tensor parallelism, which makes new parameters; before FSDP and DDP, which treat frozen
    ones in another way.

    Args:
        model: A model or one pipeline stage of it, with `model_args`; changed in place.
        job_config: The job's configuration.
    """
    mixture = getattr(job_config, "mixture", None)
    if mixture is None or not has_tower_keys(mixture):
        return
    setattr(model, _NOTED, mixture)
    tower_of = tower_namer(model.model_args)
    for name, parameter in model.named_parameters():
        if tower_of(name) in mixture.frozen_towers:
            parameter.requires_grad_(False)
    if mixture.frozen_towers:
        logger.info(f"Frozen: {', '.join(mixture.frozen_towers)}")


def tower_keys(model: nn.Module) -> Mixture | None:
    """Return the job's `[mixture]` if it sets anything per tower; see `apply_tower_keys`.

    A TrainSpec's builder of optimizers is told of the model and of `[optimizer]` only.
    """
    return getattr(model, _NOTED, None)
