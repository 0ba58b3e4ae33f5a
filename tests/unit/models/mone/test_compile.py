import copy

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from tests.unit.models.mone.helpers import build, randn, random_images, tiny_args
from torchtitan_mixtures.classifier_config import Nested
from torchtitan_mixtures.models.mone.block import NestedBlock
from torchtitan_mixtures.models.mone.capacity import Budget

ADAPTIVE = Nested().capacities  # nine
# 64 tokens of width 16: no two of the nine capacities have the same budget.
SIZES = {"image_size": 16, "num_experts": 4, "capacity": 0.5}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A backend that counts graphs."""

    def __init__(self, name="aot_eager"):
        self.graphs = []
        self.backend = torch._dynamo.lookup_backend(name)

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return self.backend(graph, inputs)


def compiled_twin(model, counter):
    """Each block by itself, as `parallelize` compiles them."""
    twin = copy.deepcopy(model)
    for block in twin.layers.values():
        block.compile(backend=counter, fullgraph=True)
    return twin


def results(model, images, budget, scores=None):
    model.zero_grad()
    output = model(images, budget, scores)
    (output.logits * randn(*output.logits.shape, seed=8)).sum().backward()
    return output.logits.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("budget", [Budget((2, 1, 3, 2)), Budget((0, 0, 0, 5), 3)], ids=str)
def test_a_block_is_one_graph_with_the_same_numbers_and_gradients(budget):
    block = NestedBlock(16, 2, 4).double()
    counter = Counter()
    compiled = torch.compile(copy.deepcopy(block), backend=counter, fullgraph=True)
    for seed in range(2):
        x, offset = randn(3, 8, 16, seed=seed), randn(3, 8, 1, seed=seed)
        outputs = []
        for module in (block, compiled):
            module.zero_grad()
            inputs = [x.clone().requires_grad_(), offset.clone().requires_grad_()]
            y = module(inputs[0], budget, inputs[1])
            y.square().sum().backward()
            outputs.append([y, *(t.grad for t in inputs), *(p.grad for p in module.parameters())])
        torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-11)
    assert len(counter.graphs) == 1


def test_each_capacity_is_a_graph_and_none_is_compiled_twice():
    args = tiny_args(**SIZES)
    model, counter = build(args), Counter()
    compiled, images = compiled_twin(model, counter), random_images(args)
    for capacity in (0.3, 0.6, 0.3, 0.6, 0.9, 0.3):
        budget = args.budget(capacity)
        # An equal budget, not the same object.
        found = results(compiled, images, Budget(tuple(budget.tokens)))
        torch.testing.assert_close(found, results(model, images, budget), rtol=1e-10, atol=1e-10)
    # Both blocks share theirs.
    assert len(counter.graphs) == 3


@pytest.mark.parametrize(
    ("fields", "graphs"),
    [
        ({}, 1),
        ({"num_experts": 1}, 1),
        ({"num_routers": 2, "alpha_per_layer": True, "pool": "class_token"}, 1),
        ({"allocation": "skip"}, 1),
        ({"routing": "argmax"}, 1),
        # Dense blocks, the first one behind the router, and all others: dynamo tells apart whether
        # what enters is a view, once it has seen views of other shapes.
        ({"router_layer": 1}, 3),
    ],
    ids=str,
)
def test_models_of_all_kinds_compile(fields, graphs):
    args = tiny_args(**{"n_layers": 3, **fields})
    model, counter = build(args), Counter()
    compiled = compiled_twin(model, counter)
    for seed in range(2):
        images = random_images(args, seed=seed)
        found = results(compiled, images, None)
        torch.testing.assert_close(found, results(model, images, None), rtol=1e-10, atol=1e-10)
    assert len(counter.graphs) == graphs


def test_adaptive_training_is_nine_graphs_with_a_limit_of_dynamo_that_allows_them():
    args = tiny_args(n_layers=1, **SIZES)
    budgets = [args.budget(capacity) for capacity in ADAPTIVE]
    assert len({*budgets}) == 9
    model, counter = build(args), Counter("eager")
    compiled, images = compiled_twin(model, counter), random_images(args)
    with torch._dynamo.config.patch(recompile_limit=16):
        for _ in range(2):
            for budget in budgets:
                found = compiled(images, budget).logits
                torch.testing.assert_close(found, model(images, budget).logits)
    assert len(counter.graphs) == 9


def test_the_limit_of_dynamo_alone_is_too_low_for_adaptive_training():
    # Should this fail, `parallelize` need not raise the limit any more.
    args = tiny_args(n_layers=1, **SIZES)
    compiled, images = compiled_twin(build(args), Counter("eager")), random_images(args)
    with torch._dynamo.config.patch(recompile_limit=8), pytest.raises(FailOnRecompileLimitHit):
        for capacity in ADAPTIVE:
            compiled(images, args.budget(capacity))


def test_the_number_of_graphs_is_bounded_whatever_is_validated():
    args = tiny_args(**SIZES, n_layers=3, router_layer=1)
    counter, counts, capacities = Counter("eager"), [], [0.3, 0.6]
    compiled = compiled_twin(build(args), counter)
    # Three kinds of calls (with gradients, without, another batch) of two kinds of inputs (views,
    # others); one more budget is that of the dense block.
    with torch._dynamo.config.patch(recompile_limit=2 * 3 * (len(capacities) + 1)):
        for batch, has_grad in ((3, True), (3, False), (2, False), (5, False)):
            with torch.set_grad_enabled(has_grad):
                for capacity in capacities * 2:
                    compiled(random_images(args, batch=batch), args.budget(capacity))
            counts.append(len(counter.graphs))
    assert counts == [5, 10, 15, 15]


def test_numbers_of_tokens_are_constants_of_every_graph():
    args = tiny_args(**SIZES)
    counter = Counter("eager")
    compiled, images = compiled_twin(build(args), counter), random_images(args)
    # Else dynamo, which guards on the whole budget, makes symbols of its numbers all the same.
    with torch._dynamo.config.patch(specialize_int=True):
        for capacity in (0.3, 0.6, 0.9):
            compiled(images, args.budget(capacity))
    assert len(counter.graphs) == 3
    for graph in counter.graphs:
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        assert not any(isinstance(value, torch.SymInt) for value in values)
