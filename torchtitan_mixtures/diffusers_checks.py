"""Start-up checks of mixtures of diffusers; `checks.py` says what they are in general."""

from __future__ import annotations

from typing import Any

from torchtitan_mixtures.checkpoint_config import has_own_checkpoint
from torchtitan_mixtures.classifier_checks import refuse_keys
from torchtitan_mixtures.data.domains import check_domains, domain_names
from torchtitan_mixtures.job_config import MixtureJobConfig, Objective
from torchtitan_mixtures.objectives.denoising import is_mixture_of_diffusers

TOWER_KEYS = ("dispatch", "untie", "tower_of_modality", "context_parallel")
"""Keys of `[mixture]` about modalities, which experts that are whole models do not have."""


def refuse_diffusers_keys(job_config: MixtureJobConfig) -> None:
    """Refuse keys about experts that are whole models, in a job whose model has none.

    Raises:
        ValueError: Names the key and its value.
    """
    refuse_keys(job_config, "diffusers", "experts that are diffusion models")


def check_diffusers(job_config: MixtureJobConfig, model_args: Any) -> None:
    """Check how a job's experts and router learn.

    Args:
        job_config: The job.
        model_args: The flavour's arguments, complete.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    if not is_mixture_of_diffusers(model_args):
        refuse_diffusers_keys(job_config)
        return
    refuse_keys(job_config, "mixture", "modalities or mixers", (*TOWER_KEYS, "routing"))
    if job_config.diffusers.training == "joint":
        _check_joint(job_config, model_args)
    else:
        _check_by_domain(job_config, model_args)
    if job_config.diffusers.start and not has_own_checkpoint(job_config):
        # Imported late: it looks up this family.
        from torchtitan_mixtures.expert_folder import check_start

        check_start(job_config, model_args)


def _check_joint(job_config: MixtureJobConfig, model_args: Any) -> None:
    config = job_config.diffusers
    if model_args.top_k == 1 and model_args.renormalize and model_args.num_experts > 1:
        raise ValueError(
            "mixture.top_k = 1: with diffusers.training = 'joint' the only expert's weight would "
            "be 1 whatever the router says, and the router would learn nothing of the prediction; "
            "set top_k to 2 or more, or diffusers.renormalize = 'no'."
        )
    if config.router_weight != type(config)().router_weight:
        raise ValueError(
            f"diffusers.router_weight = {config.router_weight}: is read with diffusers.training = "
            "'decentralised'; remove the key, or set that."
        )


def _check_by_domain(job_config: MixtureJobConfig, model_args: Any) -> None:
    """Check a job in which the domain of an image says whose business it is."""
    check_domains(job_config, model_args.is_prompted)
    config, names = job_config.diffusers, domain_names(job_config)
    what = f"diffusers.training = {config.training!r}"
    if not names:
        raise ValueError(
            f'multimodal.domains = "": {what} needs to know the domain of each image; set it to '
            '"style" for emoji, to "class", or to a file of scripts/prepare_data.py cluster.'
        )
    if len(names) != model_args.num_experts:
        raise ValueError(
            f"{what}: the number of experts is {model_args.num_experts} and that of domains "
            f"{len(names)} ({', '.join(names)}), and each needs its own; set "
            f"diffusers.num_experts = {len(names)}."
        )
    if job_config.mixture.router_noise > 0:
        raise ValueError(
            f"mixture.router_noise = {job_config.mixture.router_noise}: is read with "
            f"diffusers.training = 'joint', which is {config.training!r}; remove the key."
        )
    for key in ("balance_weight", "z_weight"):
        value = getattr(job_config.objective, key)
        if value != getattr(Objective(), key):
            raise ValueError(
                f"objective.{key} = {value}: domains decide which expert an image gets with "
                f"{what}, and not the router; remove the key."
            )
    if config.training == "router" and config.router_weight != type(config)().router_weight:
        raise ValueError(
            f"diffusers.router_weight = {config.router_weight}: with {what} there is no other loss "
            "to weigh it against; remove the key."
        )
