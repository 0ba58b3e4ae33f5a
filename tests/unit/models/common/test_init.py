import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.gang import run_ranks
from torchtitan_mixtures.models.common import init


def layers():
    return nn.Sequential(nn.Linear(6, 10, bias=False), nn.Linear(10, 7, bias=False))


def draw(model, seed=0):
    with init.parameter_names(model, seed):
        for layer in model:
            init.trunc_normal_(layer.weight, std=0.5)
    return model


def test_parameters_are_drawn_by_seed_and_name():
    first, again, other = draw(layers()), draw(layers()), draw(layers(), seed=1)
    for index in range(2):
        assert torch.equal(first[index].weight, again[index].weight)
        assert not torch.equal(first[index].weight, other[index].weight)
    assert not torch.equal(first[0].weight.flatten()[:8], first[1].weight.flatten()[:8])


def test_global_generator_is_left_alone():
    model, state = layers(), torch.get_rng_state()
    draw(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrappers_in_a_name_do_not_change_the_weights():
    wrapped = nn.Sequential(*(nn.Sequential() for _ in range(2)))
    for index, layer in enumerate(layers()):
        wrapped[index].add_module("_checkpoint_wrapped_module", layer)
    with init.parameter_names(wrapped, 0):
        for layer in wrapped:
            init.trunc_normal_(layer[0].weight, std=0.5)
    for index, layer in enumerate(draw(layers())):
        assert torch.equal(wrapped[index][0].weight, layer.weight)


def test_unknown_parameters_are_refused():
    with pytest.raises(RuntimeError, match="parameter_names"):
        init.normal_(nn.Parameter(torch.empty(3)))


def test_cut_off_is_meant_in_values():
    with init.parameter_names(model := layers(), 0):
        init.trunc_normal_(model[0].weight, std=5.0, a=-0.1, b=0.2)
    assert model[0].weight.min() >= -0.1 and model[0].weight.max() <= 0.2


def test_stacked_matrices_are_drawn_as_matrices_of_their_own():
    model = nn.ParameterDict({"stack": nn.Parameter(torch.empty(5, 40, 20))})
    with init.parameter_names(model, 0):
        init.xavier_uniform_(model["stack"])
    bound = (6 / (40 + 20)) ** 0.5
    for matrix in model["stack"]:
        assert bound * 0.98 < matrix.abs().max() <= bound
        assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    with init.parameter_names(model, 0):
        init.xavier_uniform_(model["stack"], fan_in=2, fan_out=4)
    assert 0.98 < model["stack"].abs().max() <= 1


def shard(model, kind, world):
    if kind == "fsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    if kind == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        return fully_shard(model, mesh=mesh)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("fsdp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["fsdp"])


def local_shards(kind):
    model = draw(shard(layers(), kind, torch.distributed.get_world_size()))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return [parameter.to_local().tolist() for parameter in model.parameters()]


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "tp and fsdp"])
def test_shards_are_those_of_the_whole(kind):
    shards = run_ranks(local_shards, 4, kind)
    whole = [layer.weight for layer in draw(layers())]
    for index, weight in enumerate(whole):
        parts = [torch.tensor(local[index]) for local in shards]
        if kind == "fsdp":  # uneven: 10 and 7 rows on 4 ranks
            rebuilt = torch.cat(parts)
        elif kind == "hsdp":
            assert torch.equal(parts[0], parts[2]) and torch.equal(parts[1], parts[3])
            rebuilt = torch.cat(parts[:2])
        elif index == 0:  # ranks are (fsdp, tp); rows are cut by TP first, then by FSDP
            rebuilt = torch.cat([parts[0], parts[2], parts[1], parts[3]])
        else:
            top, bottom = torch.cat(parts[:2], dim=1), torch.cat(parts[2:], dim=1)
            rebuilt = torch.cat([top, bottom])
        assert torch.equal(rebuilt, weight)
