"""What is computed again in the backward pass does not depend on the number of towers."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from tests.gang import run_ranks
from tests.jobs import debug_job
from tests.unit.models.mot.helpers import build, random_batch, tiny_args
from torchtitan_mixtures.activation_checkpoint import (
    MATRIX_PRODUCTS,
    SAVED_OPS,
    checkpoint_blocks,
)
from torchtitan_mixtures.models.mot.parallelize import CUTS

VARIANTS = {
    "dense": dict(tower_of_modality=[0, 0, 0]),
    "2 towers": dict(tower_of_modality=[0, 1, 0]),
    "3 towers": {},
    "attention tied": dict(untie_attention=False),
    "FFN tied": dict(untie_ffn=False),
    "only norms untied": dict(untie_attention=False, untie_ffn=False),
    "grouped": dict(dispatch="grouped"),
    "grouped, attention tied": dict(dispatch="grouped", untie_attention=False),
    "post norm, QK-norm": dict(norm_position="post", qk_normalization=True),
}

COMPILED = ("dense", "3 towers", "attention tied", "grouped")
CASES = [(variant, False) for variant in VARIANTS] + [(variant, True) for variant in COMPILED]
FLAVORS = ("debugmodel_dense", "debugmodel_3modality")

# Of wq, wk, wv, wo, w1, w3, w2 TorchTitan saves the first, third, fifth and seventh.
RECOMPUTED = ("attention.wk", "attention.wo", "feed_forward.w3")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class ProductsWithWeights(TorchDispatchMode):
    """Records whose weight each matrix product `x @ weight.T` has on its right."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # comes back as operators on plain tensors
        if func in MATRIX_PRODUCTS:
            right = args[1] if args[1].ndim == 3 else args[1][None]
            for matrix in right:
                self.names.update(self._owners(matrix))
        return func(*args, **(kwargs or {}))

    def _owners(self, matrix):
        for name, weight in self.weights.items():
            if weight.shape == matrix.T.shape and torch.equal(weight, matrix.T):
                yield name


def block_weights(model):
    """The matrices of the blocks: name without wrappers -> value on this rank."""
    wrappers = ("_checkpoint_wrapped_module.", "_orig_mod.")
    weights = {}
    for name, weight in model.named_parameters():
        for wrapper in wrappers:
            name = name.replace(wrapper, "")
        if name.startswith("layers.") and weight.ndim == 2:
            value = weight.to_local() if isinstance(weight, DTensor) else weight
            weights[name] = value.detach().clone()
    return weights


def recomputed(model, weights, run):
    """Projections whose products are made in the backward pass -> how often, of all towers."""
    run().square().mean().backward()  # compiles what is to be compiled
    loss = run().square().mean()
    with ProductsWithWeights(weights) as mode:
        loss.backward()
    return mode.names


def expected_names(weights, projections=RECOMPUTED):
    return Counter(name for name in weights if any(f".{p}." in name for p in projections))


def apply(model, *, compiled=False, products=CUTS.products, **keys):
    config = ActivationCheckpoint(mode="selective", **({"selective_ac_option": "op"} | keys))
    count = None if products is None else products(model.model_args)
    checkpoint_blocks(model, config, SAVED_OPS, count, compiled=compiled, base_folder="")
    if compiled:
        for layer in model.layers.values():
            layer.compile(backend="aot_eager", fullgraph=True)
    return model


def make(variant, dtype=torch.float32):
    model = build(tiny_args(3, **VARIANTS[variant]), dtype)
    return model, partial(model, *random_batch(3))


@pytest.mark.parametrize(("variant", "compiled"), CASES)
def test_the_same_projections_are_computed_again_for_all_towers(variant, compiled):
    model, run = make(variant)
    weights = block_weights(model)
    apply(model, compiled=compiled)
    assert recomputed(model, weights, run) == expected_names(weights)


def recomputed_flops(variant):
    """FLOPs of matrix products in the backward pass that checkpointing adds, per row."""
    flops = []
    for is_applied in (False, True):
        model, run = make(variant)
        if is_applied:
            apply(model)
        loss = run().square().mean()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops.append(counter.get_total_flops())
    tokens, masks = random_batch(3)
    plan = model._plan(tokens, masks)
    rows = tokens.numel() if plan is None else sum(plan.sizes)
    assert rows - tokens.numel() <= 8 * len(model.model_args.tower_names)
    return (flops[1] - flops[0]) / rows


@pytest.mark.parametrize("variant", list(VARIANTS)[1:])
def test_computing_again_costs_what_it_costs_a_dense_model(variant):
    dense = recomputed_flops("dense")
    assert dense == 2 * 2 * (32 * 16 + 32 * 32 + 32 * 96)  # layers, wk, wo, w3
    assert recomputed_flops(variant) == dense


@pytest.mark.parametrize(("variant", "compiled"), CASES)
def test_gradients_are_those_without_checkpointing(variant, compiled):
    gradients = []
    for is_applied in (False, True):
        model, run = make(variant, torch.float64)
        if is_applied:
            apply(model, compiled=compiled)
        run().square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("names", "projections"),
    [
        (["moe.router.gate"], RECOMPUTED),
        # Left to count are wk, wv, w1, w3, w2: wo has the shape of wq.
        (["attention.wq"], ("wq", "wv", "wo", "w3")),
        (["wq.text"], ("wq", "wv", "wo", "w3")),
        (["w1", "w2"], ("wk", "wo", "w1", "w3", "w2")),
    ],
)
@pytest.mark.parametrize("variant", ["dense", "3 towers", "grouped"])
def test_projections_can_be_named_to_be_computed_again(variant, names, projections):
    model, run = make(variant)
    weights = block_weights(model)
    apply(model, per_op_sac_force_recompute_mm_shapes_by_fqns=names)
    expected = expected_names(weights, [name.rpartition(".")[2] for name in projections])
    assert recomputed(model, weights, run) == expected


def test_a_name_that_is_no_projection_is_refused():
    model, _ = make("3 towers")
    with pytest.raises(ValueError, match=r"fqns = 'norm': fits layers\.0\..*name one of attention"):
        apply(model, per_op_sac_force_recompute_mm_shapes_by_fqns=["norm"])


def test_every_nth_block_can_be_computed_again_whole():
    model, run = make("3 towers")
    weights = block_weights(model)
    apply(model, selective_ac_option="2")
    names = recomputed(model, weights, run)
    layers = {name.split(".")[1] for name in names}
    assert len(layers) == 1
    assert set(names) == {name for name in weights if name.split(".")[1] in layers}


def test_other_keys_reach_the_checkpoint():
    model, _ = make("3 towers")
    keys = dict(preserve_rng_state=False, determinism_check="none", early_stop=True, debug=True)
    apply(model, **keys)
    for layer in model.layers.values():
        found = layer.checkpoint_fn.keywords
        assert {key: found[key] for key in keys} == keys


def test_a_family_that_declares_nothing_gets_the_hosts_policy():
    for variant, is_same in (("dense", True), ("2 towers", False)):
        model, run = make(variant)
        weights = block_weights(model)
        apply(model, products=None)
        assert (recomputed(model, weights, run) == expected_names(weights)) == is_same


def test_a_wrong_declaration_is_noticed():
    model, run = make("3 towers")
    apply(model, products=lambda args: {"attention.wq": 3, "attention.wk": 3})
    with pytest.raises(RuntimeError, match=r"more than the 6 matrix products .*Cuts\.products"):
        run()


def recomputed_on_ranks(degrees, overrides):
    """For each flavour: what is computed again, and all weights of the blocks."""
    return [_recomputed_on_rank(degrees, flavor, overrides) for flavor in FLAVORS]


def _recomputed_on_rank(degrees, flavor, overrides):
    # Weights are whole where FSDP gathers them, and this rank's part under tensor parallelism.
    job = debug_job(
        "mot", f"--model.flavor={flavor}", "--training.seq_len=64",
        "--training.mixed_precision_param=float32", "--activation_checkpoint.mode=selective",
        "--activation_checkpoint.selective_ac_option=op", *overrides,
    )  # fmt: skip
    job.parallelism.tensor_parallel_degree = degrees.get("tp", 1)
    base = dict(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1)
    dims = ParallelDims(**(base | degrees), world_size=2)
    dims.build_mesh()
    spec = get_train_spec("mot")
    args = spec.model_args[flavor]
    args.update_from_config(job)
    args.n_layers = 1
    with torch.device("meta"):
        model = spec.model_cls(args)
    model = spec.parallelize_fn(model, dims, job)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
    weights = block_weights(model)
    if dims.fsdp_enabled:
        full = [p.full_tensor().detach() for n, p in model.named_parameters() if "layers." in n]
        weights = dict(zip(weights, (w for w in full if w.ndim == 2), strict=True))
    tokens = torch.randint(args.total_vocab_size, (2, 64), generator=torch.Generator())
    masks = torch.stack([tokens % args.n_modalities == m for m in range(args.n_modalities)], dim=1)

    def run():
        logits = model(tokens, masks)
        return logits.full_tensor() if isinstance(logits, DTensor) else logits

    return recomputed(model, weights, run), list(weights)


@pytest.mark.distributed
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("degrees", [dict(tp=2), dict(dp_shard=2)], ids=["TP2", "FSDP2"])
def test_parallelism_leaves_the_choice_as_it_is(degrees, compiled):
    overrides = ["--compile.enable", "--compile.backend=aot_eager"] if compiled else []
    # The sum over ranks behind wo is saved: a compiler sees that nothing needs wo's product again.
    projections = RECOMPUTED if not ("tp" in degrees and compiled) else RECOMPUTED[::2]
    for results in run_ranks(recomputed_on_ranks, 2, degrees, overrides):
        for found, weights in results:
            assert found == expected_names(weights, projections)


@pytest.mark.distributed
def test_full_checkpointing_of_compiled_blocks_under_tensor_parallelism_works_on_a_cpu():
    overrides = [
        "--compile.enable", "--compile.backend=aot_eager", "--activation_checkpoint.mode=full"
    ]  # fmt: skip
    projections = ("wq", "wk", "wv", "wo", "w1", "w3")  # nothing needs w2's product again
    for results in run_ranks(recomputed_on_ranks, 2, dict(tp=2), overrides):
        for found, weights in results:
            assert found == expected_names(weights, projections)
