"""Start-up checks of the parallel layout: degrees, and what they must divide.

Every message names the key, its value, and the values that are possible.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
from collections.abc import Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
    get_schedule_class,
)
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Parallelism
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import get_train_spec

from torchtitan_mixtures import device
from torchtitan_mixtures.data.shards import count_shards
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.pipeline import stage_modules, stages_per_rank

if TYPE_CHECKING:
    from torchtitan_mixtures.parallelize import ContextCuts, Cuts, TensorCuts


SCHEDULES = (
    *("1F1B", "Interleaved1F1B", "GPipe", "LoopedBFS"),
    *("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"),
)
"""What PyTorch has; two more names of base classes go with a schedule in a CSV file only."""

SPLITTING = (ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble, ScheduleDualPipeV)
"""Schedules that run the backward pass of inputs and of weights apart."""


def check_layout(job_config: MixtureJobConfig, model_args: Any) -> None:
    """Check the degrees against the model, the number of processes and the batch sizes.

    Raises:
        ValueError: Names the key, its value and what is possible.
    """
    for key in ("expert_parallel_degree", "expert_tensor_parallel_degree"):
        degree = getattr(job_config.parallelism, key)
        if degree != 1:
            raise ValueError(
                f"parallelism.{key} = {degree}: no family of this plugin has routed experts to "
                "distribute; set it to 1."
            )
    # A mixture of models is cut as its parts are.
    for family, part in getattr(model_args, "parts", [(job_config.model.name, model_args)]):
        cuts = _cuts(family)
        check_tensor_parallel(job_config, part, cuts.tensor_parallel)
        _check_context_parallel(job_config, part, cuts.context_parallel)
    _check_parts(job_config, model_args)
    _check_pipeline(job_config, model_args)
    ranks = _check_degrees(job_config.parallelism, int(os.environ.get("WORLD_SIZE", "1")))
    check_batch_sizes(job_config, ranks)
    if hasattr(model_args, "modality_names"):  # the readers of token data share its shards
        count_shards(job_config, ranks)


def _check_parts(job_config: MixtureJobConfig, model_args: Any) -> None:
    """Check what the parts of a mixture of models must have in common."""
    degree = job_config.parallelism.context_parallel_degree
    if degree > 1 and not getattr(model_args, "same_patches", True):
        sizes = {expert: args.patch_size for expert, (_, args) in zip(
            model_args.experts, model_args.parts, strict=True)}  # fmt: skip
        raise ValueError(
            f"parallelism.context_parallel_degree = {degree}: ranks cannot share the tokens of "
            f"experts with different patches ({sizes}); set it to 1."
        )
    if degree > 1 and not getattr(model_args, "parts", True):
        raise ValueError(
            f"parallelism.context_parallel_degree = {degree}: a router alone has no tokens to "
            "share; set it to 1."
        )


def check_batch_sizes(job_config: JobConfig, ranks: int) -> None:
    """Check that a global batch can be shared by so many data-parallel ranks.

    Raises:
        ValueError: Names the keys, and local batch sizes that are possible.
    """
    local, wanted = job_config.training.local_batch_size, job_config.training.global_batch_size
    if wanted < 0 or (wanted > 0 and wanted % (local * ranks) == 0):
        return
    of_rank = wanted // ranks if wanted % ranks == 0 else 0
    possible = f" Possible local_batch_size: {_divisors(of_rank)}." if of_rank else ""
    raise ValueError(
        f"training.global_batch_size = {wanted}: must be -1 or a multiple of "
        f"training.local_batch_size ({local}) x data-parallel ranks ({ranks}) = "
        f"{local * ranks}.{possible}"
    )


def _cuts(family: str) -> Cuts:
    """Look up what a family declares."""
    return importlib.import_module(f"torchtitan_mixtures.models.{family}.parallelize").CUTS


def _check_degrees(config: Parallelism, world: int) -> int:
    """Check that the degrees multiply to the number of processes; return the data-parallel ranks.

    Degrees other than those of data parallelism are at least 1 by now.
    """
    replicate, shard = config.data_parallel_replicate_degree, config.data_parallel_shard_degree
    others = {
        f"parallelism.{name}_parallel_degree": getattr(config, f"{name}_parallel_degree")
        for name in ("tensor", "context", "pipeline")
    }
    others = {key: degree for key, degree in others.items() if degree > 1}
    product = math.prod(others.values())
    if world % product:
        degrees = " x ".join(f"{key} = {degree}" for key, degree in others.items())
        are = f", together {product}: their product must" if len(others) > 1 else ": must"
        raise ValueError(
            f"{degrees}{are} divide the number of processes, {world}: {_divisors(world)}."
        )
    ranks = world // product
    if replicate >= 1 and shard == -1 and ranks % replicate == 0:
        shard = ranks // replicate
    if replicate < 1 or replicate * shard != ranks:
        processes = f"the number of processes, {world}"
        if others:
            degrees = " x ".join(f"{key} ({degree})" for key, degree in others.items())
            processes += f", divided by {degrees} = {ranks}"
        raise ValueError(
            f"parallelism.data_parallel_replicate_degree = {replicate}, "
            f"parallelism.data_parallel_shard_degree = {shard}: their product must be {processes} "
            "(a shard degree of -1 takes what is left)."
        )
    is_ddp = replicate > 1 and shard == 1 and config.context_parallel_degree == 1
    if is_ddp and others:
        key, degree = next(iter(others.items()))
        raise ValueError(
            f"parallelism.data_parallel_replicate_degree = {replicate} and {key} = {degree}: DDP "
            "goes with no other parallelism. Set data_parallel_replicate_degree = 1 and "
            f"data_parallel_shard_degree = {replicate}."
        )
    return ranks


def _sequence_lengths(job_config: JobConfig, model_args: BaseModelArgs) -> dict[str, int]:
    """Find out how many positions a sample has: where that is said -> number."""
    tokens = getattr(model_args, "num_tokens", None)
    if tokens is not None:  # of an image, whatever the keys of sequences say
        return {"multimodal.image_size": tokens}
    lengths = {"training.seq_len": job_config.training.seq_len}
    if job_config.validation.enable:
        lengths["validation.seq_len"] = job_config.validation.seq_len
    return lengths


def _require_divisor(
    job_config: JobConfig, key: str, degree: int, sizes: Mapping[str, int]
) -> None:
    """Refuse a degree that does not divide every size (description -> number)."""
    wrong = [f"{size} {name}" for name, size in sizes.items() if size % degree]
    if wrong:
        raise ValueError(
            f"{key} = {degree}: model.flavor = {job_config.model.flavor!r} has "
            f"{' and '.join(wrong)}, which it does not divide. Possible here: "
            f"{_divisors(math.gcd(*sizes.values()))}."
        )


def check_tensor_parallel(
    job_config: JobConfig, model_args: BaseModelArgs, cuts: TensorCuts | None
) -> None:
    """Check that a model can be cut into as many parts as the job asks for.

    Args:
        job_config: The job's configuration.
        model_args: The model's arguments, complete.
        cuts: What the model's family declares.

    Raises:
        ValueError: Names the key, its value and what is allowed.
    """
    config = job_config.parallelism
    degree, key = config.tensor_parallel_degree, "parallelism.tensor_parallel_degree"
    if degree == 1:
        return
    if degree < 1:
        raise ValueError(f"{key} = {degree}: must be 1 or more.")
    if cuts is None:
        family = job_config.model.name
        raise ValueError(f"{key} = {degree}: {family} does not support it; set it to 1.")
    sizes = dict(cuts.sizes(model_args))
    if cuts.cuts_positions and not getattr(model_args, "is_untied", False):
        # Without towers the stream is cut along the sequence, or the rank's part of it.
        parts = config.context_parallel_degree
        where = f", in {parts} parts" if parts > 1 else ""
        for name, length in _sequence_lengths(job_config, model_args).items():
            sizes[f"positions ({name}{where})"] = length // parts
    _require_divisor(job_config, key, degree, sizes)
    if getattr(model_args, "dispatch", None) == "reference":
        raise ValueError(
            f'mixture.dispatch = "reference": goes with {key} = 1 only, not {degree}; set "split" '
            'or "grouped".'
        )
    compiled = job_config.compile.enable and "model" in job_config.compile.components
    if config.enable_async_tensor_parallel and not compiled:
        raise ValueError(
            "parallelism.enable_async_tensor_parallel = true: needs compile.enable = true and "
            '"model" in compile.components.'
        )


def _check_context_parallel(
    job_config: MixtureJobConfig, model_args: Any, cuts: ContextCuts | None
) -> None:
    config, kind = job_config.parallelism, job_config.mixture.context_parallel
    degree, key = config.context_parallel_degree, "parallelism.context_parallel_degree"
    if degree == 1:
        return
    if cuts is None:
        family = job_config.model.name
        raise ValueError(f"{key} = {degree}: {family} does not support it; set it to 1.")
    balancer = config.context_parallel_load_balancer
    if balancer not in (None, "headtail", "ptrr"):
        raise ValueError(
            f"parallelism.context_parallel_load_balancer = {balancer!r}: must be 'headtail' or "
            "'ptrr'; it matters to mixture.context_parallel = \"ring\" only."
        )
    lengths = {
        f"positions ({name})": length
        for name, length in _sequence_lengths(job_config, model_args).items()
    }
    if kind == "all_to_all":
        tensor = config.tensor_parallel_degree
        where = f" on each of {tensor} ranks of tensor parallelism" * (tensor > 1)
        shared = {f"{name}{where}": n // tensor for name, n in cuts.sizes(model_args).items()}
        _require_divisor(job_config, key, degree, shared | lengths)
        if cuts.check is not None:
            cuts.check(job_config, model_args)
        return
    if cuts.ring is None:
        raise ValueError(
            f'mixture.context_parallel = "ring": {job_config.model.name} does not support it; '
            'set "all_to_all".'
        )
    if not device.has_accelerator():
        raise ValueError(
            'mixture.context_parallel = "ring": PyTorch has it for accelerators only, and this '
            'machine has none; set "all_to_all".'
        )
    attn_type = model_args.attn_type
    if attn_type not in ("sdpa", "flex"):
        raise ValueError(
            f'mixture.context_parallel = "ring": attends with "sdpa" or "flex", not '
            f'{attn_type!r} as model.flavor = {job_config.model.flavor!r}; set "all_to_all".'
        )
    if balancer == "ptrr" and attn_type != "flex":
        raise ValueError(
            f"parallelism.context_parallel_load_balancer = {balancer!r}: must be 'headtail', or "
            "'ptrr' with a flavour that attends with 'flex'."
        )
    # Head and tail: each rank has two pieces.
    halves = {name: length // 2 for name, length in lengths.items()}
    _require_divisor(job_config, key, degree, halves if balancer == "headtail" else lengths)


def _check_pipeline(job_config: MixtureJobConfig, model_args: Any) -> None:
    config, family = job_config.parallelism, job_config.model.name
    degree, key = config.pipeline_parallel_degree, "parallelism.pipeline_parallel_degree"
    if degree == 1:
        return
    if get_train_spec(family).pipelining_fn is None:
        raise ValueError(f"{key} = {degree}: {family} does not support it; set it to 1.")
    microbatch, batch = (
        config.pipeline_parallel_microbatch_size,
        job_config.training.local_batch_size,
    )
    if microbatch < 1 or batch % microbatch:
        raise ValueError(
            f"parallelism.pipeline_parallel_microbatch_size = {microbatch}: must divide "
            f"training.local_batch_size = {batch}: {_divisors(batch)}."
        )
    _check_stages(config, model_args.n_layers)
    try:
        _check_schedule(job_config, batch // microbatch, model_args.n_layers)
    except ValueError as error:
        raise ValueError(f"{key} = {degree}, {error}") from None


def _check_stages(config: Parallelism, n_layers: int) -> None:
    """Check the keys that say which layers a stage has."""
    for name, least in (
        ("pipeline_parallel_layers_per_stage", 1),
        ("pipeline_parallel_first_stage_less_layers", 0),
        ("pipeline_parallel_last_stage_less_layers", 0),
    ):
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"parallelism.{name} = {value}: must be {least} or more.")
    file = config.pipeline_parallel_schedule_csv
    if file and not os.path.isfile(file):
        raise ValueError(f"parallelism.pipeline_parallel_schedule_csv = {file!r}: no such file.")
    parts = config.module_fqns_per_model_part
    if parts is None:
        return
    key = "parallelism.module_fqns_per_model_part"
    degree = config.pipeline_parallel_degree
    if not parts or len(parts) % degree:
        raise ValueError(
            f"{key}: has {len(parts)} parts; their number must be a multiple of "
            f"parallelism.pipeline_parallel_degree = {degree}."
        )
    wanted = ["tok_embeddings", *(f"layers.{i}" for i in range(n_layers)), "norm", "output"]
    found = [name for part in parts for name in part]
    for expected, name in zip_longest(wanted, found):
        if expected != name:
            raise ValueError(
                f"{key}: {name or 'nothing'} stands where {expected or 'nothing'} belongs. All "
                f"parts together must be tok_embeddings, layers.0 to layers.{n_layers - 1}, norm "
                "and output, in this order and each once."
            )


def _check_schedule(job_config: JobConfig, microbatches: int, n_layers: int) -> None:
    """Check that a schedule can run the stages; messages are continued from `_check_pipeline`."""
    config = job_config.parallelism
    degree, name = config.pipeline_parallel_degree, config.pipeline_parallel_schedule
    what = f"parallelism.pipeline_parallel_schedule = {name!r}"
    names = [schedule.lower() for schedule in SCHEDULES]
    if name.lower() not in names and not config.pipeline_parallel_schedule_csv:
        raise ValueError(f"{what}: must be one of {', '.join(SCHEDULES)}.")
    schedule = get_schedule_class(name)
    compiled = job_config.compile.enable and "model" in job_config.compile.components
    if compiled and schedule in SPLITTING:
        raise ValueError(
            f"{what}: splits backward passes, which PyTorch cannot do with compiled blocks; set "
            "compile.enable = false, or 1F1B or Interleaved1F1B."
        )
    is_single = issubclass(schedule, PipelineScheduleSingle)
    if not _is_dealt_out(config, degree, n_layers):
        possible = [n for n in range(1, n_layers + 3) if _is_dealt_out(config, n, n_layers)]
        raise ValueError(
            f"{what}: {n_layers} layers, the embedding (counted as "
            f"{config.pipeline_parallel_first_stage_less_layers} layers) and the head "
            f"({config.pipeline_parallel_last_stage_less_layers}) cannot be dealt out to its "
            f"stages. Degrees that these settings allow: {_join(possible)}."
        )
    per_rank = stages_per_rank(config, n_layers)
    is_exact = is_single or schedule in (ScheduleZBVZeroBubble, ScheduleDualPipeV)
    wanted = 1 if is_single else 2
    if per_rank < wanted or (is_exact and per_rank != wanted):
        raise ValueError(
            f"{what}: takes {'exactly' if is_exact else 'at least'} {wanted} stages on a rank, the "
            f"layout makes {per_rank}. Remove parallelism.pipeline_parallel_layers_per_stage and "
            "parallelism.module_fqns_per_model_part, or change them."
        )
    if not _runs(schedule, microbatches, degree, per_rank):
        numbers = range(1, 4 * degree * per_rank + 1)
        possible = [n for n in numbers if _runs(schedule, n, degree, per_rank)]
        raise ValueError(
            f"{what}: cannot run {microbatches} microbatches (training.local_batch_size / "
            f"parallelism.pipeline_parallel_microbatch_size). Possible: {_join(possible)}, ..."
        )


def _is_dealt_out(config: Parallelism, degree: int, n_layers: int) -> bool:
    """Whether a model's modules make as many stages as so many ranks need."""
    config = dataclasses.replace(config, pipeline_parallel_degree=degree)
    try:
        modules = stage_modules(config, n_layers)
    except ValueError:
        return False
    return len(modules) > 0 and len(modules) == degree * stages_per_rank(config, n_layers)


def _runs(schedule: type, microbatches: int, degree: int, per_rank: int) -> bool:
    """Whether a schedule of PyTorch takes this number of microbatches."""
    if schedule in (Schedule1F1B, ScheduleDualPipeV):
        return microbatches >= degree * per_rank
    if schedule in (ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble):
        return microbatches % max(1, microbatches // degree) == 0
    return True


def _divisors(number: int) -> str:
    return _join([n for n in range(1, number + 1) if number % n == 0])


def _join(numbers: list[int]) -> str:
    return ", ".join(str(n) for n in numbers)
