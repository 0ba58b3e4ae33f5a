"""Nested models out of dense ViTs of other libraries, and dense ViTs out of nested models.

What is exchanged is safetensors and JSON, which cannot run code; pickled weights are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from torchtitan.tools.logging import logger

from torchtitan_mixtures.checkpoint_loading import load_model
from torchtitan_mixtures.checkpoint_writing import check_out, write_weights
from torchtitan_mixtures.checks import check_data
from torchtitan_mixtures.models.mone import dense_vit, dense_vit_config
from torchtitan_mixtures.models.mone.args import MoNEModelArgs
from torchtitan_mixtures.models.mone.model import MoNE
from torchtitan_mixtures.safetensors_files import read_json, read_weights
from torchtitan_mixtures.train import parse_job

WEIGHTS = "model"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
Format = Literal["huggingface", "timm"]


class _Checkpoint(NamedTuple):
    """A dense ViT of another library, as it is on disk."""

    weights: dict[str, Tensor]
    config: dict[str, Any] | None
    preprocessor: dict[str, Any] | None


def import_vit(
    source: Path,
    arguments: Sequence[str],
    out: Path,
    *,
    image_size: int | None = None,
    new_head: bool = False,
) -> MoNEModelArgs:
    """Write a checkpoint that a nested (or dense) model begins with, out of a dense ViT.

    With all tokens at the largest expert the model computes what the ViT does. Routers and alpha,
    which a ViT does not have, are initialised as in a new model.

    Args:
        source: Folder with `model.safetensors` and `config.json`, or a safetensors file.
        arguments: Of training: `--config FILE.toml`, and keys that differ from it.
        out: A new or empty folder.
        image_size: Interpolate positions for images of this size, which becomes
            `multimodal.image_size`; None: they must fit.
        new_head: Leave the head out, and initialise another.

    Returns:
        Arguments of the model.

    Raises:
        ValueError: The ViT is another than the TOML's model; says in what.
    """
    check_out(out)
    if image_size is not None:
        arguments = [*arguments, f"--multimodal.image_size={image_size}"]
    job_config = parse_job(arguments, check=lambda _: None)
    if job_config.model.name != "mone":
        raise ValueError(
            f"model.name = {job_config.model.name!r}: a ViT becomes a model of the family 'mone'."
        )
    args = cast(MoNEModelArgs, check_data(job_config))
    folder = source if source.is_dir() else source.parent
    checkpoint = _Checkpoint(
        read_weights(source, WEIGHTS), read_json(folder / CONFIG), read_json(folder / PREPROCESSOR)
    )
    convert = _check_config(source, checkpoint, args)
    state = convert(checkpoint.weights, args, new_head=new_head, new_size=image_size is not None)
    if args.is_nested and args.alpha_init != 0:
        logger.warning(
            f"nested.alpha_init = {args.alpha_init}: with it the model does not begin as the ViT; "
            "with 0 it does, with all tokens at the largest expert."
        )
    write_weights(out, job_config, args, _complete(state, args))
    return args


def _complete(state: dict[str, Tensor], args: MoNEModelArgs) -> dict[str, Tensor]:
    """Add what a dense ViT does not have, initialised as in a new model."""
    with torch.device("meta"):
        model = MoNE(args)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights()
    initial = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return initial | {name: tensor.float().contiguous() for name, tensor in state.items()}


def _check_config(
    source: Path, checkpoint: _Checkpoint, args: MoNEModelArgs
) -> Callable[..., dict[str, Tensor]]:
    """Check what a ViT's files say beside its weights, and choose what converts the weights."""
    config, names = checkpoint.config, checkpoint.weights.keys()
    is_timm = any(name.startswith("blocks.") for name in names)
    if not is_timm and not any("encoder.layer." in name for name in names):
        raise ValueError(
            f"{source}: not a ViT of transformers or timm; it has {', '.join(sorted(names)[:3])}"
            f"{', ...' if len(names) > 3 else ''}."
        )
    if config is None:
        logger.warning(
            f"{source}: without {CONFIG}; that it has {args.n_heads} heads, norms with eps "
            f"{args.norm_eps:g}, exact GELU and pool = {args.pool!r} as the flavour is taken for "
            "granted."
        )
    if is_timm:
        if config is not None:
            dense_vit_config.check_timm(config, args)
            dense_vit_config.warn_of_normalization(config.get("pretrained_cfg") or {}, "")
        dense_vit_config.warn_of_timm_eps(args)
        return dense_vit.from_timm
    if config is not None:
        dense_vit_config.check_huggingface(config, args)
    dense_vit_config.warn_of_normalization(checkpoint.preprocessor or {}, "image_")
    return dense_vit.from_huggingface


def export_vit(
    source: Path,
    format: Format,
    out: Path,
    *,
    expert: int | None = None,
    averaged: bool = True,
) -> int:
    """Write one expert of a nested model as a dense ViT.

    Args:
        source: A run's folder, its checkpoints, or one of them.
        format: Whose names and `config.json` to write.
        out: A new or empty folder.
        expert: From 0, the smallest; None: the largest.
        averaged: Take the average of the parameters if the checkpoint has one.

    Returns:
        The expert.

    Raises:
        ValueError: No dense ViT of this format computes what the expert does.
    """
    check_out(out)
    loaded = load_model(source, averaged=averaged)
    args = loaded.model_args
    if not isinstance(args, MoNEModelArgs):
        raise ValueError(
            f"{loaded.path}: a checkpoint of {loaded.job_config.model.name}; only those of mone "
            "can be exported as ViTs."
        )
    expert = args.num_experts - 1 if expert is None else expert
    state = {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}
    state = dense_vit.dense_state(state, args, expert)
    if format == "timm":
        dense_vit_config.warn_of_timm_eps(args)
        state = dense_vit.to_timm(state, args)
        files = {CONFIG: dense_vit_config.timm_config(args)}
    else:
        state = dense_vit.to_huggingface(state, args)
        files = {
            CONFIG: dense_vit_config.huggingface_config(args),
            PREPROCESSOR: dense_vit_config.huggingface_preprocessor(args),
        }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    weights = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(weights, out / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
    return expert
