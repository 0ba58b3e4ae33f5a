import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.gang import run_ranks
from torchtitan_mixtures.models.common import init
from torchtitan_mixtures.models.common.building import assign, initialise


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, 4))
        initialise(self)

    def init_weights(self):
        init.normal_(self.weight)


def test_pytorchs_seed_decides_about_modules_that_initialise_themselves():
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append((Layer().weight, Layer().weight))
    assert torch.equal(weights[0][0], weights[1][0]) and torch.equal(weights[0][1], weights[1][1])
    assert not torch.equal(weights[0][0], weights[0][1])
    assert not torch.equal(weights[0][0], weights[2][0])


def test_modules_without_memory_are_left_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with torch.device("meta"):
        assert Layer().weight.is_meta
    assert torch.equal(torch.get_rng_state(), state)


def test_values_take_the_type_of_the_parameter():
    parameter = nn.Parameter(torch.empty(2, 2, dtype=torch.bfloat16))
    assign(parameter, torch.eye(2, dtype=torch.int64))
    assert torch.equal(parameter, torch.eye(2, dtype=torch.bfloat16))


def shard_of_values():
    model = fully_shard(nn.Linear(2, 5), mesh=init_device_mesh("cpu", (2,)))
    assign(model.weight, torch.arange(10.0).view(5, 2))
    return model.weight.to_local().tolist()


@pytest.mark.distributed
def test_each_rank_keeps_its_shard_of_values():
    shards = run_ranks(shard_of_values, 2)
    assert torch.equal(torch.tensor(shards[0] + shards[1]), torch.arange(10.0).view(5, 2))
