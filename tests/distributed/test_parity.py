"""Every parallel layout gives the loss, every gradient and the weights of one process."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.parity import (
    BATCHES,
    LAYOUTS,
    errors_of_a_step,
    make_batch,
    make_runs,
    relative_error,
    use_float64,
    whole,
)
from tests.gang import run_ranks
from tests.rows import quick

pytestmark = pytest.mark.distributed

ONE_DIMENSION = [name for name in LAYOUTS if "xTP" not in name and "xCP" not in name
                 and "xPP" not in name]  # fmt: skip
MAIN_VARIANTS = ("2 modalities", "3 modalities", "dense", "post norm", "QK-norm, grouped queries",
                 "documents masked")  # fmt: skip
# Further ones where a layout treats them in another way than the main ones.
MORE_VARIANTS = {
    "TP2": ("grouped", "attention tied", "norms and FFN tied", "dense, QK-norm", "towers shared"),
    "CP4": ("two key heads",),
    "CP2": ("grouped", "documents masked, varlen", "attention tied"),
    "PP2": ("documents masked, varlen", "attention tied", "grouped"),
    "TP2xPP2": ("dense", "attention tied"),
    "TP2xCP2": ("dense", "documents masked", "two key heads"),
    "CP2xPP2": ("documents masked",),
    "FSDP2xTP2": (*MAIN_VARIANTS[1:], "attention tied"),
    "FSDP2xTP2xCP2": ("3 modalities",),
    "FSDP2xTP2xPP2": ("attention tied",),
    "TP2xPP2 InterleavedZeroBubble": ("dense",),
}


def cases(layout: str) -> list[tuple[str, str]]:
    """Variant and batch: all batches with the default variant, the mixed one with others."""
    with_all_batches = MAIN_VARIANTS[: 2 if layout == "TP2" else 1]
    variants = (*(MAIN_VARIANTS if layout in ONE_DIMENSION else ()), *MORE_VARIANTS.get(layout, ()))
    return [
        *((variant, kind) for variant in with_all_batches for kind in BATCHES),
        *((variant, "mixed") for variant in variants if variant not in with_all_batches),
    ]


def compare(layout: str, wanted: list[tuple[str, str]]) -> tuple[dict, set[str]]:
    """For each case: the largest relative error and where it is; and the parameters seen."""
    use_float64()
    dims = LAYOUTS[layout].dims()
    worst, names, runs = {}, set(), {}
    for variant, kind in wanted:
        if variant not in runs:
            runs = {variant: make_runs(layout, variant, dims)}
        args, run, single = runs[variant]
        errors = errors_of_a_step(run, single, make_batch(args, kind), dims)
        worst[variant, kind] = max((error, name) for name, error in errors.items())
        names |= {f"{variant}: {name}" for name in run.parameters()}
    return worst, names


# The same with two ranks, and in combinations of four, is quick.
FURTHER_RANKS = ("FSDP4", "CP4", "PP4")


@pytest.mark.parametrize("layout", quick(set(LAYOUTS) - set(FURTHER_RANKS), LAYOUTS))
def test_loss_and_every_gradient_equal_one_process(layout):
    wanted = cases(layout)
    results = run_ranks(compare, LAYOUTS[layout].world, layout, wanted, timeout=240)
    for worst, _ in results:
        for case, (error, name) in worst.items():
            assert error < 1e-10, (case, name, error)
    seen = set().union(*(names for _, names in results))
    for variant in {variant for variant, _ in wanted}:
        assert any(name.startswith(f"{variant}: output") for name in seen)
        assert any(name.startswith(f"{variant}: tok_embeddings") for name in seen)


# A large epsilon: with a small one Adam's first steps are the signs of the gradients, and any error
# of their size would go unnoticed.
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, dict(lr=0.1)),
    "AdamW": (torch.optim.AdamW, dict(lr=0.1, eps=1.0, foreach=True)),
    "fused AdamW": (torch.optim.AdamW, dict(lr=0.1, eps=1.0, fused=True)),
}


def curve(layout: str) -> tuple[dict[str, float], dict[str, float]]:
    """Clip and take five steps; the largest error of a loss or a weight, and all final weights."""
    use_float64()
    dims = LAYOUTS[layout].dims()
    worst, weights = {}, {}
    for name, (optimizer, options) in OPTIMIZERS.items():
        if name == "fused AdamW" and "TP" not in layout:
            continue  # the kernels differ in what they take of a tensor that is cut twice
        args, *runs = make_runs(layout, "QK-norm, grouped queries", dims)
        initial = {name: whole(p).clone() for name, p in runs[0].parameters().items()}
        steps = [optimizer(run.parameters().values(), **options) for run in runs]
        errors = []
        for index, kind in enumerate(BATCHES):
            batch = make_batch(args, kind, seed=index)
            losses = []
            for run, step in zip(runs, steps, strict=True):
                losses.append(run.backward(batch))
                run.clip(0.1)
                step.step()
            errors.append(relative_error(*losses))
        expected = runs[1].parameters()
        for path, parameter in runs[0].parameters().items():
            moved = whole(parameter) - initial[path]
            errors.append(relative_error(moved, expected[path].detach() - initial[path]))
            weights[f"{name}: {path}"] = float(whole(parameter).sum())
        worst[name] = max(errors)
    return worst, weights


# Other schedules and combinations add nothing to what an optimiser sees; the slow ones little.
SLOW_CURVES = [
    *("FSDP4", "TP4", "CP4", "FSDP2xTP2xCP2", "FSDP2xTP2xPP2"),
    *("TP2xCP2", "TP2xPP2", "CP2xPP2", "FSDP2xCP2"),
]
CURVES = [
    *("FSDP2", "HSDP2x2", "DDP2", "TP2", "CP2", "PP2"),
    *("FSDP2xTP2", "FSDP2xPP2"),
    *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW_CURVES),
]


@pytest.mark.parametrize("layout", CURVES)
def test_five_steps_of_an_optimiser_end_at_the_weights_of_one_process(layout):
    results = run_ranks(curve, LAYOUTS[layout].world, layout, timeout=240)
    everywhere = {}
    for errors, weights in results:
        assert max(errors.values()) < 1e-9, errors
        for name, value in weights.items():
            assert everywhere.setdefault(name, value) == value, f"ranks disagree about {name}"
