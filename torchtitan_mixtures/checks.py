"""Start-up checks: everything that can be known to be wrong before work begins.

Each check raises a `ValueError` that names the key, its value and what is allowed. Checks of one
key of our own sections are in `job_config.py`; these need the TOML file or several keys at once.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger

from torchtitan_mixtures import checkpoint_config, device, layout_checks
from torchtitan_mixtures.classifier_checks import TOKEN_KEYS, check_classifier, refuse_keys
from torchtitan_mixtures.config_values import check_table, describe_type, matches_type
from torchtitan_mixtures.data import emoji_source, image_data, loader
from torchtitan_mixtures.data.domains import DOMAIN_KEYS, check_domains
from torchtitan_mixtures.diffusers_checks import check_diffusers, refuse_diffusers_keys
from torchtitan_mixtures.float8 import check_converters
from torchtitan_mixtures.job_config import MixtureJobConfig, Objective
from torchtitan_mixtures.models import FAMILIES
from torchtitan_mixtures.models.common.grouped_mm import has_fast_grouped_mm, is_aligned
from torchtitan_mixtures.objectives.denoising import build_process
from torchtitan_mixtures.prompt_checks import check_prompted, refuse_prompt_keys
from torchtitan_mixtures.sampling.during_training import check_sampling
from torchtitan_mixtures.towers import check_towers, warn_of_empty_modalities

CONFIG_MODULE = "torchtitan_mixtures.job_config"
CHECKED = "_checked_by_torchtitan_mixtures"


def check_arguments(arguments: Sequence[str]) -> None:
    """Check the TOML named on the command line: that it can be read, its keys and its types.

    Args:
        arguments: The command line after the program's name, with `--job.config_file`.
    """
    path = _config_file(arguments)
    if path is None:
        if "--help" in arguments or "-h" in arguments:
            return
        raise ValueError(
            "no configuration: pass --config FILE.toml (see train_configs/), for example "
            "--config train_configs/mot/debugmodel.toml."
        )
    try:
        table = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"--config {path}: cannot be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not valid TOML: {error}") from None
    module = table.get("job", {}).get("custom_config_module") if isinstance(table, dict) else None
    if module != CONFIG_MODULE:
        raise ValueError(
            f"job.custom_config_module = {module!r} in {path}: must be {CONFIG_MODULE!r}, which "
            "adds this plugin's sections."
        )
    merged = ConfigManager._merge_configs(JobConfig, importlib.import_module(module).JobConfig)
    try:
        check_table(merged, table)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _config_file(arguments: Sequence[str]) -> str | None:
    keys = ("--job.config_file", "--job.config-file")
    for index, argument in enumerate(arguments):
        key, equals, value = argument.partition("=")
        if key in keys:
            following = arguments[index + 1 : index + 2]
            path = value if equals else "".join(following)
            if not path or path.startswith("--"):
                raise ValueError("--config: the name of a TOML file must follow it.")
            return path
    return None


def check_job(job_config: MixtureJobConfig) -> None:
    """Check a complete job configuration; the result is noted on it.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    if getattr(job_config, CHECKED, False):
        return
    model_args = check_data(job_config)
    layout_checks.check_layout(job_config, model_args)
    check_towers(job_config, model_args)
    warn_of_empty_modalities(job_config, model_args)
    warn_of_unaligned_widths(job_config, model_args)
    _check_last_checkpoint(job_config)
    _check_compile(job_config)
    check_converters(job_config, model_args)
    check_sampling(job_config, model_args)
    checkpoint_config.check_resume(job_config, model_args)
    note_checked(job_config)


def check_data(job_config: MixtureJobConfig) -> BaseModelArgs:
    """Check what the batches of a job depend on, whatever the processes that will train it.

    Returns:
        The flavour's arguments, complete.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    model_args = check_model(job_config)
    _check_data(job_config, model_args)
    return model_args


def check_model(job_config: MixtureJobConfig) -> BaseModelArgs:
    """Check single values and the flavour, whether or not the data is there.

    Returns:
        The flavour's arguments, complete.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    if not hasattr(job_config, "multimodal"):
        raise ValueError(
            f"job.custom_config_module = {job_config.job.custom_config_module!r}: must be "
            f"{CONFIG_MODULE!r}, which adds this plugin's sections."
        )
    _check_types(job_config, "")
    _check_counts(job_config)
    return _model_args(job_config)


def note_checked(job_config: JobConfig) -> None:
    """Note on a job that it passed the checks of whoever runs it; see `require_checked`."""
    setattr(job_config, CHECKED, True)


def require_checked(job_config: JobConfig, what: str) -> None:
    """Refuse `what` in a job that another trainer than ours runs.

    Raises:
        ValueError: The job did not pass `check_job`: it runs under TorchTitan's own trainer.
    """
    if not getattr(job_config, CHECKED, False):
        raise ValueError(f"{what} needs our trainer: launch with -m torchtitan_mixtures.train.")


def _check_types(section: Any, prefix: str) -> None:
    """Check the types of all values, of a job that was not made from a TOML by our `train.py`."""
    for key in dataclasses.fields(section):
        value = getattr(section, key.name)
        if dataclasses.is_dataclass(value):
            _check_types(value, f"{prefix}{key.name}.")
        elif not matches_type(value, key.type):
            raise ValueError(f"{prefix}{key.name} = {value!r}: must be {describe_type(key.type)}.")


def _check_counts(job_config: MixtureJobConfig) -> None:
    """Check the numbers of things of which there must be one, and that the host divides by."""
    keys = [
        "training.local_batch_size",
        "training.seq_len",
        "training.steps",
        "metrics.log_freq",
        "parallelism.data_parallel_replicate_degree",
        "parallelism.tensor_parallel_degree",
        "parallelism.context_parallel_degree",
        "parallelism.pipeline_parallel_degree",
    ]
    if job_config.validation.enable:
        keys += ["validation.local_batch_size", "validation.seq_len", "validation.freq"]
        if job_config.validation.steps != -1:
            keys.append("validation.steps")
    if job_config.checkpoint.enable:
        keys.append("checkpoint.interval")
        kept = job_config.checkpoint.keep_latest_k
        if kept == 1 or kept < 0:
            raise ValueError(
                f"checkpoint.keep_latest_k = {kept}: must be 0 (all) or 2 or more; the newest may "
                "be incomplete."
            )
    seeds = {"debug.seed": job_config.debug.seed, "multimodal.seed": job_config.multimodal.seed}
    for key, seed in seeds.items():
        if seed is not None and seed < 0:
            raise ValueError(f"{key} = {seed}: must be 0 or more.")
    if not 0 <= job_config.optimizer.lr < math.inf:
        raise ValueError(f"optimizer.lr = {job_config.optimizer.lr}: must be a finite number >= 0.")
    for key in keys:
        section, _, name = key.partition(".")
        value = getattr(getattr(job_config, section), name)
        if value < 1:
            raise ValueError(f"{key} = {value}: must be 1 or more.")
    if job_config.optimizer.name not in ("Adam", "AdamW"):
        raise ValueError(
            f"optimizer.name = {job_config.optimizer.name!r}: must be one of 'Adam', 'AdamW'."
        )


def _model_args(job_config: JobConfig) -> BaseModelArgs:
    """Look up and complete the flavour's arguments."""
    model_args = check_flavor(job_config)
    model_args.update_from_config(job_config)
    return model_args


def check_flavor(job_config: JobConfig) -> BaseModelArgs:
    """Look up the flavour's arguments, which the data has yet to complete.

    Raises:
        ValueError: There is no such family or flavour; lists those there are.
    """
    name = job_config.model.name
    if name not in FAMILIES:
        raise ValueError(
            f"model.name = {name!r}: this plugin has {', '.join(FAMILIES)}. TorchTitan's own "
            "models are launched with -m torchtitan.train."
        )
    try:
        return get_train_spec(name).model_args[job_config.model.flavor]
    except KeyError as error:
        raise ValueError(error.args[0]) from None


def _check_data(job_config: MixtureJobConfig, model_args: Any) -> None:
    data = job_config.multimodal
    if job_config.validation.enable and not data.validation_splits:
        raise ValueError(
            "multimodal.validation_splits = []: validation.enable = true needs at least one split."
        )
    if getattr(model_args, "is_classifier", False):
        refuse_prompt_keys(job_config)
        refuse_diffusers_keys(job_config)
        check_classifier(job_config, model_args)
        return
    refuse_keys(job_config, "classification", "classes to predict")
    refuse_keys(job_config, "nested", "nested experts")
    if hasattr(model_args, "modality_names"):
        refuse_prompt_keys(job_config)
        refuse_diffusers_keys(job_config)
        _check_token_data(job_config, model_args)
    else:
        _check_image_data(job_config, model_args)


def _check_image_data(job_config: MixtureJobConfig, model_args: Any) -> None:
    """Check what is left after a model's arguments were completed from its images."""
    _check_objective(job_config.objective)
    if getattr(model_args, "is_prompted", False):
        from torchtitan_mixtures.data import prompt_loader

        check_prompted(job_config, model_args)
        prompt_loader.check_prompt_splits(job_config)
    else:
        keys = ("dispatch", "untie", "tower_of_modality", "context_parallel")
        refuse_keys(job_config, "mixture", "towers of modalities", keys)
        refuse_keys(job_config, "multimodal", "tokens of documents", TOKEN_KEYS)
        refuse_prompt_keys(job_config)
        image_data.check_splits(job_config)
    check_diffusers(job_config, model_args)
    check_domains(job_config, getattr(model_args, "is_prompted", False))
    image_data.warn_of_thumbnails(job_config)
    build_process(job_config.objective, model_args.in_channels)


def _check_objective(objective: Objective) -> None:
    """Refuse keys that another kind of process, or density of times, would read."""
    defaults = Objective()
    readers = {
        ("kind", "ddpm"): ("noise_steps", "noise_schedule", "learned_variance"),
        ("kind", "flow"): ("time_density", "time_shift"),
        ("time_density", "logit_normal"): ("logit_mean", "logit_std"),
        ("time_density", "mode"): ("mode_scale",),
    }
    for (choice, value), keys in readers.items():
        for key in keys:
            found = getattr(objective, key)
            if getattr(objective, choice) != value and found != getattr(defaults, key):
                raise ValueError(
                    f"objective.{key} = {found!r}: is read with objective.{choice} = {value!r}, "
                    f"which is {getattr(objective, choice)!r}; set that, or remove the key."
                )
    if objective.kind == "ddpm" and objective.validation_levels > objective.noise_steps:
        raise ValueError(
            f"objective.validation_levels = {objective.validation_levels}: there are no more than "
            f"objective.noise_steps = {objective.noise_steps}."
        )


def _check_token_data(job_config: MixtureJobConfig, model_args: Any) -> None:
    data = job_config.multimodal
    refuse_keys(job_config, "mixture", "router", ("routing", "top_k", "router_noise"))
    refuse_keys(job_config, "multimodal", "experts for domains of images", DOMAIN_KEYS)
    if data.source == "folder":
        raise ValueError(
            f"multimodal.source = 'folder': holds images without captions, which model.name = "
            f"{job_config.model.name!r} cannot use; set 'emoji', or 'datasets' (imagefolder)."
        )
    if data.source == "datasets" and not data.path:
        raise ValueError(
            'multimodal.path = "": multimodal.source = "datasets" needs a hub name, a local '
            "folder or a file."
        )
    splits = {"train_split": [data.train_split]}
    if job_config.validation.enable:
        splits["validation_splits"] = data.validation_splits
    for key, names in splits.items():
        for name in names:
            if data.source == "emoji":
                emoji_source.check_emoji(data, key, name, model_args.modality_names)
    loader.check_settings(job_config)
    weights = [f"{name}_weight" for name in model_args.modality_names]
    if all(getattr(data, key, 1.0) == 0 for key in weights):
        raise ValueError(
            f"{' and '.join(f'multimodal.{key} = 0' for key in weights)}: nothing would be "
            "supervised; raise one of them."
        )
    if getattr(model_args, "bidirectional_images", False) and data.image_weight > 0:
        raise ValueError(
            f"multimodal.image_weight = {data.image_weight}: this flavour lets image positions "
            "see later ones of their image, which would show them their own targets; set it to 0."
        )


def warn_of_unaligned_widths(job_config: JobConfig, model_args: Any) -> None:
    """Warn of mixers that an accelerator cannot compute by grouped matrix products."""
    if not device.has_accelerator():
        return
    parallel = job_config.parallelism.tensor_parallel_degree
    widths = getattr(model_args, "mixer_widths", lambda parallel: {})(parallel)
    name = job_config.training.mixed_precision_param
    dtype: torch.dtype = getattr(torch, name)
    wrong = [f"{n} {what}" for what, n in widths.items() if not is_aligned(n, dtype)]
    if widths and not has_fast_grouped_mm(dtype):
        logger.warning(
            f"training.mixed_precision_param = {name!r}: PyTorch has grouped matrix products in "
            "bfloat16, for Hopper and later. On this device, or in this precision, mixers are "
            "computed one by one, and each layer waits for the device."
        )
    elif wrong:
        logger.warning(
            f"model.flavor = {job_config.model.flavor!r} with multimodal.image_size = "
            f"{model_args.image_size} has {' and '.join(wrong)}, not multiples of "
            f"{16 // dtype.itemsize} as grouped matrix products in {name} need: its mixers are "
            "computed one by one, and each layer waits for the device. Another image_size or "
            "flavour is faster."
        )


def _check_last_checkpoint(job_config: MixtureJobConfig) -> None:
    config, decay = job_config.checkpoint, job_config.ema.decay
    if config.enable and not config.load_only and config.last_save_model_only and decay > 0:
        raise ValueError(
            "checkpoint.last_save_model_only = true: the last checkpoint would be without the "
            f"average of ema.decay = {decay}; set it to false."
        )


def _check_compile(job_config: JobConfig) -> None:
    config = job_config.compile
    if not config.enable or config.backend != "inductor" or device.has_accelerator():
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None and shutil.which("clang++") is None:
        raise ValueError(
            "compile.enable = true: on a CPU the inductor backend needs a C++ compiler, and "
            f"neither {compiler} nor clang++ is on PATH. Install one, set compile.backend = "
            '"aot_eager" (no speed-up), or compile.enable = false.'
        )
