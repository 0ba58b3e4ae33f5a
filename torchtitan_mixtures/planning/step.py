"""Plans a training step: builds a job's model in its layout and runs a step of it without values.

One process stands for one rank (`world.py`), PyTorch's fake tensors for its memory, and a meter
beneath them counts (`meter.py`). The model, its parallelism, activation checkpointing, the
optimizer and the schedule of a pipeline are those that train.

What differs from an accelerator:

- Operators are those that a CPU has: attention keeps its output and one float32 per head and
  position, as FlashAttention does; FlexAttention and variable-length attention are planned with
  their mask written out.
- Compiled blocks are cut by PyTorch's partitioner but their pointwise operators are not fused, so
  what lives at once inside a block is an upper bound. Under full activation checkpointing blocks
  are planned as not compiled, which leaves the same between forward and backward.
- Tokens are an even mix of modalities, samples one of experts; nothing says what data will be.
- What CUDA and NCCL take for themselves, what an allocator cannot use of what it holds, frozen
  encoders (VAE, text) and the clipping of gradients are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchtitan.distributed import ParallelDims

from torchtitan_mixtures.data.assumed_images import AssumedImages, assume_images
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.planning.bubble import bubble_share
from torchtitan_mixtures.planning.jobs import parse_planned_job
from torchtitan_mixtures.planning.running import RankModel, RankRun
from torchtitan_mixtures.planning.steady import shorten
from torchtitan_mixtures.planning.world import (
    degrees_of,
    fake_world,
    group_dimensions,
    is_ddp,
    make_dims,
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        parameters: Of its share of the parameters.
        gradients: Of its share of the gradients, as they are when the optimizer takes its step.
        optimizer_state: Of the optimizer's moments.
        other_state: Of buffers, of the parameters' average, and of DDP's buckets.
        activations: What the forward pass of a microbatch leaves to the backward pass: the batch,
            saved tensors, and weights that FSDP keeps gathered. Of a pipeline all that lives beside
            the state when most does, gathered weights and whole gradients among it.
        peak: Most that lives at once in a step that is not the first.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    other_state: int
    activations: int
    peak: int


@dataclass(frozen=True)
class Plan:
    """What a step needs and costs on one rank.

    Attributes:
        family: Name of the model's family.
        flavor: Name of the flavour.
        world_size: Number of ranks.
        rank: Which one this is.
        degrees: Dimension of the layout -> ranks, of those with more than one.
        memory: See there.
        num_parameters: Of the whole model.
        model_flops: FLOPs of a training step per token (per image of a classifier), by the
            family's own formula: what a step is for.
        samples: Sequences or images of a step, of all ranks.
        tokens: Positions of a step (images of a classifier), of all ranks.
        microbatches: That a rank computes one after another in a step.
        flops: That this rank computes in a step, recomputed ones and padding included.
        product_bytes: In and out of matrix products and attention in a step.
        other_bytes: In and out of all else in forward and backward passes.
        optimizer_bytes: In and out of the optimizer's operators.
        sent: Dimension of the layout -> bytes that this rank moves over it in a step. "other":
            groups of several dimensions, over which a few numbers are summed.
        calls: Dimension -> kind of collective -> how often; none is counted of DDP.
        bubble: Share of the time in which a rank of the pipeline has nothing to do.
        precision: Of matrix products.
        is_compiled: Whether blocks are compiled.
        assumed_images: What images were taken to be; None: the data was there.
    """

    family: str
    flavor: str
    world_size: int
    rank: int
    degrees: Mapping[str, int]
    memory: Memory
    num_parameters: int
    model_flops: int
    samples: int
    tokens: int
    microbatches: int
    flops: int
    product_bytes: int
    other_bytes: int
    optimizer_bytes: int
    sent: Mapping[str, int]
    calls: Mapping[str, Mapping[str, int]]
    bubble: float
    precision: str
    is_compiled: bool
    assumed_images: AssumedImages | None


def plan_step(arguments: Sequence[str], world_size: int, rank: int = 0) -> Plan:
    """Plan a training step of one rank; in a process that has no process group.

    Args:
        arguments: The command line of training: `--config FILE.toml` and overrides.
        world_size: Number of ranks.
        rank: Which of them.

    Raises:
        ValueError: As in training, for what can be known without the data.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"--rank {rank}: must be from 0 to {world_size - 1}.")
    with fake_world(world_size, rank):
        job_config, assumed = parse_planned_job(arguments)
        with assume_images(assumed):
            dims = make_dims(job_config, world_size)
            samples, rounds = _samples_and_rounds(job_config, dims, world_size)
            microbatches = shorten(job_config, dims)
            model = RankModel(job_config, dims)
            run = microbatches.extend(model.run(rounds), dims)
            sent, calls = _traffic(run, dims)
        other_state = _other_state(job_config, run, world_size)
        replicas = job_config.parallelism.data_parallel_replicate_degree
        if is_ddp(job_config, world_size):
            # DDP sums what has been accumulated anew with each microbatch.
            sent["dp_replicate"] = round(rounds * run.trained * 2 * (replicas - 1) / replicas)
        return Plan(
            family=job_config.model.name,
            flavor=job_config.model.flavor,
            world_size=world_size,
            rank=rank,
            degrees=degrees_of(dims, replicas),
            memory=_memory(run, other_state),
            num_parameters=model.num_parameters,
            model_flops=model.model_flops,
            samples=samples,
            tokens=samples * _positions(job_config, model.args),
            microbatches=rounds * microbatches.all,
            flops=_of_all_rounds(run, "flops"),
            product_bytes=_of_all_rounds(run, "product_bytes"),
            other_bytes=_of_all_rounds(run, "other_bytes"),
            optimizer_bytes=run.optimizer_bytes,
            sent=sent,
            calls=calls,
            bubble=0.0
            if model.pipeline is None
            else bubble_share(model.pipeline.schedule, dims.pp, microbatches.all),
            precision=_precision(job_config, dims),
            is_compiled=model.is_compiled,
            assumed_images=assumed,
        )


def _precision(job_config: MixtureJobConfig, dims: ParallelDims) -> str:
    """Find out what products are computed in: TorchTitan mixes with FSDP or by autocast only."""
    mixes = dims.fsdp_enabled or not (dims.tp_enabled or dims.pp_enabled)
    training = job_config.training
    return training.mixed_precision_param if mixes else training.dtype


def _samples_and_rounds(
    job_config: MixtureJobConfig, dims: ParallelDims, world_size: int
) -> tuple[int, int]:
    """Samples of a step, and how many microbatches of gradient accumulation they make."""
    training = job_config.training
    others = dims.tp * dims.cp * dims.pp
    of_a_round = training.local_batch_size * (world_size // others)
    samples = training.global_batch_size if training.global_batch_size > 0 else of_a_round
    return samples, samples // of_a_round


def _positions(job_config: MixtureJobConfig, model_args: Any) -> int:
    """Positions of a sample, as a family counts FLOPs per position; a classifier has one."""
    if getattr(model_args, "is_classifier", False):
        return 1
    return getattr(model_args, "num_tokens", job_config.training.seq_len)


def _other_state(job_config: MixtureJobConfig, run: RankRun, world_size: int) -> int:
    average = run.parameters if job_config.ema.decay > 0 else 0
    buckets = run.trained if is_ddp(job_config, world_size) else 0
    return run.buffers + average + buckets


def _memory(run: RankRun, other_state: int) -> Memory:
    # Batches of all microbatches are loaded before the first is computed.
    unseen = other_state - run.buffers + (run.rounds - 1) * run.batch
    peaks = [tally.peak + run.optimizer_state for tally in run.tallies]
    return Memory(
        parameters=run.parameters,
        gradients=run.gradients,
        optimizer_state=run.optimizer_state,
        other_state=other_state,
        activations=max(tally.activations for tally in run.tallies),
        peak=max(*peaks, run.optimizer_peak) + unseen,
    )


def _of_all_rounds(run: RankRun, name: str) -> int:
    """Sum over a step's microbatches, of which those after the second are like it."""
    first, last = (getattr(tally, name) for tally in (run.tallies[0], run.tallies[-1]))
    return first + (run.rounds - 1) * last


def _traffic(run: RankRun, dims: ParallelDims) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Bytes and calls of a step by dimension."""
    dimensions = group_dimensions(dims)
    sent: dict[str, int] = {}
    calls: dict[str, dict[str, int]] = {}
    rounds = [1, run.rounds - 1][: len(run.tallies)]
    for tally, times in zip(run.tallies, rounds, strict=True):
        for group, number in tally.sent.items():
            name = dimensions.get(group, "other")
            sent[name] = sent.get(name, 0) + times * number
        for (group, kind), number in tally.calls.items():
            kinds = calls.setdefault(dimensions.get(group, "other"), {})
            kinds[kind] = kinds.get(kind, 0) + times * number
    return sent, calls
