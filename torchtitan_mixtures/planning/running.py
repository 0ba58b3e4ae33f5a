"""Builds one rank's part of a job and runs its step on fake tensors, as the trainer would."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import get_train_context, maybe_enable_amp
from torchtitan.protocols.model_converter import build_model_converters
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec
from torchtitan.tools.utils import set_default_dtype

from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.pipeline import Pipeline
from torchtitan_mixtures.planning.batches import make_batch
from torchtitan_mixtures.planning.collectives import Group
from torchtitan_mixtures.planning.meter import StepMeter
from torchtitan_mixtures.planning.pipeline_shapes import tell_shapes

BACKEND = "aot_eager_decomp_partition"
"""Backend of blocks that are compiled: cuts graphs as inductor does, and needs no compiler."""


@dataclass(frozen=True)
class Tally:
    """What was counted of one microbatch, or of all microbatches of a pipeline; see `StepMeter`.

    Attributes:
        activations: Bytes that the forward pass left; of a pipeline the most that lived at once.
        peak: Bytes that lived at once at most, parameters among them.
        flops: Of forward and backward pass.
        product_bytes: In and out of what has FLOPs.
        other_bytes: In and out of all else.
        sent: Bytes by process group.
        calls: Collectives by process group and kind.
    """

    activations: int
    peak: int
    flops: int
    product_bytes: int
    other_bytes: int
    sent: Mapping[Group, int]
    calls: Mapping[tuple[Group, str], int]

    @classmethod
    def of(cls, meter: StepMeter, activations: int) -> Tally:
        """Take what a meter says now."""
        traffic = dict(meter.sent), dict(meter.calls)
        return cls(
            activations, meter.peak, meter.flops, meter.product_bytes, meter.other_bytes, *traffic
        )


@dataclass(frozen=True)
class RankRun:
    """What a step of one rank was found to need and do; bytes.

    Attributes:
        parameters: Of its share of the parameters.
        trained: Of those of them that are not frozen.
        buffers: Of its buffers.
        gradients: Of its gradients when the optimiser takes its step.
        optimizer_state: Of the optimiser's moments.
        optimizer_peak: That lived at once at most while the optimiser stepped.
        optimizer_bytes: In and out of the optimiser's operators.
        rounds: Microbatches of gradient accumulation; those after the second are like it.
        tallies: Of the first and, if there is one, the second.
        batch: Of what the loader yields for a microbatch, and the trainer holds until a step ends.
        waiting: Of that, and of inputs and targets; of a pipeline those of all its microbatches,
            and the buffers into which its stages receive what belongs to each.
    """

    parameters: int
    trained: int
    buffers: int
    gradients: int
    optimizer_state: int
    optimizer_peak: int
    optimizer_bytes: int
    rounds: int
    tallies: Sequence[Tally]
    batch: int
    waiting: int


class RankModel:
    """One rank's part of a job, on the meta device.

    Args:
        job_config: The checked job; its compilation is changed to what runs without values.
        dims: The job's layout.

    Attributes:
        args: The flavour's arguments, complete.
        num_parameters: Of the whole model.
        model_flops: Of a training step per token, by the family's own formula.
        pipeline: Of layouts with pipeline parallelism.
        is_compiled: Whether the job compiles blocks.
    """

    def __init__(self, job_config: MixtureJobConfig, dims: ParallelDims) -> None:
        self._job, self._dims = job_config, dims
        self._spec: TrainSpec = get_train_spec(job_config.model.name)
        self.args: Any = self._spec.model_args[job_config.model.flavor]
        self.args.update_from_config(job_config)
        job_config.multimodal.vae = ""  # frozen encoders have seen the batch already
        self.is_compiled = self._settle_compilation()
        self._loss: Any = self._spec.build_loss_fn(job_config, parallel_dims=dims)
        if hasattr(self._loss, "start_step"):
            self._loss.start_step(1)
        self.pipeline: Pipeline | None = None
        self.num_parameters, self.model_flops = 0, 0
        self._parts = self._build()

    def _settle_compilation(self) -> bool:
        config = self._job.compile
        is_compiled = config.enable and "model" in config.components
        if is_compiled and self._job.activation_checkpoint.mode == "full":
            # The random state that recomputed attention asks for is not to be had without values.
            # Blocks that are not compiled leave the same: what goes into them.
            config.enable = False
        config.backend = BACKEND
        return is_compiled

    def _build(self) -> list[nn.Module]:
        job, dims, spec = self._job, self._dims, self._spec
        with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[job.training.dtype]):
            model = cast(nn.Module, spec.model_cls(self.args))
        build_model_converters(job, dims).convert(model)
        self.num_parameters, self.model_flops = self.args.get_nparams_and_flops(
            model, job.training.seq_len
        )
        if not dims.pp_enabled:
            return [spec.parallelize_fn(model, dims, job)]
        assert spec.pipelining_fn is not None
        built, parts, _, _ = spec.pipelining_fn(
            model, dims, job, torch.device("cpu"), self.args, spec.parallelize_fn, self._loss
        )
        self.pipeline = cast(Pipeline, built)
        tell_shapes(self.pipeline, job, self.args, dims)
        return parts

    def run(self, rounds: int) -> RankRun:
        """Run a step of so many microbatches; once."""
        batch: Any = make_batch(self._job, self.args)
        prepared = self._loss.prepare(self._parts[0], None, *batch, self._dims, self._job)
        fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        with fake_mode, StepMeter().watching() as meter:
            for part in self._parts:
                part.to_empty(device="cpu").train()
            parameters = [p for part in self._parts for p in part.parameters()]
            held = storage_bytes(parameters)
            buffers = meter.live - held

            def watched(tensor: Tensor) -> Tensor:
                fake = fake_mode.from_tensor(tensor)
                meter.watch(fake)
                return fake

            # The trainer holds a batch until the step ends, whatever the loss makes of it.
            batch, prepared = tree_map_only(Tensor, watched, (batch, prepared))
            loaded, waiting = (_bytes_in(tree) for tree in (batch, (batch, prepared)))
            tallies = [self._run_microbatch(meter, held + buffers, prepared)]
            if rounds > 1:
                start = held + buffers + _gradient_bytes(parameters)
                tallies.append(self._run_microbatch(meter, start, prepared))
            del prepared
            meter.restart()
            optimizers = [_step(optimizer) for optimizer in self._optimizers()]
            moments = [
                value
                for optimizer in optimizers
                for state in optimizer.state.values()
                for value in state.values()
                if isinstance(value, Tensor)
            ]
            return RankRun(
                parameters=held,
                trained=storage_bytes(p for p in parameters if p.requires_grad),
                buffers=buffers,
                gradients=_gradient_bytes(parameters),
                optimizer_state=storage_bytes(moments),
                optimizer_peak=meter.peak,
                optimizer_bytes=meter.other_bytes,
                rounds=rounds,
                tallies=tallies,
                batch=loaded,
                waiting=waiting + self._received_bytes(),
            )

    def _run_microbatch(self, meter: StepMeter, start: int, prepared: tuple[Any, ...]) -> Tally:
        """Run forward and backward; the batch counts as an activation, `start` bytes do not."""
        inputs, targets, extra, kwargs = prepared
        is_cut = self._dims.tp_enabled and not self._job.parallelism.disable_loss_parallel
        context, divisor = get_train_context(is_cut), torch.ones(())
        meter.restart()
        if self.pipeline is not None:
            with context():
                self.pipeline.step(inputs, kwargs, targets, divisor)
            return Tally.of(meter, meter.peak - start)
        dtype = self._job.training.mixed_precision_param
        with context():
            with maybe_enable_amp(self._dims, dtype, "cpu"):
                prediction = self._parts[0](inputs, **extra, **kwargs)
                loss = self._loss(prediction, targets) / divisor
            del prediction
            activations = meter.live - start
            loss.backward()
        return Tally.of(meter, activations)

    def _received_bytes(self) -> int:
        """Bytes of the buffers of a pipeline; its stages make them in its first step."""
        stages = [] if self.pipeline is None else self.pipeline.stages
        tables = [
            table for stage in stages for table in (stage.args_recv_info, stage.grad_recv_info)
        ]
        received = (info for table in tables for infos in table.values() for info in infos)
        return storage_bytes(info.buffer for info in received if info.buffer is not None)

    def _optimizers(self) -> Iterable[Optimizer]:
        build = self._spec.build_optimizers_fn
        return build(self._parts, self._job.optimizer, self._dims).optimizers


def _step(optimizer: Optimizer) -> Optimizer:
    """Step an optimizer's twin on plain tensors: the same, without DTensor's bookkeeping."""
    groups = []
    for group in optimizer.param_groups:
        twins = []
        for parameter in group["params"]:
            twin, grad = nn.Parameter(_local(parameter).detach()), parameter.grad
            if isinstance(grad, DTensor):  # zero-bubble pipelines leave it in another placement
                grad = grad.redistribute(placements=parameter.placements).to_local()
            twin.grad = grad
            twins.append(twin)
        groups.append({**group, "params": twins})
    twin_optimizer = cast(Any, type(optimizer))([group for group in groups if group["params"]])
    twin_optimizer.step()
    return twin_optimizer


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of this rank's parts of some tensors, each once."""
    storages = (_local(tensor).untyped_storage() for tensor in tensors)
    return sum({id(storage): storage.nbytes() for storage in list(storages)}.values())


def _bytes_in(tree: Any) -> int:
    return storage_bytes(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _gradient_bytes(parameters: Iterable[Tensor]) -> int:
    return storage_bytes(p.grad for p in parameters if p.grad is not None)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
