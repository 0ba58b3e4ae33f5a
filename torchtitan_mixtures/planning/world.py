"""One process that stands for one rank of any number: nothing is sent, and nothing waits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.distributed import ParallelDims

from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.planning.collectives import Group

BETWEEN_LAYERS = ("tp", "cp")
"""Dimensions over which tensors of a model travel; functional collectives carry them."""

AROUND_LAYERS = ("pp", "fsdp", "dp_replicate")
"""Those over which parameters and gradients travel, and whole streams between stages. Ranks of
context parallelism hold parts of the parameters too, so they are among those of `fsdp`."""


@contextmanager
def world_size_in_environment(world_size: int) -> Iterator[None]:
    """Let checks of a job see so many processes, as `torchrun` would tell them."""
    with _environment({"WORLD_SIZE": str(world_size)}):
        yield


@contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    """Be rank `rank` of `world_size` processes that are not there.

    PyTorch's default process group is made and destroyed, so no other may be in use.
    """
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": "1",
    }
    with _environment(variables):
        # DTensor remembers results with their meshes: those of an earlier world are equal to
        # ours, but name process groups that are gone, or that mean other ranks by now. Graphs of
        # an earlier model's blocks would let ours be compiled for sizes of any kind.
        _clear_sharding_prop_cache()
        torch.compiler.reset()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def make_dims(job_config: MixtureJobConfig, world_size: int) -> ParallelDims:
    """Build the layout of a job as the trainer does, without DDP.

    DDP copies gradients by their addresses, which fake ones have not. What it does is known
    without running it: see `planning/step.py`.
    """
    config = job_config.parallelism
    replicas = config.data_parallel_replicate_degree if is_ddp(job_config, world_size) else 1
    dims = ParallelDims(
        dp_shard=config.data_parallel_shard_degree,
        dp_replicate=config.data_parallel_replicate_degree // replicas,
        cp=config.context_parallel_degree,
        tp=config.tensor_parallel_degree,
        pp=config.pipeline_parallel_degree,
        ep=config.expert_parallel_degree,
        etp=config.expert_tensor_parallel_degree,
        world_size=world_size // replicas,
    )
    if dims.world_size > 1:
        dims.build_mesh()
    return dims


def is_ddp(job_config: MixtureJobConfig, world_size: int) -> bool:
    """Say whether ranks hold whole copies of the model (TorchTitan's rule)."""
    config = job_config.parallelism
    others = config.tensor_parallel_degree * config.context_parallel_degree
    others *= config.pipeline_parallel_degree
    replicas = config.data_parallel_replicate_degree
    is_cut = config.context_parallel_degree > 1  # FSDP deals parameters out to those ranks
    return replicas > 1 and replicas * others == world_size and not is_cut


def degrees_of(dims: ParallelDims, replicas: int) -> dict[str, int]:
    """Size of each dimension of a layout that has more than one rank."""
    sizes = {
        "dp_replicate": replicas,
        "dp_shard": dims.dp_shard,
        "cp": dims.cp,
        "tp": dims.tp,
        "pp": dims.pp,
    }
    return {name: size for name, size in sizes.items() if size > 1}


def group_dimensions(dims: ParallelDims) -> dict[Group, str]:
    """Say of each process group of this rank which dimension of the layout it spans."""
    names: dict[Group, str] = {}
    for is_functional, dimensions in ((True, BETWEEN_LAYERS), (False, AROUND_LAYERS)):
        for name in dimensions:
            mesh = dims.get_optional_mesh(name) if dims.world_size > 1 else None
            if mesh is not None:
                group = Group(mesh.get_group().group_name, is_functional)
                names.setdefault(group, name)
    return names
