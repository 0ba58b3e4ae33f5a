"""`config.json`: what a checkpoint is of, in a form that every tool can read.

TorchTitan's checkpoints hold tensors under names; nothing in them says of which model. Each
checkpoint folder of this project also holds a `config.json`:

    {"format": 1, "family": "mot", "flavor": "debugmodel",
     "model_args": {...}, "vocab_ranges": {"text": [0, 2048], ...},
     "parameters": {"tok_embeddings.weight": [3072, 256], ...}, "data_parallel_ranks": 1,
     "data_shards": 48, "weights_only": false, "tokenizers": {"text_tokenizer": "<sha256>", ...},
     "job_config": {...}}
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torchtitan.config import JobConfig
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.codecs import tokenizer_fingerprints
from torchtitan_mixtures.data.shards import START_AFRESH, check_fingerprint, count_shards
from torchtitan_mixtures.job_config import MixtureJobConfig

FILE_NAME = "config.json"
FORMAT = 1
METADATA = ".metadata"
"""DCP writes this file last: a folder without it is no checkpoint."""


def parameter_shapes(family: str, model_args: BaseModelArgs) -> dict[str, list[int]]:
    """List the shape of every parameter of a model, without allocating it."""
    with torch.device("meta"):
        model = get_train_spec(family).model_cls(model_args)
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def write(
    folder: str | Path,
    job_config: JobConfig,
    model_args: BaseModelArgs,
    data_parallel_ranks: int = 1,
    *,
    weights_only: bool = False,
) -> None:
    """Write `config.json` into a checkpoint's folder, complete or not at all.

    A folder that holds a complete checkpoint already is about to be written over: until that is
    done it counts as incomplete, so that a kill in between leaves no mixture of the two.

    Args:
        folder: The checkpoint's.
        job_config: That of the run.
        model_args: The model's arguments, complete.
        data_parallel_ranks: How many there are in the run.
        weights_only: Whether the checkpoint has nothing beside the weights, for a run to go on.
    """
    family = job_config.model.name
    # Families without a vocabulary of tokens have none to record.
    names = getattr(model_args, "modality_names", [])
    ranges = getattr(model_args, "vocab_ranges", [])
    num_shards, tokenizers = None, {}
    if _has_token_data(model_args):
        num_shards = count_shards(job_config, data_parallel_ranks)
        data = job_config.multimodal  # pyrefly: ignore [missing-attribute]
        tokenizers = tokenizer_fingerprints(data, names)
    content = {
        "format": FORMAT,
        "family": family,
        "flavor": job_config.model.flavor,
        "model_args": dataclasses.asdict(model_args),
        "vocab_ranges": dict(zip(names, ranges, strict=True)),
        "parameters": parameter_shapes(family, model_args),
        "data_parallel_ranks": data_parallel_ranks,
        "data_shards": num_shards,
        "weights_only": weights_only,
        "tokenizers": tokenizers,
        "job_config": job_config.to_dict(),
    }
    target = Path(folder) / FILE_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    (target.parent / METADATA).unlink(missing_ok=True)
    partial = target.with_suffix(".json.partial")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, target)


def _has_token_data(model_args: BaseModelArgs) -> bool:
    """Say whether a family reads the token loader, whose data is in shards."""
    return hasattr(model_args, "modality_names")


def read(folder: str | Path) -> dict[str, Any]:
    """Read the `config.json` of a checkpoint's folder.

    Raises:
        ValueError: The file is missing, not JSON, or of another format; names it.
    """
    path = Path(folder) / FILE_NAME
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: {folder} is not a checkpoint that this project wrote. DCP "
            "folders from elsewhere can run code when they are read; exchange safetensors instead."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not of format {FORMAT}; written by another version?")
    return content


def _step_folders(folder: str | Path) -> dict[int, Path]:
    """Find the folders of steps below a run's checkpoint folder, complete or not."""
    matches = (
        (re.fullmatch(r"step-(\d+)", path.name), path) for path in Path(folder).glob("step-*")
    )
    return {int(match.group(1)): path for match, path in matches if match}


def _is_complete(path: Path) -> bool:
    """Whether TorchTitan would load a step's folder."""
    return (path / METADATA).is_file() or (path / "model.safetensors.index.json").is_file()


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Find the complete checkpoint of the highest step below a run's checkpoint folder."""
    steps = {step: path for step, path in _step_folders(folder).items() if _is_complete(path)}
    return steps[max(steps)] if steps else None


def _left_over(folder: str | Path) -> list[Path]:
    """Find what kills in the middle of a save left of checkpoints of ours."""
    steps = _step_folders(folder).values()
    return [path for path in steps if not _is_complete(path) and (path / FILE_NAME).is_file()]


def remove_incomplete(folder: str | Path) -> None:
    """Remove checkpoints that were not saved to their end, and the folder if nothing is left.

    TorchTitan counts them among the `checkpoint.keep_latest_k` newest and would remove whole ones
    for them; and where the folder exists it does not read `checkpoint.initial_load_path`. To be
    called by one rank, while nothing is being saved.
    """
    for path in _left_over(folder):
        logger.warning(f"Removing {path}: it was not saved to its end.")
        shutil.rmtree(path)
    if Path(folder).is_dir() and not any(Path(folder).iterdir()):
        Path(folder).rmdir()


def _checkpoint_to_load(job_config: JobConfig) -> Path | None:
    """Name the DCP folder that TorchTitan will load for this job, if it will load one."""
    config = job_config.checkpoint
    folder = Path(job_config.job.dump_folder) / config.folder
    if config.load_step != -1:
        return folder / f"step-{config.load_step}"
    if folder.exists() and len(_left_over(folder)) < len(list(folder.iterdir())):
        return latest_checkpoint(folder)
    if config.initial_load_path and not config.initial_load_in_hf:
        return Path(config.initial_load_path)
    return None


def has_own_checkpoint(job_config: JobConfig) -> bool:
    """Say whether a job goes on with a checkpoint of its own."""
    config = job_config.checkpoint
    folder = Path(job_config.job.dump_folder) / config.folder
    return config.enable and latest_checkpoint(folder) is not None


def check_resume(job_config: MixtureJobConfig, model_args: BaseModelArgs) -> None:
    """Refuse a job that would load the checkpoint of another model.

    Another model has other parameters, or the same ones and computes something else with them (a
    norm in another place, say). What a family lists in `resumable_fields` of its arguments changes
    neither; a flavour that differs in nothing else may go on, and that is logged.

    So is, for models of images, a job of another diffusion process or VAE, unless it takes the
    weights alone; then that is logged.

    So is a job that would go on from weights alone; one whose data-parallel ranks and data loader
    workers cannot share the checkpoint's shards of the data (a `multimodal.shards` of 0 becomes the
    checkpoint's number); and one whose per-tower keys or average do not go with the checkpoint.

    Raises:
        ValueError: Names the checkpoint, both flavours and the first thing that differs; or the
            key that does not go with the checkpoint, and the remedy.
    """
    if not job_config.checkpoint.enable:
        return
    path = _checkpoint_to_load(job_config)
    if path is None:
        return
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: no such checkpoint to load.")
    if not _is_complete(path) and any(path.rglob("*.safetensors")):
        raise ValueError(
            f'checkpoint.initial_load_path = "{path}": holds safetensors, no checkpoint; a run '
            "begins with a folder of experts by diffusers.start."
        )
    saved = read(path)
    ours = f"{job_config.model.name}/{job_config.model.flavor}"
    theirs = f"{saved['family']}/{saved['flavor']}"
    if job_config.model.name == saved["family"] and not _has_token_data(model_args):
        _check_process(job_config, path, saved, model_args)
    shapes = parameter_shapes(job_config.model.name, model_args)
    decides = "the tokenizers" if _has_token_data(model_args) else "[multimodal]"
    names = [*shapes, *(name for name in saved["parameters"] if name not in shapes)]
    for name in names:
        if shapes.get(name) != saved["parameters"].get(name):
            raise ValueError(
                f"{path} is a checkpoint of {theirs}, this job is {ours}: {name} is "
                f"{saved['parameters'].get(name, 'absent')} there and "
                f"{shapes.get(name, 'absent')} here. "
                f"{_remedy(job_config, path, saved, model_args, decides)}"
            )
    fields = json.loads(json.dumps(dataclasses.asdict(model_args)))
    for name in sorted(fields.keys() - getattr(model_args, "resumable_fields", set())):
        if name in saved["model_args"] and saved["model_args"][name] != fields[name]:
            raise ValueError(
                f"{path} is a checkpoint of {theirs}, this job is {ours}: {name} was "
                f"{saved['model_args'][name]!r} there and is {fields[name]!r} here, which makes it "
                f"another model. {_remedy(job_config, path, saved, model_args, '[mixture]')}"
            )
    if not _is_model_only(job_config, path):
        _check_whole(job_config, path, saved)
        if _has_token_data(model_args):
            _check_data(job_config, path, saved)
        _check_tower_keys(job_config, path, saved)
        _check_average(job_config, path, saved)
    if ours != theirs:
        logger.warning(f"Loading {path}, a checkpoint of {theirs}, into {ours}: same parameters.")


def _remedy(
    job_config: JobConfig,
    path: Path,
    saved: dict[str, Any],
    model_args: BaseModelArgs,
    others: str,
) -> str:
    """Say how a job and the checkpoint of another model could be brought together.

    Args:
        job_config: The job.
        path: The checkpoint.
        saved: Its `config.json`.
        model_args: The job's model.
        others: What decides beside `model.flavor`, where neither the size of images nor the
            channels of the output differ.
    """
    now, before = vars(model_args), saved["model_args"]
    differing = {key for key in now if key in before and before[key] != now[key]}
    is_own = _is_own(job_config, path)
    if "learned_variance" in differing:
        others = "[objective] (kind, learned_variance)"
    elif "image_size" in differing:
        elsewhere = "checkpoint.initial_load_path" + ", with another job.dump_folder" * is_own
        return (
            f"Its images were of multimodal.image_size = {before['image_size']}, not "
            f"{now['image_size']}: set it as it was, or start from `python scripts/convert.py "
            f"resize --checkpoint {path} --image-size {now['image_size']} --out DIR` ({elsewhere})."
        )
    routers = {"router_layer", "num_routers", "shared_router", "alpha_per_layer"} & differing
    if routers:
        others = f"[nested] ({', '.join(sorted(routers))})"
    other = "job.dump_folder" if is_own else "checkpoint.initial_load_path"
    return f"Set model.flavor and {others} as they were, or another {other}."


def _learned_with(job_config: dict[str, Any]) -> dict[str, Any]:
    """What gives the weights of a model of images their meaning: key of the TOML -> value."""
    objective, data = job_config.get("objective", {}), job_config.get("multimodal", {})
    keys = ["kind"]
    if objective.get("kind") == "ddpm":
        keys += ["noise_steps", "noise_schedule", "learned_variance"]
    found = {f"objective.{key}": objective[key] for key in keys if key in objective}
    classification = job_config.get("classification", {})
    if "multi_label" in classification:
        found["classification.multi_label"] = classification["multi_label"]
    return {**found, "multimodal.vae": data.get("vae", "")}


def _check_process(
    job_config: MixtureJobConfig, path: Path, saved: dict[str, Any], model_args: BaseModelArgs
) -> None:
    """Refuse to go on with what was learned of another process, or of another VAE's latents.

    Weights alone may be where another process begins; a warning says so then.
    """
    before, now = _learned_with(saved["job_config"]), _learned_with(job_config.to_dict())
    differing = [key for key in now if key in before and before[key] != now[key]]
    if not differing:
        return
    if _is_model_only(job_config, path):
        found = ", ".join(f"{key} = {now[key]!r} (was {before[key]!r})" for key in differing)
        logger.warning(f"The weights of {path} were trained with other settings: {found}.")
        return
    remedy = "another job.dump_folder"
    if not _is_own(job_config, path):
        remedy = "take its weights alone, checkpoint.initial_load_model_only = true"
    elif saved["model_args"].get("learned_variance") == vars(model_args).get("learned_variance"):
        remedy += f', begun with its weights (checkpoint.initial_load_path = "{path}")'
    key = differing[0]
    raise ValueError(
        f"{key} = {now[key]!r}: it was {before[key]!r} in {path}, which would go on as something "
        f"else. Set it as it was, or {remedy}."
    )


def _check_whole(job_config: MixtureJobConfig, path: Path, saved: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint that has nothing but weights."""
    states = {"optimizer", "lr_scheduler", "dataloader", "train_state"}
    if job_config.ema.decay > 0:
        states.add("ema")
    missing = states - set(job_config.checkpoint.exclude_from_loading)
    if not missing or not saved.get("weights_only", False):
        return
    if not _is_own(job_config, path):
        raise ValueError(
            f"checkpoint.initial_load_model_only = false: {path} has nothing but weights; set it "
            "to true."
        )
    raise ValueError(
        f"{path} has nothing but weights, as checkpoint.last_save_model_only = true asked for: the "
        "run is complete and cannot go on from it. Begin another one with its weights "
        f'(another job.dump_folder, checkpoint.initial_load_path = "{path}"), or go on from an '
        "earlier checkpoint (checkpoint.load_step), with last_save_model_only = false."
    )


def _is_own(job_config: JobConfig, path: Path) -> bool:
    """Say whether a checkpoint is in the job's own folder, and not one that it begins with."""
    return path.parent == Path(job_config.job.dump_folder) / job_config.checkpoint.folder


def _is_model_only(job_config: JobConfig, path: Path) -> bool:
    """Say whether TorchTitan will take nothing but the weights from a checkpoint."""
    if _is_own(job_config, path):
        return path.name == "step-0"
    return job_config.checkpoint.initial_load_model_only


def _check_average(job_config: MixtureJobConfig, path: Path, saved: dict[str, Any]) -> None:
    """Refuse to go on with an average that the checkpoint does not have."""
    decay, before = job_config.ema.decay, saved["job_config"].get("ema", {}).get("decay", 0.0)
    if decay == 0 and before > 0 and _is_own(job_config, path):
        logger.warning(
            f"ema.decay = 0: {path} has an average (decay {before}), which this run drops; its "
            "next checkpoints have none."
        )
    if decay > 0 and before == 0 and "ema" not in job_config.checkpoint.exclude_from_loading:
        raise ValueError(
            f"ema.decay = {decay}: {path} has no average to go on with. Set 0, or begin one with "
            'the parameters of the checkpoint, checkpoint.exclude_from_loading = ["ema"].'
        )


def _check_tower_keys(job_config: MixtureJobConfig, path: Path, saved: dict[str, Any]) -> None:
    """Refuse per-tower keys that the optimizer state of a checkpoint would override, or lacks.

    TorchTitan loads learning rates, weight decay and the schedule with it. A tower may be frozen
    that was not: its state in the checkpoint is left out.
    """
    theirs = saved["job_config"].get("mixture", {})
    excluded = job_config.checkpoint.exclude_from_loading
    remedy = "start the optimizer afresh, checkpoint.exclude_from_loading ="
    if "optimizer" not in excluded or "lr_scheduler" not in excluded:
        for key in ("tower_lr", "tower_weight_decay"):
            value, before = getattr(job_config.mixture, key), theirs.get(key, {})
            if value != before:
                raise ValueError(
                    f"mixture.{key} = {value}: it was {before} in {path}, whose optimizer state "
                    f'keeps that. Set it as it was, or {remedy} ["optimizer", "lr_scheduler"].'
                )
    frozen, before = job_config.mixture.frozen_towers, theirs.get("frozen_towers", [])
    if "optimizer" not in excluded and not set(before) <= set(frozen):
        raise ValueError(
            f"mixture.frozen_towers = {frozen}: it was {before} in {path}, which has no optimizer "
            f'state of what was frozen. Set it as it was, or {remedy} ["optimizer"].'
        )


def _check_data(job_config: MixtureJobConfig, path: Path, saved: dict[str, Any]) -> None:
    """Refuse to resume the data if this job cannot share the checkpoint's shards among its ranks.

    Sets `multimodal.shards` of the job to the checkpoint's number if it is 0 (automatic).
    """
    layout = job_config.parallelism
    if "dataloader" in job_config.checkpoint.exclude_from_loading:
        return
    num_shards = saved.get("data_shards")
    if num_shards is None:
        raise ValueError(
            f"{path} was written by an earlier version, whose data loader state this one cannot "
            f"continue; {START_AFRESH}."
        )
    data = job_config.multimodal
    data.shards = data.shards or num_shards
    check_fingerprint({"multimodal.shards": num_shards}, {"multimodal.shards": data.shards})
    ranks = int(os.environ.get("WORLD_SIZE", "1")) // (
        layout.tensor_parallel_degree
        * layout.context_parallel_degree
        * layout.pipeline_parallel_degree
    )
    count_shards(job_config, ranks)
