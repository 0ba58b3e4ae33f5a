"""Folders of experts: a mixture of diffusers that is exchanged, and that runs begin with.

What lies where says `expert_files.py`; `scripts/experts.py` makes and changes such folders.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.tools.logging import logger

from torchtitan_mixtures import checkpoint_config, expert_files
from torchtitan_mixtures.checkpoint_loading import rebuild
from torchtitan_mixtures.diffusers_config import Diffusers
from torchtitan_mixtures.ema import plain_name
from torchtitan_mixtures.job_config import Mixture as MixtureSection
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.models.common.building import assign

FAMILY = "mixdiff"
COMMAND = "python scripts/experts.py"

UNROUTED = "unrouted"
"""Key of a mixture's `config.json`: the experts that its router has not learned."""

SEEN = ("in_channels", "image_size", "num_classes", "prompts", "learned_variance")
"""Fields of arguments that say what a model sees and predicts."""

_ROUTER_FIELDS = {
    "router": "diffusers.router",
    "router_inputs": "diffusers.router_inputs",
    "router_dim": "model.flavor",
    "router_layers": "model.flavor",
    "router_heads": "model.flavor",
    "router_patch_size": "model.flavor",
}
"""Fields that make a router what it is, and what decides them."""


@dataclass(frozen=True)
class Mixture:
    """A folder of experts that was read, but for its weights."""

    path: Path
    model_args: Any
    job_config: MixtureJobConfig
    unrouted: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its experts, in order."""
        return self.model_args.names

    @property
    def has_learned(self) -> bool:
        """Whether its router has learned anything."""
        return not set(self.names) <= set(self.unrouted)

    @property
    def flavors(self) -> dict[str, str]:
        """Family and flavour of each expert, by name."""
        return dict(zip(self.names, self.model_args.experts, strict=True))


# --- reading --------------------------------------------------------------------------------------


def read_mixture(folder: str | Path) -> Mixture:
    """Read a folder of experts, and check that it is whole.

    Raises:
        ValueError: It is no such folder; an expert is missing, or another one than the folder says,
            or sees or predicts something else than the others. Names it, and the remedy.
    """
    path = Path(folder).expanduser()
    if not expert_files.is_mixture(path):
        raise ValueError(
            f"{path}: is no folder of experts, with config.json, router/{expert_files.WEIGHTS} and "
            f"experts/; make one with `{COMMAND} export` or `assemble`."
        )
    saved = checkpoint_config.read(path)
    if saved.get("family") != FAMILY:
        raise ValueError(f"{path}: holds a model of {saved.get('family')!r}, no experts.")
    job_config, model_args = rebuild(path, saved)
    args: Any = model_args
    mixture = Mixture(path, args, job_config, tuple(saved.get(UNROUTED, ())))
    for name, (family, expert_args) in zip(args.names, args.parts, strict=True):
        _check_expert(mixture, name, family, expert_args)
    _check_shapes(path / expert_files.ROUTER, _shapes_of_router(args, path))
    lacking = {*args.names} - {*expert_files.read_rows(path), *mixture.unrouted}
    if lacking:
        raise ValueError(
            f"{path}: its router has no row for {', '.join(sorted(lacking))}; put its file back, "
            f'or name them in "{UNROUTED}" of {expert_files.CONFIG}.'
        )
    return mixture


def _check_expert(mixture: Mixture, name: str, family: str, expert_args: Any) -> None:
    """Check that an expert is there, and that it is what the mixture says."""
    folder = expert_files.expert_folder(mixture.path, name)
    if not expert_files.is_single(folder):
        raise ValueError(
            f"{folder}: the expert {name!r} of {mixture.path} is missing; put its folder back, or "
            f"`{COMMAND} remove --mixture {mixture.path} --name {name}`."
        )
    saved = checkpoint_config.read(folder)
    own_job, own_args = rebuild(folder, saved)
    if saved["family"] != family:
        raise ValueError(
            f"{folder}: is a model of {saved['family']!r}, the mixture has {family!r}."
        )
    check_alike(str(folder), own_args, own_job, str(mixture.path), expert_args, mixture.job_config)
    _check_shapes(folder, checkpoint_config.parameter_shapes(family, expert_args))


def check_alike(
    first: str, args: Any, job: MixtureJobConfig, second: str, others: Any, other: MixtureJobConfig
) -> None:
    """Check that two models see and predict the same, so that their predictions can be summed.

    Args:
        first: What the first one is called.
        args: Its arguments.
        job: The configuration of its run.
        second: What the second one is called.
        others: Its arguments.
        other: The configuration of its run.

    Raises:
        ValueError: Names both, and what differs.
    """
    pairs = {
        name: (getattr(args, name), getattr(others, name))
        for name in SEEN
        if hasattr(args, name) and hasattr(others, name)
    }
    keys = ["kind"]
    if job.objective.kind == other.objective.kind == "ddpm":
        keys += ["noise_steps", "noise_schedule"]
    for key in keys:
        pairs[f"objective.{key}"] = getattr(job.objective, key), getattr(other.objective, key)
    pairs["multimodal.vae"] = job.multimodal.vae, other.multimodal.vae
    told = [bool(getattr(each, "is_prompted", False)) for each in (args, others)]
    kinds = ["prompts" if flag else "classes" for flag in told]
    pairs["what they are told"] = kinds[0], kinds[1]
    if not any(told):
        pairs.pop("prompts", None)
    wrong = [f"{name} is {a!r} and {b!r}" for name, (a, b) in pairs.items() if a != b]
    if wrong:
        raise ValueError(
            f"{first} and {second} cannot be in one mixture: {'; '.join(wrong)}. Use models that "
            "were trained on images of one kind."
        )


def _shapes_of_router(args: Any, path: Path) -> dict[str, list[int]]:
    shapes = checkpoint_config.parameter_shapes(FAMILY, dataclasses.replace(args, router_only=True))
    found = expert_files.read_shapes(path / expert_files.ROUTER / expert_files.WEIGHTS)
    shapes = {name.removeprefix("router."): shape for name, shape in shapes.items()}
    for name in expert_files.HEAD:  # has rows for the experts that the router has learned
        shapes[name] = [*found.get(name, [0])[:1], *shapes[name][1:]]
    return shapes


def _check_shapes(folder: Path, shapes: Mapping[str, list[int]]) -> None:
    path = folder / expert_files.WEIGHTS
    found = expert_files.read_shapes(path)
    for name in [*shapes, *(name for name in found if name not in shapes)]:
        if shapes.get(name) != found.get(name):
            raise ValueError(
                f"{path}: {name} is {found.get(name, 'absent')}, but {expert_files.CONFIG} beside "
                f"it says {shapes.get(name, 'that there is none')}; they are not of one model."
            )


# --- writing --------------------------------------------------------------------------------------


def write_mixture(
    out: Path,
    job_config: MixtureJobConfig,
    model_args: Any,
    state: Mapping[str, Tensor],
    unrouted: Sequence[str] = (),
) -> None:
    """Write a folder of experts, whole or not at all.

    Args:
        out: The folder, which must be new or empty.
        job_config: Of the run that the mixture is of.
        model_args: The mixture's arguments.
        state: Its parameters by name.
        unrouted: Experts that the router has not learned.
    """
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    expert_files.write_router(partial, _below(state, expert_files.ROUTER), model_args.names)
    for name, flavor, args in zip(
        model_args.names, model_args.experts, model_args.expert_args, strict=True
    ):
        tensors = _below(state, f"{expert_files.EXPERTS}.{name}")
        write_expert(partial, name, job_config, flavor, args, tensors)
    write_config(partial, job_config, model_args, unrouted)
    if out.exists():
        out.rmdir()
    partial.replace(out)


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    prefix += "."
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def write_expert(
    folder: Path,
    name: str,
    job_config: MixtureJobConfig,
    flavor: str,
    model_args: Any,
    tensors: Mapping[str, Tensor],
) -> None:
    """Write one expert of a mixture, its weights first.

    Args:
        folder: The mixture's.
        name: The expert's.
        job_config: Of a run that it was trained in.
        flavor: Its family and flavour, "mom/DiT-S/4".
        model_args: Its arguments.
        tensors: Its parameters by name.
    """
    job = _without_mixture(job_config)
    job.model.name, _, job.model.flavor = flavor.partition("/")
    own = expert_files.expert_folder(folder, name)
    expert_files.write_tensors(own / expert_files.WEIGHTS, tensors)
    checkpoint_config.write(own, job, model_args, weights_only=True)


def write_config(
    folder: Path, job_config: MixtureJobConfig, model_args: Any, unrouted: Sequence[str]
) -> None:
    """Write the `config.json` of a mixture, complete or not at all."""
    job = _without_mixture(job_config)
    # As the folder is now, not as in the run: experts may be other ones, and tools that score the
    # mixture must score its prediction, also if the run trained a router alone.
    job.mixture.top_k = model_args.top_k
    job.diffusers = Diffusers(
        experts=list(model_args.experts),
        router=model_args.router,
        router_inputs=list(model_args.router_inputs),
        renormalize="yes" if model_args.renormalize else "no",
    )
    if job.model.name != FAMILY:  # of an expert's run; [diffusers] says what the flavour does not
        job.model.name, job.model.flavor = FAMILY, "debugmodel"
    beside = folder / ".config"
    checkpoint_config.write(beside, job, model_args, weights_only=True)
    content = json.loads((beside / expert_files.CONFIG).read_text()) | {UNROUTED: list(unrouted)}
    shutil.rmtree(beside)
    partial = folder / f"{expert_files.CONFIG}.partial"
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, folder / expert_files.CONFIG)


def _without_mixture(job_config: MixtureJobConfig) -> MixtureJobConfig:
    """A copy without what was about one run of the mixture."""
    job = copy.deepcopy(job_config)
    job.ema.decay = 0.0  # what is written is the average, if there was one
    job.mixture, job.diffusers = MixtureSection(), Diffusers()
    return job


def check_name(name: str) -> None:
    """Refuse names that no expert can have.

    Raises:
        ValueError: Names it, and what is allowed.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"{name!r}: the name of an expert has letters, digits, _ and - alone, and is no method "
            "of Python's dictionaries."
        )


# --- runs that begin with a folder ----------------------------------------------------------------


def check_start(job_config: MixtureJobConfig, model_args: Any) -> None:
    """Check that a job can begin with the folder that `diffusers.start` names.

    Args:
        job_config: The job.
        model_args: The flavour's arguments, complete.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    config = job_config.diffusers
    try:
        mixture = read_mixture(config.start)
        check_alike("the job", model_args, job_config, config.start, mixture.model_args,
                    mixture.job_config)  # fmt: skip
    except ValueError as error:
        raise ValueError(f'diffusers.start = "{config.start}": {error}') from None
    for field, key in _ROUTER_FIELDS.items() if mixture.has_learned else ():
        ours, theirs = getattr(model_args, field), getattr(mixture.model_args, field)
        if ours != theirs:
            raise ValueError(
                f'diffusers.start = "{config.start}": its router has {field} = {theirs!r}, the '
                f"job's {ours!r}; set {key} as it was."
            )
    if model_args.router_only:
        return
    ours, theirs = dict(zip(model_args.names, model_args.experts, strict=True)), mixture.flavors
    for name in ours.keys() & theirs.keys():
        if ours[name] != theirs[name]:
            raise ValueError(
                f'diffusers.start = "{config.start}": its expert {name!r} is {theirs[name]}, the '
                f"job's {ours[name]}; set diffusers.experts as it was."
            )
    if not ours.keys() & theirs.keys():
        raise ValueError(
            f'diffusers.start = "{config.start}": has the experts {", ".join(theirs)}, and the job '
            f"{', '.join(ours)}: none of them. Names are those of multimodal.domains."
        )
    _check_copies(config, ours, theirs)


def _check_copies(config: Diffusers, ours: dict[str, str], theirs: dict[str, str]) -> None:
    source = config.new_expert_from
    if not source:
        return
    what = f'diffusers.new_expert_from = "{source}"'
    if source not in theirs:
        raise ValueError(f"{what}: {config.start} has the experts {', '.join(theirs)}.")
    new = {name: flavor for name, flavor in ours.items() if name not in theirs}
    if not new:
        raise ValueError(
            f"{what}: the job has no expert that {config.start} lacks; remove the key."
        )
    for name, flavor in new.items():
        if flavor != theirs[source]:
            raise ValueError(
                f"{what}: it is {theirs[source]}, the new expert {name!r} {flavor}; name another "
                "one, or none."
            )


@torch.no_grad()
def start_from(model: nn.Module, model_args: Any, config: Diffusers) -> None:
    """Give a model the weights of a folder, by the names of experts.

    A router that has learned nothing is left out. New experts become copies of
    `diffusers.new_expert_from`, or stay as they are. Their rows of the router's head are zero, as
    are those of experts that the folder's router has not learned.

    Args:
        model: A `MixtureOfDiffusers`; its parameters may be sharded.
        model_args: Its arguments.
        config: The `[diffusers]` section, checked by `check_start`.
    """
    mixture = read_mixture(config.start)
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    known = [name for name in mixture.names if name not in mixture.unrouted]
    router: dict[str, Tensor] = {}
    if mixture.has_learned:
        router = expert_files.read_router(mixture.path, model_args.names)
    for row, name in enumerate(model_args.names):
        if router and name not in known:
            router["head.bias"][row] = 0.0
            router["head.weight"][row] = 0.0
    for name, values in router.items():
        assign(parameters[f"{expert_files.ROUTER}.{name}"], values)
    new = []
    for name in () if model_args.router_only else model_args.names:
        source = name if name in mixture.names else config.new_expert_from
        new += [] if name in mixture.names else [name]
        if not source:
            continue
        path = expert_files.expert_folder(mixture.path, source) / expert_files.WEIGHTS
        for parameter, values in expert_files.read_tensors(path)[0].items():
            assign(parameters[f"{expert_files.EXPERTS}.{name}.{parameter}"], values)
    left = [name for name in mixture.names if name not in model_args.names]
    logger.info(
        f"Begins with the experts of {mixture.path}"
        + (f"; new: {', '.join(new)}" if new else "")
        + (f"; not in this job: {', '.join(left)}" if left else "")
    )
