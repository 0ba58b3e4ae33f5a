"""Float8 itself needs a GPU; here: what cannot work is refused, and rows suit its products."""

from __future__ import annotations

import pytest
import torch
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from tests.jobs import debug_job
from torchtitan_mixtures import float8
from torchtitan_mixtures.float8 import check_converters, row_multiple

FLOAT8, MX = "quantize.linear.float8", "quantize.linear.mx"


@pytest.fixture
def machine(monkeypatch):
    """Pretend that the machine has an accelerator of some capability, with or without torchao."""

    def pretend(capability, has_torchao=True):
        monkeypatch.setattr(float8, "has_cuda_capability", lambda *least: capability >= least)
        monkeypatch.setattr(float8, "has_rocm_capability", lambda *least: False)
        monkeypatch.setattr(float8, "find_spec", lambda name: object() if has_torchao else None)

    return pretend


def make_job(converters, *overrides):
    job = debug_job("mot", *overrides)
    job.model.converters = converters
    args = get_train_spec("mot").model_args[job.model.flavor]
    args.update_from_config(job)
    return job, args


@pytest.mark.parametrize(
    ("name", "capability", "has_torchao", "message"),
    [
        (FLOAT8, (0, 0), False, r"needs a GPU with float8 \(SM89.* and the package torchao"),
        (FLOAT8, (8, 0), True, r"float8' needs a GPU with float8 \(SM89 or later\), which"),
        (FLOAT8, (9, 0), False, r"needs the package torchao \(pip install torchao\), which"),
        (MX, (9, 0), True, r"mx' needs a GPU with MXFP8 \(SM100"),
        (MX, (10, 0), False, r"mx' needs the package torchao"),
    ],
)  # fmt: skip
def test_a_machine_without_float8_is_told_at_start_up(
    machine, name, capability, has_torchao, message
):
    machine(capability, has_torchao)
    with pytest.raises(ValueError, match=rf"model\.converters = \['{name}'\]: .*{message}") as info:
        check_converters(*make_job([name]))
    assert f"or remove '{name}'" in str(info.value)


def test_a_machine_with_float8_is_let_through(machine):
    machine((9, 0))
    check_converters(*make_job([]))
    check_converters(*make_job([FLOAT8]))
    machine((10, 0))
    check_converters(*make_job([MX]))


def test_emulation_needs_torchao_and_no_compiler(machine):
    machine((0, 0))
    emulated = "--quantize.linear.float8.emulate"
    check_converters(*make_job([FLOAT8], emulated))
    with pytest.raises(ValueError, match="needs a GPU with float8"):
        check_converters(*make_job([FLOAT8], emulated, "--compile.enable"))


@pytest.mark.parametrize(
    ("converters", "overrides", "message"),
    [
        (["float8"], [], r"'float8' is unknown; known here: quantize\.linear\.float8"),
        (["quantize.grouped_mm.float8"], [], r"routed experts.*use 'quantize\.linear\.float8'"),
        ([FLOAT8, MX], [], r"one kind of float8 at a time"),
        ([FLOAT8], ["--mixture.dispatch=grouped"], r'dispatch = "grouped": goes .*set "split"'),
        ([FLOAT8], ["--training.seq_len=250"], r"training\.seq_len = 250: .* of 16; use 240"),
        ([FLOAT8], ["--validation.seq_len=250"], r"validation\.seq_len = 250: .* of 16; use 240"),
        ([MX], ["--training.seq_len=240"], r"training\.seq_len = 240: .* of 32; use 224"),
        ([FLOAT8], ["--training.seq_len=240", "--parallelism.context_parallel_degree=2"],
         r"training\.seq_len = 240: .* of 32; use 224"),
    ],
)  # fmt: skip
def test_converters_that_cannot_work_are_refused(machine, converters, overrides, message):
    machine((10, 0))
    with pytest.raises(ValueError, match=message):
        check_converters(*make_job(converters, *overrides))


def test_a_dense_model_may_be_grouped(machine):
    machine((9, 0))
    check_converters(
        *make_job([FLOAT8], "--mixture.dispatch=grouped", "--model.flavor=debugmodel_dense")
    )


@pytest.mark.parametrize(
    ("converters", "multiple", "of_model"), [([], 1, 8), ([FLOAT8], 16, 16), ([MX], 32, 32)]
)
def test_the_rows_of_each_tower_suit_the_converter(converters, multiple, of_model):
    job, args = make_job(converters)
    assert row_multiple(job) == multiple
    spec = get_train_spec("mot")
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    with torch.device("meta"):
        model = spec.model_cls(args)
    model = spec.parallelize_fn(model, dims, job)
    assert model.row_multiple == of_model
    tokens = torch.arange(70).view(2, 35)
    plan = model._plan(tokens, torch.stack([tokens % 3 == 0, tokens % 3 > 0], dim=1))
    assert all(size % of_model == 0 for size in plan.sizes)
