"""Copies of TorchTitan's llama3 are an exact Mixture-of-Transformers."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

from tests.unit.models.mot.helpers import build, random_batch, tiny_args


def llama_of(args, scale=1):
    llama = Transformer(
        TransformerModelArgs(
            dim=args.dim,
            n_layers=args.n_layers,
            n_heads=args.n_heads,
            n_kv_heads=args.n_kv_heads,
            vocab_size=args.vocab_size,
            multiple_of=args.multiple_of,
            rope_theta=args.rope_theta,
            max_seq_len=args.max_seq_len,
        )
    )
    with torch.no_grad():
        llama.init_weights()
        for parameter in llama.layers.parameters():
            parameter.mul_(scale)
    return llama


def load_llama(model, llama):
    source = llama.state_dict()
    state = {}
    for name in model.state_dict():
        parts = name.split(".")
        tower = parts[-2] in model.model_args.modality_names
        state[name] = source[".".join([*parts[:-2], parts[-1]] if tower else parts)]
    model.load_state_dict(state)


@pytest.mark.parametrize("dispatch", ["split", "grouped", "reference"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("towers", [None, [0, 1, 0], [0, 0, 0]])
def test_copies_of_llama_equal_llama_on_any_mask(towers, seed, dispatch):
    args = tiny_args(3, tower_of_modality=towers, dispatch=dispatch, init_seed=seed)
    llama, model = llama_of(args), build(args, torch.float32)
    load_llama(model, llama)
    tokens, masks = random_batch(3, seed=seed)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, masks), llama(tokens), rtol=1e-6, atol=2e-6)


def test_rotary_positions_equal_llama():
    args = tiny_args(n_layers=1)
    # Scaled so that attention is far from uniform and positions matter.
    llama, model = llama_of(args, scale=6), build(args, torch.float32)
    load_llama(model, llama)
    tokens, masks = random_batch()
    positions = torch.stack([torch.arange(19).flip(0), torch.arange(19) % 7])
    with torch.no_grad():
        expected = llama(tokens, positions=positions)
        actual = model(tokens, masks, positions=positions)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(actual, model(tokens, masks), atol=1e-4)


@pytest.mark.parametrize("dispatch", ["split", "grouped"])
def test_flops_of_a_step_equal_those_of_the_dense_model_up_to_padding(dispatch):
    flops = {}
    for towers in (None, [0, 0, 0]):
        model = build(tiny_args(3, tower_of_modality=towers, dispatch=dispatch), torch.float32)
        tokens, masks = random_batch(3, batch=1, seq=32)
        with FlopCounterMode(display=False) as counter:
            model(tokens, masks).sum().backward()
        flops[towers is None] = counter.get_total_flops()
    rows = (32 + 16) / 32  # every row of the padded stream, against every token
    assert flops[False] < flops[True] <= rows * flops[False]
