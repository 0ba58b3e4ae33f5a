"""The layouts of the large configurations: they can be built, and their headers say what they cost.

One process stands for rank 0 of all; nothing is allocated and nothing is sent.
"""

from __future__ import annotations

import math
import os
import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import get_train_spec

from tests.gang import run_ranks
from tests.jobs import TRAIN_CONFIGS, debug_job, load_job
from torchtitan_mixtures.checks import check_job

LARGE = sorted(path.stem for path in (TRAIN_CONFIGS / "mot").glob("*B_*.toml"))
# What a header offers for a slower network.
PIPELINE = (
    "--parallelism.pipeline_parallel_degree=4",
    "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
    "--training.local_batch_size=16",
)

BYTES_OF_A_PARAMETER = 16  # float32: the weight, its gradient, and two moments of AdamW
GIB = 2**30
SEQ = 2048


def header_number(text, pattern):
    (number,) = re.findall(rf"^# {pattern}", text, flags=re.MULTILINE)
    return float(number.replace(",", ""))


def make_dims(job, world):
    config = job.parallelism
    dims = ParallelDims(
        dp_shard=config.data_parallel_shard_degree,
        dp_replicate=config.data_parallel_replicate_degree,
        cp=config.context_parallel_degree,
        tp=config.tensor_parallel_degree,
        pp=config.pipeline_parallel_degree,
        ep=config.expert_parallel_degree,
        etp=config.expert_tensor_parallel_degree,
        world_size=world,
    )
    dims.build_mesh()
    return dims


def parallel_parts(job, dims):
    """The model parts of rank 0, on the meta device, and the model's arguments."""
    spec = get_train_spec("mot")
    args = spec.model_args[job.model.flavor]
    args.update_from_config(job)
    with torch.device("meta"):
        model = spec.model_cls(args)
    if not dims.pp_enabled:
        return [spec.parallelize_fn(model, dims, job)], args
    loss_fn = spec.build_loss_fn(job, parallel_dims=dims)
    _, parts, is_first, is_last = spec.pipelining_fn(
        model, dims, job, torch.device("meta"), args, spec.parallelize_fn, loss_fn
    )
    assert is_first and not is_last
    return parts, args


def local_shape(name, shape, tp, fsdp):
    """What rank 0 holds of a weight: tensor parallelism first, then FSDP along the rows."""
    shape = list(shape)
    component = re.sub(r"\.\w+\.weight$", "", name)
    if component.endswith((".wo", ".w2")):
        shape[1] //= tp
    elif "norm" not in name:
        shape[0] //= tp
    shape[0] = math.ceil(shape[0] / fsdp)
    return tuple(shape)


def build_layout(folder, config, world, *overrides):
    """Check and build one configuration; return degrees, held parameters and its arguments."""
    os.environ["WORLD_SIZE"] = str(world)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    # The backend, because a machine that runs tests need not have a C++ compiler.
    job = load_job(
        TRAIN_CONFIGS / "mot" / f"{config}.toml", f"--job.dump_folder={folder}",
        "--compile.backend=aot_eager", *overrides,
    )  # fmt: skip
    check_job(job)
    dims = make_dims(job, world)
    parts, args = parallel_parts(job, dims)
    held = 0
    for part in parts:
        for name, parameter in part.named_parameters():
            assert isinstance(parameter, DTensor), f"{name} is not on the mesh"
            local = parameter.to_local()
            expected = local_shape(name, parameter.shape, dims.tp, dims.dp_shard * dims.cp)
            assert tuple(local.shape) == expected, (name, tuple(local.shape), expected)
            assert local.dtype == torch.float32
            held += local.numel()
    return {
        "tp": dims.tp,
        "fsdp": dims.dp_shard,
        "held": held,
        "stored": args.num_total_parameters,
        "active": args.num_active_parameters,
        "tokens": job.training.local_batch_size * job.training.seq_len,
        "layers": args.n_layers,
        "saved": saved_bytes(args, dims.tp, job.activation_checkpoint.mode),
    }


def saved_bytes(args, tp, mode):
    """What a compiled block keeps of a token until its backward pass, in bfloat16 on a GPU."""
    stream, values = 2 * args.dim, 2 * args.num_kv_heads * args.head_dim
    if mode == "full":
        return stream / tp
    # Besides its input, every second projection: wq, wv, w1; w2 is the output, which none needs.
    kept = stream + stream + values + 2 * args.ffn_hidden_dim
    kept += stream + 4 * args.n_heads  # attention, and one float32 a head
    kept += stream if tp > 1 else 0  # the sum over ranks behind wo
    return kept / tp


@pytest.mark.parametrize("config", LARGE)
def test_a_large_configuration_is_what_its_header_says(config, tmp_path):
    text = (TRAIN_CONFIGS / "mot" / f"{config}.toml").read_text()
    world = int(header_number(text, r"World size: (\d+) "))
    (layout,) = run_ranks(build_layout, 1, tmp_path, config, world, init=False)
    assert f"TP {layout['tp']} x FSDP {layout['fsdp']}." in text
    assert layout["tp"] * layout["fsdp"] == world
    state = BYTES_OF_A_PARAMETER * layout["held"] / GIB
    activations = layout["saved"] * layout["tokens"] * layout["layers"] / GIB
    assert header_number(text, r"State per GPU: ([\d.]+) GiB") == pytest.approx(state, rel=0.05)
    said = header_number(text, r"Activations per GPU: ([\d.]+) GiB")
    assert said == pytest.approx(activations, rel=0.05)
    said = header_number(text, r"Parameters: ([\d.]+) B stored")
    assert said == pytest.approx(layout["stored"] / 1e9, rel=0.01)
    said = header_number(text, r"Parameters: [\d.]+ B stored, ([\d.]+) B active")
    assert said == pytest.approx(layout["active"] / 1e9, rel=0.01)
    tokens = header_number(text, r"Tokens per step: ([\d,]+),")
    assert tokens == layout["fsdp"] * layout["tokens"]
    assert state + activations < 0.75 * 80  # the rest is for logits and gathered weights


@pytest.mark.parametrize(
    ("config", "world", "overrides", "degrees", "state"),
    [
        ("8B_2modality", 8, ("--parallelism.tensor_parallel_degree=1",), (1, 8), 28.0),
        ("8B_2modality", 4, (), (2, 2), 56.0),
        ("8B_2modality", 16, ("--parallelism.data_parallel_replicate_degree=2",), (2, 4), 28.0),
        ("8B_2modality", 16, ("--parallelism.context_parallel_degree=4",), (2, 2), 14.0),
        ("70B_2modality", 64, ("--parallelism.context_parallel_degree=8",), (8, 1), 32.4),
        ("70B_2modality", 64, PIPELINE, (8, 2), 32.4),
    ],
    ids=["without TP", "4 GPUs", "HSDP", "CP 4", "CP 8", "PP 4"],
)
def test_other_layouts_that_headers_offer_can_be_built(
    config, world, overrides, degrees, state, tmp_path
):
    (layout,) = run_ranks(build_layout, 1, tmp_path, config, world, *overrides, init=False)
    assert (layout["tp"], layout["fsdp"]) == degrees
    # Stages of a pipeline are not quite equal: the first has the embedding and fewer layers.
    found = BYTES_OF_A_PARAMETER * layout["held"] / GIB
    assert found == pytest.approx(state, rel=0.1 if overrides == PIPELINE else 0.01)


def measure_saved_bytes():
    """Bytes a token leaves in a compiled block of the debug model on one of two ranks of TP."""
    os.environ["WORLD_SIZE"] = "2"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    job = debug_job(
        "mot", "--parallelism.tensor_parallel_degree=2", f"--training.seq_len={SEQ}",
        "--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=op",
        "--compile.enable", "--compile.backend=aot_eager",
    )  # fmt: skip
    dims, kept = make_dims(job, 2), {}

    def note(tensor):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.dtype != torch.int64:  # the plan's, which all blocks share
            kept[local.untyped_storage().data_ptr()] = local
        return tensor

    sums = []
    for layers in (1, 2):
        spec = get_train_spec("mot")
        args = spec.model_args[job.model.flavor]
        args.update_from_config(job)
        args.n_layers, args.n_kv_heads = layers, 4
        with torch.device("meta"):
            model = spec.model_cls(args)
        model = spec.parallelize_fn(model, dims, job).to_empty(device="cpu")
        with torch.no_grad():
            model.init_weights(buffer_device=torch.device("cpu"))
        model.to(torch.bfloat16)
        tokens = torch.arange(SEQ)[None] % args.vocab_size
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(tokens, torch.stack([tokens % 2 == 0, tokens % 2 == 1], dim=1))
        for parameter in model.parameters():
            kept.pop(parameter.to_local().untyped_storage().data_ptr(), None)
        sums.append(sum(local.untyped_storage().nbytes() for local in kept.values()))
    return (sums[1] - sums[0]) / SEQ, saved_bytes(args, 2, "selective")


def test_a_compiled_block_keeps_the_bytes_that_headers_count_with():
    ((measured, expected),) = run_ranks(measure_saved_bytes, 1, init=False)
    assert measured == pytest.approx(expected, rel=0.01)
