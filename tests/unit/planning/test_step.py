from __future__ import annotations

from functools import cache

import pytest
import torch
from torchtitan.protocols.train_spec import get_train_spec

from tests.gang import run_ranks
from tests.jobs import TRAIN_CONFIGS
from torchtitan_mixtures.models import FAMILIES
from torchtitan_mixtures.planning import steady, step
from torchtitan_mixtures.planning.step import plan_step

FLOAT32, INT64, MIB = 4, 8, 2**20
LAYERS, ROWS, SEQ, DIM = 6, 2, 512, 256  # of mot's debug model, and of the batches below
PIPELINE = ("--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=4")


@cache
def plan(family, world_size, *overrides, rank=0, config="debugmodel"):
    path = TRAIN_CONFIGS / family / f"{config}.toml"
    small = () if family != "mot" else (f"--training.seq_len={SEQ}", "--validation.no-enable")
    return plan_step([f"--config={path}", *small, *overrides], world_size, rank)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_holds_all_parameters_with_gradients_and_two_moments(family):
    found = plan(family, 1)
    memory = found.memory
    assert found.num_parameters * FLOAT32 == memory.parameters == memory.gradients
    # AdamW counts the steps of each parameter by one more number.
    assert 0 <= memory.optimizer_state - 2 * memory.parameters < 0.01 * memory.parameters
    state = memory.parameters + memory.optimizer_state + memory.other_state
    assert memory.peak >= state + max(memory.activations, memory.gradients)
    assert (found.degrees, found.sent, found.bubble) == ({}, {}, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_that_run_are_those_that_the_family_says_training_takes(family):
    found = plan(family, 1)
    expected = found.model_flops * found.tokens
    if family == "mixdiff":  # its debug job trains one expert a sample, the formula says top-2
        expected /= 2
    # The first layer needs no gradient of its input; padding, norms and short sums do a little.
    assert found.flops == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("family", FAMILIES)
def test_fsdp_halves_the_state_and_gathers_weights_twice(family):
    alone, half = plan(family, 1), plan(family, 2)
    for name in ("parameters", "gradients", "optimizer_state"):
        whole = getattr(alone.memory, name)
        assert getattr(half.memory, name) == pytest.approx(whole / 2, rel=0.02)
    assert half.flops == alone.flops  # each rank has a batch of its own
    assert half.samples == 2 * alone.samples
    # A rank receives half of the weights twice and sends half of the gradients; it keeps the last
    # unit between the passes.
    weights = alone.memory.parameters / 2
    assert 2 * weights < half.sent["fsdp"] <= 3 * weights * 1.02


def test_images_of_a_batch_live_beside_what_is_made_of_them():
    few, more = (plan("mom", 1, f"--training.global_batch_size={64 * rounds}") for rounds in (2, 4))
    # All are loaded before the first is computed; what else the loader yields is small.
    pixels = 64 * 3 * 32 * 32 * FLOAT32
    assert (more.microbatches, few.microbatches) == (4, 2)
    assert 2 * pixels <= more.memory.peak - few.memory.peak < 2 * pixels * 1.1
    assert more.memory.activations == few.memory.activations


def test_collectives_of_a_block_are_those_that_measurements_count():
    found = plan("mot", 2, "--parallelism.tensor_parallel_degree=2")
    assert found.calls["tp"]["all-gather"] == 4 * LAYERS + 2  # two sub-layers, there and back; head
    stream = found.samples * SEQ * DIM * FLOAT32
    assert found.sent["tp"] == pytest.approx((8 * LAYERS + 4) * stream / 2, rel=0.05)
    found = plan("mot", 2, "--parallelism.context_parallel_degree=2")
    assert found.calls["cp"] == {"all-to-all": 4 * LAYERS}
    found = plan("mot", 2)
    assert found.calls["fsdp"]["reduce-scatter"] == LAYERS + 2  # embedding, blocks, norm and head


def test_tensor_and_context_parallelism_share_the_work():
    alone = plan("mot", 1)
    for key in ("tensor", "context"):
        shared = plan("mot", 2, f"--parallelism.{key}_parallel_degree=2")
        assert shared.flops == pytest.approx(alone.flops / 2, rel=0.03)
        assert shared.memory.activations < 0.62 * alone.memory.activations
        assert shared.tokens == alone.tokens


def test_checkpointing_keeps_what_goes_into_blocks_and_computes_the_rest_again():
    modes = {
        "none": ["--activation_checkpoint.mode=none"],
        "selective": ["--activation_checkpoint.mode=selective",
                      "--activation_checkpoint.selective_ac_option=op"],
        "full": ["--activation_checkpoint.mode=full"],
    }  # fmt: skip
    plans = {mode: plan("mot", 1, *overrides) for mode, overrides in modes.items()}
    kept = [found.memory.activations for found in plans.values()]
    assert kept == sorted(kept, reverse=True)
    assert plans["none"].flops < plans["selective"].flops < plans["full"].flops
    more, fewer = (
        plan("mot", 1, *modes["full"], f"--training.local_batch_size={rows}") for rows in (4, 2)
    )
    # Of a token each block keeps its input; besides there are the last norm, the head and the loss.
    block = LAYERS * DIM * FLOAT32
    vocabulary = get_train_spec("mot").model_args["debugmodel"].total_vocab_size
    of_a_token = (more.memory.activations - fewer.memory.activations) / (2 * SEQ)
    assert block < of_a_token < block + 3 * FLOAT32 * (vocabulary + DIM)


def test_activations_grow_with_the_batch_and_state_does_not():
    small, large = (plan("mot", 1, f"--training.local_batch_size={n}").memory for n in (2, 8))
    assert large.activations == pytest.approx(4 * small.activations, rel=0.02)
    assert large.parameters == small.parameters
    assert large.optimizer_state == small.optimizer_state


def test_gradient_accumulation_repeats_microbatches_and_keeps_gradients():
    once = plan("mot", 2)
    thrice = plan("mot", 2, f"--training.global_batch_size={2 * 3 * ROWS}")
    assert (once.microbatches, thrice.microbatches) == (1, 3)
    assert thrice.flops == 3 * once.flops
    assert thrice.sent["fsdp"] == pytest.approx(3 * once.sent["fsdp"], rel=0.15)
    assert thrice.tokens == 3 * once.tokens
    extra = thrice.memory.peak - once.memory.peak
    # Tokens, three kinds of numbers of positions, targets, and two masks.
    batch = ROWS * SEQ * (5 * INT64 + 2)
    assert 2 * batch < extra <= thrice.memory.gradients + 2 * batch


def test_replicas_sum_gradients_and_hold_what_they_held():
    alone, ddp = plan("mot", 1), plan("mot", 2, "--parallelism.data_parallel_replicate_degree=2")
    assert ddp.memory.parameters == alone.memory.parameters
    # Two ranks of a ring send half of the sums twice; buckets are copies of gradients.
    assert ddp.sent == {"dp_replicate": alone.memory.gradients}
    buckets = ddp.memory.other_state - alone.memory.other_state
    assert buckets == alone.memory.gradients
    hsdp = plan("mot", 4, "--parallelism.data_parallel_replicate_degree=2")
    assert hsdp.degrees == {"dp_replicate": 2, "dp_shard": 2}
    assert hsdp.sent["dp_replicate"] == pytest.approx(alone.memory.gradients / 2, rel=0.01)


@pytest.mark.parametrize("schedule", ["1F1B", "GPipe", "Interleaved1F1B", "ZBVZeroBubble"])
def test_ranks_of_a_pipeline_hold_the_model_between_them(schedule):
    flags = (*PIPELINE, f"--parallelism.pipeline_parallel_schedule={schedule}")
    ranks = [plan("mot", 2, *flags, rank=rank) for rank in (0, 1)]
    held = sum(found.memory.parameters for found in ranks)
    assert held == plan("mot", 1).num_parameters * FLOAT32
    assert sum(found.flops for found in ranks) == pytest.approx(
        plan("mot", 1, "--training.local_batch_size=4").flops, rel=0.05
    )
    for found in ranks:
        assert found.microbatches == 4
        assert 0 < found.bubble < 0.5
    if schedule in ("1F1B", "GPipe"):  # one cut, one stream each way
        stream = 4 * SEQ * DIM * FLOAT32
        assert [found.sent["pp"] for found in ranks] == [stream, stream]
    if schedule == "1F1B":
        gpipe = plan("mot", 2, *PIPELINE, "--parallelism.pipeline_parallel_schedule=GPipe")
        assert ranks[0].memory.peak < gpipe.memory.peak  # GPipe holds all four microbatches


@pytest.mark.parametrize(
    ("schedule", "world_size", "rank"),
    [
        ("1F1B", 2, 0),
        pytest.param("1F1B", 2, 1, marks=pytest.mark.slow),
        pytest.param("1F1B", 4, 0, marks=pytest.mark.slow),
        pytest.param("Interleaved1F1B", 2, 0, marks=pytest.mark.slow),
    ],
)
def test_a_long_pipeline_is_planned_by_its_first_microbatches(
    schedule, world_size, rank, monkeypatch
):
    arguments = [
        f"--config={TRAIN_CONFIGS / 'mot' / 'debugmodel.toml'}",
        *(f"--training.seq_len={SEQ}", "--validation.no-enable", *PIPELINE),
        f"--parallelism.pipeline_parallel_schedule={schedule}",
        *("--training.local_batch_size=8", "--parallelism.pipeline_parallel_microbatch_size=1"),
    ]
    short = plan_step(arguments, world_size, rank)
    ran = []

    def keep_all(job_config, dims):
        count = job_config.training.local_batch_size
        ran.append(steady.shorten(job_config, dims).run)
        job_config.training.local_batch_size = count
        return steady.Microbatches(count, count)

    monkeypatch.setattr(step, "shorten", keep_all)
    whole = plan_step(arguments, world_size, rank)
    assert ran == [3 if schedule == "1F1B" else 4]
    assert short.microbatches == whole.microbatches == 8
    assert short.flops == whole.flops
    assert short.bubble == pytest.approx(whole.bubble)
    assert short.sent == pytest.approx(whole.sent, rel=1e-6)
    assert short.calls == whole.calls
    assert short.memory.gradients == whole.memory.gradients
    assert short.memory.peak == pytest.approx(whole.memory.peak, rel=1e-3)
    # What is of a step, not of a microbatch, is multiplied with the rest here.
    assert short.product_bytes == whole.product_bytes
    assert short.other_bytes == pytest.approx(whole.other_bytes, rel=0.05)


def test_compiled_blocks_keep_less():
    config = ("--compile.enable", "--compile.components=model")
    eager, compiled = plan("mot", 1), plan("mot", 1, *config)
    assert compiled.is_compiled and not eager.is_compiled
    assert compiled.memory.activations < eager.memory.activations
    assert compiled.memory.parameters == eager.memory.parameters
    assert compiled.flops == pytest.approx(eager.flops, rel=0.02)


def test_plans_of_other_sizes_in_one_process_are_those_of_a_process_of_their_own():
    flags = ("--compile.enable", "--compile.components=model",
             "--parallelism.tensor_parallel_degree=2", "--activation_checkpoint.mode=selective",
             "--activation_checkpoint.selective_ac_option=op")  # fmt: skip
    for rows in (1, 4, 2):
        last = plan("mot", 4, *flags, f"--training.local_batch_size={rows}")
    alone = run_ranks(plan, 1, "mot", 4, *flags, "--training.local_batch_size=2", init=False)
    assert last == alone[0]


def test_the_average_of_the_parameters_is_one_more_copy():
    with_average, without = (plan("mom", 1, f"--ema.decay={decay}") for decay in (0.9, 0.0))
    more = with_average.memory.other_state - without.memory.other_state
    assert more == without.memory.parameters
    assert with_average.memory.peak - without.memory.peak == more


@pytest.mark.parametrize(
    ("family", "config"),
    [("mom", "DiT-S-4"), ("mone", "S-16_imagenet21k"), ("mmdit", "d15"), ("mixdiff", "S-4x4")],
)
def test_jobs_whose_data_is_elsewhere_are_planned_as_their_flavour_says(family, config):
    found = plan(family, 8, "--training.local_batch_size=8", config=config)
    spec = get_train_spec(family)
    args, images = spec.model_args[found.flavor], found.assumed_images
    assert images is not None
    assert (images.channels, images.size) == (args.in_channels, args.image_size)
    if family != "mmdit":  # there prompts decide too: this job's are tokens
        with torch.device("meta"):
            parameters = sum(p.numel() for p in spec.model_cls(args).parameters())
        assert found.num_parameters == parameters
    assert 0 < found.memory.activations < found.memory.peak


def test_data_that_is_here_is_looked_at():
    assert plan("mom", 1).assumed_images is None


def test_another_number_of_experts_is_another_plan():
    two, four = (plan("mixdiff", 1, f"--diffusers.num_experts={n}", "--multimodal.domains=style",
                      "--multimodal.train_domains=noto,noto_v1", "--mixture.top_k=1")
                 if n == 2 else plan("mixdiff", 1) for n in (2, 4))  # fmt: skip
    assert two.memory.parameters < four.memory.parameters


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--model.flavor=nothing",), "model.flavor = 'nothing'"),
        (("--parallelism.tensor_parallel_degree=3",), "parallelism.tensor_parallel_degree = 3"),
        (("--training.global_batch_size=3",), "training.global_batch_size = 3"),
        (("--training.enable_cpu_offload",), "training.enable_cpu_offload = true"),
    ],
)
def test_jobs_that_cannot_be_are_refused_as_in_training(overrides, message):
    with pytest.raises(ValueError, match=message):
        plan("mot", 2, *overrides)
