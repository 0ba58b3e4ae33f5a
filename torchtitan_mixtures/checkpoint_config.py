"""`config.json`: what a checkpoint is of, in a form that every tool can read.

TorchTitan's checkpoints hold tensors under names; nothing in them says of which model. Each
checkpoint folder of this project also holds a `config.json`:

    {"format": 1, "family": "mot", "flavor": "debugmodel",
     "model_args": {...}, "vocab_ranges": {"text": [0, 2048], ...},
     "parameters": {"tok_embeddings.weight": [3072, 256], ...}, "data_parallel_ranks": 1,
     "data_shards": 48, "job_config": {...}}
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
) -> None:
    """Write `config.json` into a checkpoint's folder, complete or not at all.

    A folder that holds a complete checkpoint already is about to be written over: until that is
    done it counts as incomplete, so that a kill in between leaves no mixture of the two.
    """
    family = job_config.model.name
    # Families without a vocabulary of tokens have none to record.
    names = getattr(model_args, "modality_names", [])
    ranges = getattr(model_args, "vocab_ranges", [])
    num_shards = None
    if _has_token_data(model_args):
        num_shards = count_shards(job_config, data_parallel_ranks)
    content = {
        "format": FORMAT,
        "family": family,
        "flavor": job_config.model.flavor,
        "model_args": dataclasses.asdict(model_args),
        "vocab_ranges": dict(zip(names, ranges, strict=True)),
        "parameters": parameter_shapes(family, model_args),
        "data_parallel_ranks": data_parallel_ranks,
        "data_shards": num_shards,
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


def check_resume(job_config: MixtureJobConfig, model_args: BaseModelArgs) -> None:
    """Refuse a job that would load the checkpoint of another model.

    Another model has other parameters, or the same ones and computes something else with them (a
    norm in another place, say). What a family lists in `resumable_fields` of its arguments changes
    neither; a flavour that differs in nothing else may go on, and that is logged.

    So is a job whose data-parallel ranks and data loader workers cannot share the checkpoint's
    shards of the data (a `multimodal.shards` of 0 becomes the checkpoint's number), and one whose
    per-tower keys do not go with the checkpoint's optimizer state.

    Raises:
        ValueError: Names the checkpoint, both flavours and the first thing that differs; or the
            keys that decide about the readers, or a per-tower key.
    """
    if not job_config.checkpoint.enable:
        return
    path = _checkpoint_to_load(job_config)
    if path is None:
        return
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: no such checkpoint to load.")
    saved = read(path)
    ours = f"{job_config.model.name}/{job_config.model.flavor}"
    theirs = f"{saved['family']}/{saved['flavor']}"
    shapes = parameter_shapes(job_config.model.name, model_args)
    names = [*shapes, *(name for name in saved["parameters"] if name not in shapes)]
    for name in names:
        if shapes.get(name) != saved["parameters"].get(name):
            raise ValueError(
                f"{path} is a checkpoint of {theirs}, this job is {ours}: {name} is "
                f"{saved['parameters'].get(name, 'absent')} there and "
                f"{shapes.get(name, 'absent')} here. {_remedy(path, saved, model_args)}"
            )
    fields = json.loads(json.dumps(dataclasses.asdict(model_args)))
    for name in sorted(fields.keys() - getattr(model_args, "resumable_fields", set())):
        if name in saved["model_args"] and saved["model_args"][name] != fields[name]:
            raise ValueError(
                f"{path} is a checkpoint of {theirs}, this job is {ours}: {name} was "
                f"{saved['model_args'][name]!r} there and is {fields[name]!r} here, which makes it "
                "another model. Set model.flavor and [mixture] as they were, or another "
                "job.dump_folder."
            )
    if not _is_model_only(job_config, path):
        if _has_token_data(model_args):
            _check_data(job_config, path, saved)
        _check_tower_keys(job_config, path, saved)
        _check_average(job_config, path, saved)
    if ours != theirs:
        logger.warning(f"Loading {path}, a checkpoint of {theirs}, into {ours}: same parameters.")


def _remedy(path: Path, saved: dict[str, Any], model_args: BaseModelArgs) -> str:
    """Say how a job and a checkpoint of other shapes could be brought together."""
    if _has_token_data(model_args):
        return "Set model.flavor and the tokenizers as they were, or another job.dump_folder."
    sizes = saved["model_args"].get("image_size"), getattr(model_args, "image_size", None)
    if sizes[0] == sizes[1]:
        return "Set model.flavor and [multimodal] as they were, or another job.dump_folder."
    return (
        f"Its images were of multimodal.image_size = {sizes[0]}, not {sizes[1]}: set it as it was, "
        f"or start from `python scripts/convert.py resize --checkpoint {path} "
        f"--image-size {sizes[1]} --out DIR` (checkpoint.initial_load_path)."
    )


def _is_model_only(job_config: JobConfig, path: Path) -> bool:
    """Say whether TorchTitan will take nothing but the weights from a checkpoint."""
    config = job_config.checkpoint
    in_own_folder = path.parent == Path(job_config.job.dump_folder) / config.folder
    return path.name == "step-0" if in_own_folder else config.initial_load_model_only


def _check_average(job_config: MixtureJobConfig, path: Path, saved: dict[str, Any]) -> None:
    """Refuse to go on with an average that the checkpoint does not have."""
    decay, before = job_config.ema.decay, saved["job_config"].get("ema", {}).get("decay", 0.0)
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
