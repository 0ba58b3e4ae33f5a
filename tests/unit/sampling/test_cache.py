"""With the cache, logits are those of a forward pass over the whole document."""

import pytest
import torch

from tests.unit.sampling.helpers import RANGES, tiny_model
from torchtitan_mixtures.models.common.attention import InnerAttention
from torchtitan_mixtures.sampling.cache import CachedAttention, cached_attention

FLAVOURS = {
    "towers of their own": {},
    "two towers": {"tower_of_modality": [0, 1, 0]},
    "dense": {"tower_of_modality": [0, 0, 0]},
    "as many keys as queries": {"n_kv_heads": None},
    "one key for all queries": {"n_kv_heads": 1},
    "post norm, untied": {"norm_position": "post", "untie_final_norm": True},
    "norms of queries and keys": {"qk_normalization": True},
    "only feed-forward untied": {"untie_attention": False, "untie_norm": False},
    "grouped": {"dispatch": "grouped"},
    "reference": {"dispatch": "reference"},
    "flex": {"attn_type": "flex", "attn_mask_type": "block_causal"},
    "varlen": {"attn_type": "varlen", "attn_mask_type": "block_causal"},
    "both directions in images": {"attn_type": "sdpa_dense", "bidirectional_images": True},
}
LENGTHS = [1, 17, 9, 4]
STEPS = 12


def random_rows(seed=0):
    """Documents of unequal length with runs of images in the parts that make the prompts."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in LENGTHS:
        row = torch.randint(RANGES[-1][1], (length + STEPS,), generator=generator)
        for start in range(2, length - 4, 7):
            row[start : start + 4] = torch.randint(*RANGES[1], (4,), generator=generator)
        # Generated image tokens cannot see ahead; what follows a prompt has none here.
        is_image = (row >= RANGES[1][0]) & (row < RANGES[1][1])
        row[length:][is_image[length:]] = 11
        rows.append(row)
    return rows


def images_of(row):
    ids, number = [], -1
    for position, token in enumerate(row.tolist()):
        inside = RANGES[1][0] <= token < RANGES[1][1]
        if inside and (position == 0 or ids[-1] < 0):
            number += 1
        ids.append(number if inside else -1)
    return torch.tensor(ids)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_cached_logits_equal_uncached_ones_at_every_position(flavour):
    model = tiny_model(**FLAVOURS[flavour])
    rows = random_rows()
    longest = max(LENGTHS)
    prompts, ids = torch.zeros(4, longest, dtype=torch.int64), torch.full((4, longest), -1)
    for i, (row, length) in enumerate(zip(rows, LENGTHS, strict=True)):
        prompts[i, :length] = row[:length]
        ids[i, :length] = images_of(row[:length])
    is_bidirectional = model.model_args.bidirectional_images
    positions = torch.arange(longest).expand(4, -1)
    with cached_attention(model, longest + STEPS) as cached:
        first = cached(prompts, positions, longest, ids if is_bidirectional else None)
        found = [list(first[i, :length]) for i, length in enumerate(LENGTHS)]
        for step in range(STEPS):
            places = torch.tensor(LENGTHS)[:, None] + step
            tokens = torch.stack([row[p] for row, p in zip(rows, places, strict=True)])
            logits = cached(tokens, places, longest + step + 1)
            for i in range(4):
                found[i].append(logits[i, 0])
    for i, row in enumerate(rows):
        documents = torch.zeros(1, len(row), dtype=torch.int64)
        with torch.no_grad():
            expected = model(row[None], None, documents, images_of(row)[None])[0]
        torch.testing.assert_close(torch.stack(found[i]), expected, rtol=0, atol=1e-10)


def test_a_position_that_is_written_again_forgets_what_was_there():
    model = tiny_model()
    tokens = torch.tensor([[1, 40, 310]])
    with cached_attention(model, 8) as cached:
        cached(torch.tensor([[1, 99, 301, 320, 8]]), torch.arange(5)[None], 5)
        for place, token in enumerate(tokens[0]):
            logits = cached(token.view(1, 1), torch.tensor([[place]]), 5)
    with torch.no_grad():
        torch.testing.assert_close(logits[0, 0], model(tokens)[0, -1], rtol=0, atol=1e-10)


def test_the_model_is_as_it_was_afterwards_also_after_an_error():
    model = tiny_model()
    modules = dict(model.named_modules())
    with pytest.raises(KeyError), cached_attention(model, 4):
        assert sum(isinstance(m, CachedAttention) for m in model.modules()) == 2
        raise KeyError
    assert dict(model.named_modules()) == modules
    assert sum(type(m) is InnerAttention for m in model.modules()) == 2


def test_compiled_blocks_are_not_compiled_again_for_sampling():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = tiny_model()
    plain = tiny_model()
    for name, layer in list(model.layers.items()):
        model.layers.register_module(name, torch.compile(layer, backend=count, fullgraph=True))
    tokens = torch.tensor([[1, 40, 310, 320, 9]])
    with torch.no_grad():
        model(tokens)
        compiled = len(graphs)
        with cached_attention(model, 8) as cached:
            for length in (2, 3, 5):
                logits = cached(tokens[:, :length], torch.arange(length)[None], length)
        model(tokens)
        torch.testing.assert_close(logits[0, -1], plain(tokens)[0, -1], rtol=0, atol=1e-10)
    assert compiled > 0
    assert len(graphs) == compiled
    torch._dynamo.reset()


def test_a_model_without_attention_is_refused():
    with (
        pytest.raises(ValueError, match="Linear has no attention that could be cached"),
        cached_attention(torch.nn.Linear(2, 2), 4),
    ):
        pass
