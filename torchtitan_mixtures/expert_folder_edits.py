"""Changes of folders of experts: made of runs, experts added, removed and exchanged.

Every change writes what is new beside what is there, and `config.json` last: whoever reads the
folder in between, or after a kill, finds it as it was or as it is to be.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures import checkpoint_config, expert_files
from torchtitan_mixtures.checkpoint_loading import LoadedModel, load_model, rebuild
from torchtitan_mixtures.checkpoint_writing import check_out
from torchtitan_mixtures.expert_folder import (
    COMMAND,
    SEEN,
    UNROUTED,
    Mixture,
    check_alike,
    check_name,
    read_mixture,
    write_config,
    write_expert,
    write_mixture,
)
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.models.mixdiff.args import MixDiffModelArgs, flavor_args
from torchtitan_mixtures.models.mixdiff.model import MixtureOfDiffusers
from torchtitan_mixtures.objectives.denoising import is_mixture_of_diffusers


@dataclass(frozen=True)
class Source:
    """A model that is to be an expert."""

    name: str
    path: Path
    flavor: str
    model_args: Any
    job_config: MixtureJobConfig
    tensors: dict[str, Tensor]


def parse_expert(text: str) -> tuple[str, Path]:
    """Read `NAME=FOLDER`.

    Raises:
        ValueError: It is something else, or the name is none.
    """
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise ValueError(f"--expert {text}: must be NAME=FOLDER.")
    with _named(f"--expert {text}"):
        check_name(name)
    return name, Path(folder).expanduser()


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Put in front of messages what they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def read_source(name: str, folder: Path, averaged: bool = True) -> Source:
    """Load a model that is to be an expert: of a run, or of an expert's folder.

    Raises:
        ValueError: There is none, or one that cannot be an expert.
    """
    with _named(f"--expert {name}={folder}"):
        loaded = load_model(folder, averaged=averaged)
        model = loaded.job_config.model
        flavor, args = f"{model.name}/{model.flavor}", loaded.model_args
        if is_mixture_of_diffusers(args):
            raise ValueError(
                f"is a mixture itself; name one of its experts: `{COMMAND} export`, then "
                f"experts/NAME of the folder."
            )
        _check_flavor(flavor, args)
        return Source(name, folder, flavor, args, loaded.job_config, _parameters(loaded))


def _parameters(loaded: LoadedModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in loaded.model.named_parameters()}


def _check_flavor(flavor: str, args: Any) -> None:
    """Check that a model is what its flavour makes of what it sees."""
    plain = flavor_args(flavor)
    fields = {field.name for field in dataclasses.fields(args)} - {*SEEN, "init_seed"}
    for name in sorted(fields):
        if getattr(args, name) != getattr(plain, name):
            raise ValueError(
                f"was trained as {flavor} with {name} = {getattr(args, name)!r}, where the flavour "
                f"has {getattr(plain, name)!r}; an expert must be a flavour as it is."
            )


def _unrouted(path: Path) -> tuple[str, ...]:
    """The experts that a router has not learned, of a folder of experts; runs teach all."""
    return read_mixture(path).unrouted if expert_files.is_mixture(path) else ()


def export(checkpoint: str, out: Path, averaged: bool = True) -> Mixture:
    """Make a folder of experts of a run of a mixture.

    Raises:
        ValueError: The run is of something else, or the folder is not empty.
    """
    check_out(out)
    loaded = load_model(checkpoint, averaged=averaged)
    args = loaded.model_args
    if not is_mixture_of_diffusers(args) or args.router_only:
        raise ValueError(f"--checkpoint {checkpoint}: is no mixture of diffusers with experts.")
    write_mixture(out, loaded.job_config, args, _parameters(loaded), _unrouted(loaded.path))
    return read_mixture(out)


def assemble(
    out: Path, sources: Sequence[Source], router: str | None, averaged: bool = True
) -> Mixture:
    """Make a folder of experts of models that were trained in jobs of their own.

    Args:
        out: The folder, new or empty.
        sources: The experts, in order.
        router: A run of a router, or of a mixture, or a folder of experts; None: a new router,
            which gives all experts alike.
        averaged: Take averages of parameters, where there are some.

    Raises:
        ValueError: Experts see different things, or the router knows other experts.
    """
    check_out(out)
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"--expert: the names {', '.join(names)} are not different.")
    first = sources[0]
    for source in sources[1:]:
        check_alike(
            f"the expert {first.name!r} ({first.path})", first.model_args, first.job_config,
            f"{source.name!r} ({source.path})", source.model_args, source.job_config,
        )  # fmt: skip
    unrouted: tuple[str, ...] = ()
    if router is None:
        args, job, tensors = _new_router(sources)
        unrouted = tuple(names)
    else:
        with _named(f"--router {router}"):
            args, job, tensors, unrouted = _read_router(router, sources, averaged)
    state = {f"{expert_files.ROUTER}.{name}": tensor for name, tensor in tensors.items()}
    for source in sources:
        prefix = f"{expert_files.EXPERTS}.{source.name}"
        state |= {f"{prefix}.{name}": tensor for name, tensor in source.tensors.items()}
    write_mixture(out, job, args, state, unrouted)
    return read_mixture(out)


def _new_router(sources: Sequence[Source]) -> tuple[Any, MixtureJobConfig, dict[str, Tensor]]:
    """A router that prefers no expert."""
    first = sources[0]
    flavors = tuple(source.flavor for source in sources)
    seen = {
        name: getattr(first.model_args, name) for name in SEEN if hasattr(first.model_args, name)
    }
    args = MixDiffModelArgs(
        experts=flavors,
        expert_names=tuple(source.name for source in sources),
        top_k=min(2, len(sources)),
        router="linear",
        router_inputs=("prompt", "latent", "time"),
        **seen,
    )
    alone = dataclasses.replace(args, router_only=True)
    model = MixtureOfDiffusers(alone)
    with torch.no_grad():
        model.init_weights()
        for name in expert_files.HEAD:
            model.router.get_parameter(name).zero_()
    return args, _job_of_all(sources), dict(model.router.state_dict())


def _job_of_all(sources: Sequence[Source]) -> MixtureJobConfig:
    """The job of the first expert, on the images of all: each may have seen its domain alone."""
    job = copy.deepcopy(sources[0].job_config)
    data = [source.job_config.multimodal for source in sources]
    domains = {name for each in data for name in each.train_domains}
    is_divided = all(each.train_domains for each in data)
    is_alike = len({(each.domains, each.domain_column) for each in data}) == 1
    job.multimodal.train_domains = sorted(domains) if is_divided and is_alike else []
    job.multimodal.domain_shares = {}
    return job


def _read_router(
    folder: str, sources: Sequence[Source], averaged: bool
) -> tuple[Any, MixtureJobConfig, dict[str, Tensor], tuple[str, ...]]:
    """The router of a run or of a folder, its rows in the order of the experts.

    Also says which of them it has not learned.
    """
    loaded = load_model(folder, averaged=averaged)
    known = loaded.model_args
    if not is_mixture_of_diffusers(known):
        raise ValueError(f"{loaded.path} is no mixture of diffusers and no router of one.")
    names = [source.name for source in sources]
    if sorted(names) != sorted(known.names):
        raise ValueError(
            f"it tells the experts {', '.join(known.names)}, and --expert names "
            f"{', '.join(names)}; name the same."
        )
    first = sources[0]
    check_alike("the router", known, loaded.job_config, f"the expert {first.name!r}",
                first.model_args, first.job_config)  # fmt: skip
    router: Any = loaded.model
    tensors = dict(router.router.state_dict())
    rows = [known.names.index(name) for name in names]
    for name in expert_files.HEAD:
        tensors[name] = tensors[name][rows]
    args = dataclasses.replace(
        known,
        experts=tuple(source.flavor for source in sources),
        expert_names=tuple(names),
        router_only=False,
    )
    return args, loaded.job_config, tensors, _unrouted(loaded.path)


# --- changes in place -----------------------------------------------------------------------------


def add(folder: Path, source: Source) -> Mixture:
    """Add an expert, which the router does not know: it is not used until a job teaches it.

    Raises:
        ValueError: There is an expert of that name, or they cannot be in one mixture.
    """
    mixture = read_mixture(folder)
    if source.name in mixture.names:
        raise ValueError(
            f"--expert {source.name}=...: {folder} has an expert of that name; replace it, or name "
            "another."
        )
    _check_fits(mixture, source)
    _write(mixture, source)
    args = mixture.model_args
    return _change(
        mixture,
        [*args.experts, source.flavor],
        [*args.names, source.name],
        [*mixture.unrouted, source.name],
    )


def replace(folder: Path, source: Source) -> Mixture:
    """Put another model in the place of an expert; the router keeps its row.

    Raises:
        ValueError: There is no expert of that name, or it cannot be in this mixture.
    """
    mixture = read_mixture(folder)
    number = _find(mixture, source.name)
    _check_fits(mixture, source)
    if mixture.model_args.experts[number] != source.flavor:
        # Between its weights and `config.json` the folder would be of neither.
        raise ValueError(
            f"--expert {source.name}=...: is {source.flavor}, and the one in {folder} "
            f"{mixture.model_args.experts[number]}; remove that and add this one."
        )
    _write(mixture, source)
    return read_mixture(folder)


def remove(folder: Path, name: str) -> Mixture:
    """Remove an expert, its row of the router and its folder.

    Raises:
        ValueError: There is no expert of that name, or no other one.
    """
    mixture = read_mixture_without(folder, name)
    args = mixture.model_args
    number = _find(mixture, name)
    if len(args.names) == 1:
        raise ValueError(f"--name {name}: is the only expert of {folder}.")
    experts, names = list(args.experts), list(args.names)
    del experts[number], names[number]
    unrouted = [each for each in mixture.unrouted if each != name]
    changed = _change(mixture, experts, names, unrouted)
    router = expert_files.read_router(folder, names, unrouted)
    expert_files.write_router(folder, router, names)
    shutil.rmtree(expert_files.expert_folder(folder, name), ignore_errors=True)
    return changed


def read_mixture_without(folder: Path, name: str) -> Mixture:
    """Read a folder whose expert of this name may be missing, which removing it mends."""
    own = expert_files.expert_folder(folder, name)
    if expert_files.is_mixture(folder) and not own.exists():
        saved = checkpoint_config.read(folder)
        job_config, model_args = rebuild(folder, saved)
        return Mixture(folder, model_args, job_config, tuple(saved.get(UNROUTED, ())))
    return read_mixture(folder)


def _find(mixture: Mixture, name: str) -> int:
    if name not in mixture.names:
        raise ValueError(f"{name}: {mixture.path} has the experts {', '.join(mixture.names)}.")
    return mixture.names.index(name)


def _check_fits(mixture: Mixture, source: Source) -> None:
    check_alike(
        f"{source.name!r} ({source.path})", source.model_args, source.job_config,
        str(mixture.path), mixture.model_args, mixture.job_config,
    )  # fmt: skip


def _write(mixture: Mixture, source: Source) -> None:
    write_expert(
        mixture.path,
        source.name,
        source.job_config,
        source.flavor,
        source.model_args,
        source.tensors,
    )


def _change(
    mixture: Mixture, experts: Sequence[str], names: Sequence[str], unrouted: Sequence[str]
) -> Mixture:
    """Write a `config.json` with other experts."""
    known = mixture.model_args
    args = dataclasses.replace(
        known,
        experts=tuple(experts),
        expert_names=tuple(names),
        top_k=min(known.top_k, len(experts)),
    )
    write_config(mixture.path, mixture.job_config, args, unrouted)
    return read_mixture(mixture.path)


def describe(mixture: Mixture) -> str:
    """A table of the experts of a folder."""
    args, rows = mixture.model_args, [("name", "model", "parameters", "M multiply-adds", "routed")]
    for name, flavor, own in zip(args.names, args.experts, args.expert_args, strict=True):
        with torch.device("meta"):
            model = get_train_spec(flavor.partition("/")[0]).model_cls(own)
        count = sum(parameter.numel() for parameter in model.parameters())
        macs = getattr(own, "total_macs_per_image", own.macs_per_image)()
        is_routed = "no" if name in mixture.unrouted else "yes"
        rows.append((name, flavor, f"{count:,}", f"{macs / 1e6:,.1f}", is_routed))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    what = f"router: {args.router} on {', '.join(args.router_inputs)}; top {args.top_k}"
    return "\n".join([*(line.rstrip() for line in lines), what])
