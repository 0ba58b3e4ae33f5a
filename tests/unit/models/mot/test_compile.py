import pytest
import torch

from tests.unit.models.mot.helpers import build, masks_of, random_batch, tiny_args

MIXES = [
    [30, 20, 14],
    [32, 16, 16],
    [20, 20, 24],
    [64, 0, 0],
    [0, 64, 0],
    [0, 0, 64],
    [63, 1, 0],
    [1, 1, 62],
    [0, 1, 63],
    [8, 48, 8],
    [9, 47, 8],
    [40, 0, 24],
    [21, 22, 21],
    [16, 24, 24],
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("fields", "backend"),
    [
        ({}, "aot_eager"),
        ({"dispatch": "grouped"}, "eager"),
        (
            {
                "norm_position": "post",
                "qk_normalization": True,
                "attn_type": "sdpa_dense",
                "attn_mask_type": "block_causal",
            },
            "eager",
        ),
    ],
)
def test_blocks_compile_whole_into_few_graphs_for_any_mix(fields, backend):
    graphs = []

    def counting_backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    args = tiny_args(3, n_layers=1, **fields)
    eager, compiled = build(args, torch.float32), build(args, torch.float32)
    for layer in compiled.layers.values():
        layer.compile(backend=counting_backend, fullgraph=True)
    tokens, _ = random_batch(3, batch=2, seq=32)
    documents = torch.arange(32).expand(2, 32) // 10
    generator = torch.Generator().manual_seed(0)
    for mix in MIXES:
        modality = torch.repeat_interleave(torch.arange(3), torch.tensor(mix))
        modality = modality[torch.randperm(64, generator=generator)].view(2, 32)
        masks = masks_of(modality, 3)
        results = []
        for model in (eager, compiled):
            model.zero_grad()
            logits = model(tokens, masks, document_ids=documents)
            logits.square().mean().backward()
            results.append((logits.detach(), [p.grad for p in model.parameters()]))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 3, f"{len(graphs)} graphs for {len(MIXES)} mixes"


def test_dense_block_compiles_once():
    graphs = []

    def counting_backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = build(tiny_args(3, tower_of_modality=[0, 0, 0]), torch.float32)
    for layer in model.layers.values():
        layer.compile(backend=counting_backend, fullgraph=True)
    for seed in range(3):
        model(*random_batch(3, seed=seed)).mean().backward()
    assert len(graphs) == 1
