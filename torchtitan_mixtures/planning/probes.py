"""Plans a job in the few plain layouts that the formulas of `score.py` are taken from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures.data.model_flavor import model_flavor
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.planning.candidates import MODES, SCHEDULES, Candidate, Layout, Space
from torchtitan_mixtures.planning.devices import Device
from torchtitan_mixtures.planning.jobs import parse_planned_job
from torchtitan_mixtures.planning.score import Probes, Trunk
from torchtitan_mixtures.planning.step import Plan, plan_step
from torchtitan_mixtures.planning.world import world_size_in_environment

LONG = 32_768
"""Positions of a sample from which on context parallelism is considered unasked."""

MOST_ROWS = 64
"""Smallest local batch that is tried before a job is taken to have none."""


def samples_of_a_step(job_config: MixtureJobConfig, world_size: int) -> int:
    """Say how many samples a step has that a sweep must keep, in the layout that was given."""
    training, layout = job_config.training, job_config.parallelism
    if training.global_batch_size > 0:
        return training.global_batch_size
    others = (
        layout.tensor_parallel_degree,
        layout.context_parallel_degree,
        layout.pipeline_parallel_degree,
    )
    readers = world_size
    for degree in others:
        readers //= max(1, degree)
    return training.local_batch_size * max(1, readers)


def is_possible(arguments: Sequence[str], candidate: Candidate, world_size: int) -> bool:
    """Say whether a job could be trained so, by its own checks."""
    with world_size_in_environment(world_size):
        try:
            parse_planned_job([*arguments, *candidate.overrides()])
        except ValueError:
            return False
    return True


def find_space(
    arguments: Sequence[str], job_config: MixtureJobConfig, world_size: int, device: Device
) -> Space:
    """Find out what a sweep may choose from.

    Args:
        arguments: The command line of training.
        job_config: What it says; its layout need not be possible.
        world_size: Number of ranks.
        device: What they are.

    Raises:
        ValueError: As in training, if the job cannot be trained even in the plainest layout.
    """
    least = _least_rows(arguments, world_size)

    def allowed(degrees: Sequence[int], make: Callable[[int, int], Layout]) -> list[int]:
        """Leave out degrees that leave FSDP fewer than two ranks or that checks refuse."""
        fitting = [n for n in degrees if world_size % n == 0 and world_size // n > 1]
        layouts = {n: make(n, world_size // n) for n in fitting}
        rows = {n: max(least, layout.pipeline) for n, layout in layouts.items()}
        return [
            n
            for n, layout in layouts.items()
            if is_possible(arguments, Candidate(layout, "none", rows[n], -1), world_size)
        ]

    degrees = (2, 4, 8)
    tensor = allowed(
        [n for n in degrees if n <= device.of_a_node], lambda n, rest: Layout(n, shards=rest)
    )
    given, family = job_config.parallelism.context_parallel_degree, job_config.model.name
    wants_context = given > 1 or _positions(job_config) >= LONG
    context = allowed(degrees * wants_context, lambda n, rest: Layout(context=n, shards=rest))
    pipeline: list[tuple[int, str]] = []
    if get_train_spec(family).pipelining_fn is not None:
        left = degrees
        for schedule in SCHEDULES:

            def in_stages(n: int, rest: int, schedule: str = schedule) -> Layout:
                return Layout(pipeline=n, schedule=schedule, shards=rest)

            pipeline += [(n, schedule) for n in allowed(left, in_stages)]
    return Space(
        world_size=world_size,
        of_a_node=device.of_a_node,
        samples=samples_of_a_step(job_config, world_size),
        least_rows=least,
        tensor=(1, *tensor),
        context=(1, *context),
        pipeline=((1, ""), *sorted(pipeline, key=lambda pair: pair[0])),
    )


def _least_rows(arguments: Sequence[str], world_size: int) -> int:
    """Find the smallest local batch size that a job takes."""
    plain = Layout(shards=world_size)
    rows = 1
    while rows < MOST_ROWS:
        if is_possible(arguments, Candidate(plain, "none", rows, -1), world_size):
            return rows
        rows *= 2
    with world_size_in_environment(world_size):
        parse_planned_job([*arguments, *Candidate(plain, "none", rows, -1).overrides()])
    return rows


def _positions(job_config: MixtureJobConfig) -> int:
    return getattr(model_flavor(job_config), "num_tokens", job_config.training.seq_len)


def plan_probes(
    arguments: Sequence[str],
    job_config: MixtureJobConfig,
    space: Space,
    progress: Callable[[str], None] = lambda message: None,
) -> Probes:
    """Plan a job in the layouts that formulas need; each takes as long as a plan does.

    Args:
        arguments: The command line of training.
        job_config: What it says; its layout need not be possible.
        space: What a sweep may choose from.
        progress: Told what is built.
    """
    world, rows = space.world_size, space.least_rows

    def build(layout: Layout, mode: str, of_a_rank: int = rows) -> Plan:
        progress(f"probe: {layout.degrees or 'one process'}, {mode}, {of_a_rank} samples")
        overrides = Candidate(layout, mode, of_a_rank, -1).overrides()
        return plan_step([*arguments, *overrides], world)

    plain = Layout(shards=world)
    training = job_config.training
    has_tensor, has_context = len(space.tensor) > 1, len(space.context) > 1
    sizes = [
        TORCH_DTYPE_MAP[name].itemsize
        for name in (
            training.dtype,
            training.mixed_precision_param,
            training.mixed_precision_reduce,
        )
    ]
    halves = Layout(tensor=2, shards=world // 2)
    return Probes(
        rows=rows,
        base={mode: build(plain, mode) for mode in MODES},
        double=build(plain, "full", 2 * rows),
        tensor={mode: build(halves, mode) for mode in MODES} if has_tensor else {},
        tensor_double=build(halves, "full", 2 * rows) if has_tensor else None,
        context=build(Layout(context=2, shards=world // 2), "none") if has_context else None,
        trunk=_trunk(job_config, sizes[1]) if len(space.pipeline) > 1 else None,
        parameter_bytes=sizes[0],
        gathered_bytes=sizes[1],
        reduced_bytes=sizes[2],
        has_average=job_config.ema.decay > 0,
    )


def _trunk(job_config: MixtureJobConfig, stream_bytes: int) -> Trunk:
    """Say what a pipeline cuts; families that have one are models of tokens."""
    args, seq = model_flavor(job_config), job_config.training.seq_len
    head = args.dim * args.total_vocab_size
    return Trunk(
        layers=args.n_layers,
        stream=seq * args.dim * stream_bytes,
        embedding=head * TORCH_DTYPE_MAP[job_config.training.dtype].itemsize,
        logits=seq * args.total_vocab_size * stream_bytes,
        # A product forward and two backward, two FLOPs for each multiply-add.
        head_flops=6 * head * seq,
    )
