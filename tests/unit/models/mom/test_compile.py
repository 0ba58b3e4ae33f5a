import pytest
import torch

from tests.unit.models.mom.helpers import build, random_inputs, tiny_args

FREE = {"min_token_experts": 0, "min_channel_experts": 0}
TYPED_CHOICES = [
    [[0, 4]] * 6,
    [[3, 7]] * 6,
    [[b % 4, 4 + b % 4] for b in range(6)],
    [[0, 4]] + [[1, 5]] * 5,
]
FREE_CHOICES = [*TYPED_CHOICES, [[0, 1]] * 6, [[6, 7]] * 6, [[0, 1], [4, 5], [2, 7]] * 2]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("fields", "choices", "backend"),
    [({}, TYPED_CHOICES, "aot_eager"), (FREE, FREE_CHOICES, "aot_eager")],
)
def test_blocks_compile_whole_into_one_graph_for_any_choice(fields, choices, backend):
    graphs = []

    def counting_backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    args = tiny_args(n_layers=1, router_noise=0.1, **fields)
    eager, compiled = build(args, torch.float32), build(args, torch.float32)
    for model in (eager, compiled):
        block = model.layers["0"]
        router = block.mixer.router
        # What is chosen comes in as data, as the router's own choice does.
        router.register_buffer("forced", torch.zeros(6, 2, dtype=torch.int64), persistent=False)
        router.choose = lambda logits, router=router: router.forced + 0
    compiled.layers["0"].compile(backend=counting_backend, fullgraph=True)
    inputs = random_inputs(args, dtype=torch.float32)
    noise = torch.randn(6, 1, 32)
    for chosen in choices:
        results = []
        for model in (eager, compiled):
            model.zero_grad()
            model.layers["0"].mixer.router.forced.copy_(torch.tensor(chosen))
            output = model(*inputs, noise)
            (
                output.prediction.square().mean() + output.router.probabilities.square().sum()
            ).backward()
            results.append((output.prediction.detach(), [p.grad for p in model.parameters()]))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("fields", [{}, FREE, {"mixer": "attention"}])
def test_blocks_compile_once_with_their_own_choices(fields):
    graphs = []

    def counting_backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    args = tiny_args(n_layers=1, **fields)
    model, eager = build(args, torch.float32), build(args, torch.float32)
    model.layers["0"].compile(backend=counting_backend, fullgraph=True)
    for seed in range(3):
        inputs = random_inputs(args, seed=seed, dtype=torch.float32)
        prediction = model(*inputs).prediction
        torch.testing.assert_close(prediction, eager(*inputs).prediction, rtol=1e-4, atol=1e-5)
        prediction.mean().backward()
    assert len(graphs) == 1
