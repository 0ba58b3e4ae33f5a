"""Pipeline parallelism: stages from TorchTitan, schedules from PyTorch, our targets and scaling.

TorchTitan cuts the model and builds the schedule. Three things are different here:

- The loss of a microbatch is divided by the global number of supervised positions before its
  backward pass, as without pipelining. (TorchTitan 0.2.2 scales only what it reports: its gradients
  are too large by that number.)
- Targets may consist of several tensors. The schedule cuts the numbers of the batch's rows into
  microbatches, and the loss looks up what belongs to them.
- Before its first step, PyTorch 2.13 sends a microbatch of arbitrary activations through the stages
  and back to learn shapes. Metrics leave that out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import ProcessGroup, Work
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    _PipelineSchedule,
    get_schedule_class,
)
from torchtitan.components.loss import LossFunction
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Parallelism
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.pipeline_parallel import (
    build_pipeline_schedule,
    generate_llm_fqn_per_model_part,
    pipeline_module_split,
)
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import ParallelizeFunction

from torchtitan_mixtures.objectives.next_token import NextTokenLoss, Targets


class MicrobatchLoss:
    """The loss as a schedule calls it: with logits and the numbers of the rows they are of."""

    def __init__(self, loss_fn: NextTokenLoss) -> None:
        self.loss_fn = loss_fn
        self.targets: Targets | None = None
        self.divisor: Tensor | None = None
        self._scores: dict[int, tuple[Tensor, Tensor]] = {}  # by first row: nll sums, counts

    def __call__(self, pred: Tensor, rows: Tensor) -> Tensor:
        """Score logits `(rows, seq, vocab)` of the rows `rows`, int64 on the CPU."""
        assert self.targets is not None and self.divisor is not None
        # While a model is only being estimated there are no values, and all microbatches are alike.
        first = 0 if isinstance(rows, FakeTensor) else int(rows[0])
        targets = self.targets.slice(first, first + len(rows))
        loss, nll_sums, counts = self.loss_fn.score(pred, targets)
        # Overwrites what a rehearsal with arbitrary activations left.
        self._scores[first] = nll_sums, counts
        return loss / self.divisor

    def book(self) -> None:
        """Add the scores of all microbatches to the loss's meter."""
        for scores in self._scores.values():
            self.loss_fn.meter.add(*scores)
        self._scores.clear()


class Pipeline:
    """A schedule and its stages, as the trainer and the validator use them.

    Args:
        schedule: Runs the stages of this rank.
        stages: The stages of this rank, in ascending order.
        loss: What the schedule calls on the last stage.
        group: The ranks of the pipeline.
    """

    def __init__(
        self,
        schedule: _PipelineSchedule,
        stages: list[PipelineStage],
        loss: MicrobatchLoss,
        group: ProcessGroup,
    ) -> None:
        self.schedule = schedule
        self.has_first = any(stage.is_first for stage in stages)
        self.has_last = any(stage.is_last for stage in stages)
        self.stages = stages
        self._loss = loss
        self._group = group
        # What goes from stage to stage, by stage and shape of the batch: shape, dtype.
        self._exchanged: dict[tuple[int, torch.Size], tuple[torch.Size, torch.dtype]] = {}

    def step(
        self, inputs: Tensor, kwargs: Mapping[str, Any], targets: Targets, divisor: Tensor
    ) -> Tensor:
        """Run a batch through the pipeline and back.

        Args:
            inputs: Token ids, `(batch, seq)`; read by the first stage.
            kwargs: Further arguments of every stage's `forward`, batch dimension first.
            targets: What the last stage's output is scored against.
            divisor: What the loss is divided by before its backward pass; a scalar.

        Returns:
            The loss of the batch on ranks with the last stage, zero elsewhere; a scalar.
        """
        self._loss.targets, self._loss.divisor = targets, divisor
        rows = torch.arange(len(inputs))
        losses: list[Tensor] = []
        last: dict[str, Any] = {"target": rows, "losses": losses} if self.has_last else {}
        first = (inputs,) if self.has_first else ()
        self.schedule.step(*first, **kwargs, **last, return_outputs=False)
        if not self.has_last:
            return torch.zeros((), device=inputs.device)
        self._loss.book()
        return torch.stack([loss.detach() for loss in losses]).sum().to(inputs.device)

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, kwargs: Mapping[str, Any], targets: Targets) -> None:
        """Run a batch through the stages, forward only, and add its scores to the loss's meter.

        Not by the schedule: PyTorch 2.13 cannot run V-shaped ones without a backward pass, and
        learns all shapes anew whenever the two alternate. A rank takes up the next batch while the
        next rank is at work on this one.

        Args:
            inputs: Token ids, `(batch, seq)`, of any size.
            kwargs: As in `step`.
            targets: As in `step`.
        """
        output: Tensor | None = None
        sends: list[Work] = []
        for stage in self.stages:
            if stage.is_first:
                x = inputs
            elif self._rank_of(stage, stage.stage_index - 1) == stage.group_rank:
                assert output is not None
                x = output
            else:
                x = self._receive(stage, inputs)
            output = cast(Tensor, stage.submod(x, **kwargs))
            if stage.is_last:
                self._loss.loss_fn(output, targets)
            elif self._rank_of(stage, stage.stage_index + 1) != stage.group_rank:
                sends.append(self._send(stage, output, inputs.shape))
        for send in sends:
            send.wait()

    @staticmethod
    def _rank_of(stage: PipelineStage, index: int) -> int:
        return stage.stage_index_to_group_rank[index]

    def _receive(self, stage: PipelineStage, inputs: Tensor) -> Tensor:
        """Get what the stage before sends; what that looks like is told once for each shape."""
        rank = self._rank_of(stage, stage.stage_index - 1)
        key = stage.stage_index, inputs.shape
        if key not in self._exchanged:
            told: list[Any] = [None]
            dist.recv_object_list(told, group_src=rank, group=self._group, device=inputs.device)
            self._exchanged[key] = told[0]
        shape, dtype = self._exchanged[key]
        x = torch.empty(shape, dtype=dtype, device=inputs.device)
        dist.recv(x, group_src=rank, group=self._group)
        return x

    def _send(self, stage: PipelineStage, output: Tensor, shape: torch.Size) -> Work:
        rank = self._rank_of(stage, stage.stage_index + 1)
        key = stage.stage_index + 1, shape
        if key not in self._exchanged:
            self._exchanged[key] = output.shape, output.dtype
            dist.send_object_list(
                [self._exchanged[key]], group_dst=rank, group=self._group, device=output.device
            )
        work = dist.isend(output.contiguous(), group_dst=rank, group=self._group)
        assert work is not None
        return work


def stages_per_rank(config: Parallelism, n_layers: int) -> int:
    """Number of stages a rank has, by TorchTitan's rules.

    Raises:
        ValueError: Ranks would have different numbers.
    """
    if config.module_fqns_per_model_part:
        return len(config.module_fqns_per_model_part) // config.pipeline_parallel_degree
    if config.pipeline_parallel_layers_per_stage is not None:
        units = n_layers + (
            config.pipeline_parallel_first_stage_less_layers
            + config.pipeline_parallel_last_stage_less_layers
        )
        stages = -(-units // config.pipeline_parallel_layers_per_stage)
        if stages % config.pipeline_parallel_degree:
            raise ValueError(f"{stages} stages for {config.pipeline_parallel_degree} ranks")
        return stages // config.pipeline_parallel_degree
    schedule = get_schedule_class(config.pipeline_parallel_schedule)
    return 1 if issubclass(schedule, PipelineScheduleSingle) else 2


def stage_modules(config: Parallelism, n_layers: int) -> list[list[str]]:
    """List the modules of each stage, by TorchTitan's rules.

    Raises:
        ValueError: The layers cannot be dealt out to so many stages.
    """
    if config.module_fqns_per_model_part:
        return config.module_fqns_per_model_part
    return generate_llm_fqn_per_model_part(
        config.pipeline_parallel_degree * stages_per_rank(config, n_layers),
        n_layers,
        config.pipeline_parallel_first_stage_less_layers,
        config.pipeline_parallel_last_stage_less_layers,
    )


def pipeline(
    model: nn.Module,
    parallel_dims: ParallelDims,
    job_config: JobConfig,
    device: torch.device,
    model_args: BaseModelArgs,
    parallelize_fn: ParallelizeFunction,
    loss_fn: LossFunction,
) -> tuple[Any, list[nn.Module], bool, bool]:
    """Cut a model into stages and build their schedule (a TrainSpec's `pipelining_fn`).

    The model has `tok_embeddings`, `layers`, `norm` and `output`; stages lack some of them.

    Returns:
        The `Pipeline` (the host expects a schedule, but hands it to our trainer and validator
        only), this rank's stages, and whether the first and the last are among them.
    """
    n_layers = model_args.n_layers  # pyrefly: ignore [missing-attribute]
    names = [_expand(model, stage) for stage in stage_modules(job_config.parallelism, n_layers)]
    schedule_name = job_config.parallelism.pipeline_parallel_schedule
    stages, parts = pipeline_module_split(
        model, parallel_dims.get_mesh("pp"), schedule_name, device, names
    )
    for index, part in enumerate(parts):
        for name, child in list(part.named_children()):
            # TorchTitan leaves empty containers where it takes out all modules of one.
            if isinstance(child, nn.ModuleDict) and not len(child) and name != "layers":
                setattr(part, name, None)
        parts[index] = parallelize_fn(part, parallel_dims, job_config)
        stages[index].submod = parts[index]
        if not stages[index].is_last:
            parts[index].register_forward_hook(_detachable)
    # TorchTitan would let DualPipeV overlap with the all-to-alls of routed experts.
    layout = dataclasses.replace(
        job_config.parallelism, pipeline_parallel_expert_parallel_overlap=False
    )
    job_config = dataclasses.replace(job_config, parallelism=layout)
    loss = MicrobatchLoss(loss_fn)  # pyrefly: ignore [bad-argument-type]
    schedule = build_pipeline_schedule(job_config, stages, loss)
    built = Pipeline(schedule, stages, loss, parallel_dims.get_mesh("pp").get_group())
    return built, parts, built.has_first, built.has_last


def _detachable(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Copy activations that are a view: zero-bubble schedules detach them in place."""
    return output.clone() if output._is_view() else output


def _expand(model: nn.Module, names: list[str]) -> list[str]:
    """Name the entries of a container in its place: TorchTitan keeps containers by entry only."""
    expanded = []
    for name in names:
        module = getattr(model, name, None)
        if isinstance(module, nn.ModuleDict):
            expanded += [f"{name}.{entry}" for entry in module]
        else:
            expanded.append(name)
    return expanded
