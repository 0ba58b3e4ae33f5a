"""Models of the family mmdit out of Stable Diffusion 3 transformers of diffusers, and back.

What is exchanged is safetensors and JSON; diffusers need not be installed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torchtitan.tools.logging import logger

from torchtitan_mixtures.checkpoint_loading import load_model
from torchtitan_mixtures.checkpoint_writing import check_out, write_weights
from torchtitan_mixtures.checks import check_data
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.models.mmdit import sd3
from torchtitan_mixtures.models.mmdit.args import MMDiTModelArgs
from torchtitan_mixtures.safetensors_files import read_json, read_weights
from torchtitan_mixtures.train import parse_job

WEIGHTS = "diffusion_pytorch_model"
CONFIG = "config.json"
TRANSFORMER = "transformer"
"""Folder of a pipeline that the transformer is in."""


def import_sd3(
    source: Path, arguments: Sequence[str], out: Path, *, other_positions: bool = False
) -> MMDiTModelArgs:
    """Write a checkpoint that training begins with, out of a transformer of diffusers.

    Args:
        source: A `SD3Transformer2DModel` that was saved, or a pipeline with one: a folder with
            `config.json` and safetensors, or a safetensors file beside a `config.json`.
        arguments: Of training: `--config FILE.toml`, and keys that differ from it.
        out: A new or empty folder.
        other_positions: Whether places of patches may differ from those of the checkpoint.

    Returns:
        Arguments of the model.

    Raises:
        ValueError: The transformer is another than the TOML's model; says in what.
    """
    check_out(out)
    job_config = parse_job(arguments, check=lambda _: None)
    if job_config.model.name != "mmdit":
        raise ValueError(
            f"model.name = {job_config.model.name!r}: Stable Diffusion 3 becomes a model of the "
            "family 'mmdit'."
        )
    args = cast(MMDiTModelArgs, check_data(job_config))
    sd3.check_model(args)
    source = _find_transformer(source)
    config = _read_config(source)
    sd3.check_config(config, args)
    weights = read_weights(source, WEIGHTS)
    try:
        sd3.check_positions(weights.get(sd3.POSITIONS), config, args)
    except ValueError as error:
        if not other_positions:
            raise ValueError(f"{error} --other-positions takes the weights all the same.") from None
        logger.warning(f"Weights that were trained with other places of patches: {error}")
    state = sd3.from_sd3(weights, args)
    _warn_of_objective(job_config)
    state = {name: tensor.float().contiguous() for name, tensor in state.items()}
    write_weights(out, job_config, args, state)
    return args


def export_sd3(source: Path, out: Path, *, averaged: bool = True) -> None:
    """Write a model as a transformer that diffusers can load.

    Args:
        source: A run's folder, its checkpoints, or one of them.
        out: A new or empty folder.
        averaged: Take the average of the parameters if the checkpoint has one.

    Raises:
        ValueError: No Stable Diffusion 3 computes what the model does; says why.
    """
    check_out(out)
    loaded = load_model(source, averaged=averaged)
    args = loaded.model_args
    if not isinstance(args, MMDiTModelArgs):
        raise ValueError(
            f"{loaded.path}: a checkpoint of {loaded.job_config.model.name}; only those of mmdit "
            "can be exported as Stable Diffusion 3."
        )
    sd3.check_model(args)
    _warn_of_objective(loaded.job_config)
    state = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    weights = sd3.to_sd3(state, args) | {sd3.POSITIONS: sd3.sd3_positions(args)}
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).write_text(json.dumps(sd3.sd3_config(args), indent=2) + "\n")
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, out / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})


def _find_transformer(source: Path) -> Path:
    """Look into a pipeline's folder for its transformer."""
    is_pipeline = not (source / CONFIG).is_file() and (source / TRANSFORMER / CONFIG).is_file()
    return source / TRANSFORMER if is_pipeline else source


def _read_config(source: Path) -> dict[str, Any]:
    path = (source if source.is_dir() else source.parent) / CONFIG
    config = read_json(path)
    if config is None:
        raise ValueError(
            f"--from {source}: there is no {path}, without which it is not known how many heads "
            "the transformer has. Name a folder that diffusers saved, with its config.json."
        )
    return config


def _warn_of_objective(job_config: MixtureJobConfig) -> None:
    """Say if a model predicts another thing than Stable Diffusion 3."""
    if job_config.objective.kind != "flow":
        logger.warning(
            f"objective.kind = {job_config.objective.kind!r}: Stable Diffusion 3 predicts the "
            "velocity of 'flow'. The model computes the same here and there, but what it puts "
            "out is read as something else."
        )
