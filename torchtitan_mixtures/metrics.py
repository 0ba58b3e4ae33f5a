"""What a run reports: losses per bucket, gradient norms and updates per tower, throughput.

Extends TorchTitan's MetricsProcessor, which already writes to TensorBoard and Weights & Biases.
Everything here happens only in steps that are logged, so the other steps never wait for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.components.metrics import BaseLogger, LoggerContainer, MetricsProcessor
from torchtitan.components.optimizer import OptimizersInBackwardContainer
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import BaseModelArgs
from torchtitan.tools.logging import logger

from torchtitan_mixtures.data.loader import MultimodalDataLoader
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.loss_report import (
    bucket_scalars,
    describe_losses,
    describe_shares,
    source_scalars,
)
from torchtitan_mixtures.media import Media, write_media, write_pictures
from torchtitan_mixtures.objectives.classification_meter import ACCURACY
from torchtitan_mixtures.objectives.meter import LossMeter
from torchtitan_mixtures.optimizer import TowerOptimizers
from torchtitan_mixtures.telemetry import IdleTowers, UpdateMeter
from torchtitan_mixtures.towers import SHARED, tower_namer


class MixtureMetricsProcessor(MetricsProcessor):
    """TorchTitan's metrics, plus those of each modality and tower.

    Attributes:
        loss_meter: The loss's meter; the trainer sets it. None: no losses per bucket.
        further_scalars: What else the loss reports, of its last step; the trainer sets it.
        loader: A loader that counts what its sources have given; the trainer sets it.
        picture_folder: Below it images are files too; the trainer sets it.
    """

    loss_meter: LossMeter | None = None
    further_scalars: Callable[[], dict[str, float]] = staticmethod(dict)
    loader: MultimodalDataLoader | None = None
    picture_folder: Path | None = None

    def __init__(
        self,
        job_config: JobConfig,
        parallel_dims: ParallelDims,
        tower_of: Callable[[str], str],
        tower_names: Sequence[str] = (),
    ):
        """Build the processor.

        Args:
            job_config: The job's configuration.
            parallel_dims: The job's parallel layout.
            tower_of: Maps a parameter's name to its tower's name, or to `shared`.
            tower_names: All that it may return.
        """
        super().__init__(job_config, parallel_dims)
        self._tower_of = tower_of
        self._tower_names = tuple(tower_names)
        self._step_of_interval = 0
        self._updates: UpdateMeter | None = None
        self._rates: dict[str, float] = {}
        self._idle = IdleTowers()

    def measure_updates(self) -> None:
        """Measure how far steps that are logged move the towers; once there are optimizers."""
        assert self.optimizers is not None and self.model_parts is not None
        if isinstance(self.optimizers, OptimizersInBackwardContainer):
            return  # several steps, each of a part of the batch, make one of them
        self._updates = UpdateMeter(
            self.optimizers,
            self.model_parts,
            self._tower_of,
            [*self._tower_names, SHARED],
            self.parallel_dims,
        )

    def start_step(self, step: int) -> None:
        """Prepare for what can only be seen during a step, if it is to be logged.

        Args:
            step: The training step that is about to be taken.
        """
        if not self.should_log(step):
            return
        if self._updates is not None:
            self._updates.start()
        if isinstance(self.optimizers, TowerOptimizers):
            self._rates = self.optimizers.learning_rates()

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log one training step; every rank must call this, as sums are reduced here.

        Args:
            step: The training step.
            global_avg_loss: Loss over all ranks, in nats per supervised position; of a pipeline, of
                those with the last stage, and zero on the others.
            global_max_loss: The largest loss of a rank; replaced by the largest of a data-parallel
                rank, without loss weights.
            grad_norm: Norm of all gradients before clipping.
            extra_metrics: Further scalars to write.
        """
        extra_metrics = dict(extra_metrics or {})
        dims = self.parallel_dims
        if dims.pp_enabled:
            global_avg_loss = self._sum([global_avg_loss], "pp")[0]
        if self.loss_meter is not None:  # TorchTitan's depends on how a rank's batch is cut
            global_max_loss = self._largest_loss(self.loss_meter)
        if dims.cp_enabled and "n_tokens_seen" in extra_metrics:
            # TorchTitan counts every sequence once for each rank that holds a part of it.
            extra_metrics["n_tokens_seen"] /= dims.cp
        scalars: dict[str, Any] = {
            "loss_metrics/global_avg_loss": global_avg_loss,
            "loss_metrics/global_max_loss": global_max_loss,
            "grad_norm": grad_norm,
        }
        scalars |= self._speed(step)
        losses = self._bucket_losses()
        norms = self._tower_norms(grad_norm)
        scalars |= self._describe_buckets(losses)
        scalars |= {f"grad_norm/{tower}": norm for tower, norm in norms.items()}
        scalars |= self._tower_scalars()
        scalars |= self._data_scalars()
        scalars |= extra_metrics
        self.logger.log(scalars, step)
        self._print(step, scalars, losses, norms)
        self._warn_of_idle_towers(norms)
        self.restart_clock(step)
        if not math.isfinite(global_avg_loss + grad_norm):
            raise diverged(step, f"loss = {global_avg_loss}, grad_norm = {grad_norm}")

    def _speed(self, step: int) -> dict[str, Any]:
        """Throughput and memory since the clock was started."""
        now = time.perf_counter()
        seconds = now - self.time_last_log
        steps = max(1, step - self._step_of_interval)
        tokens_per_second = self.ntokens_since_last_log / (
            seconds * self.parallel_dims.non_data_parallel_size
        )
        flops = self.num_flops_per_token * tokens_per_second
        loading = sum(self.data_loading_times)
        memory = self.device_memory_monitor.get_peak_stats()
        scalars: dict[str, Any] = {
            "throughput(tps)": tokens_per_second,
            "tflops": flops / 1e12,
            "time_metrics/end_to_end(s)": seconds / steps,
            "time_metrics/data_loading(s)": loading / max(1, len(self.data_loading_times)),
            "time_metrics/data_loading(%)": 100 * loading / seconds,
            "memory/max_reserved(GiB)": memory.max_reserved_gib,
            "memory/max_reserved(%)": memory.max_reserved_pct,
            "memory/num_alloc_retries": memory.num_alloc_retries,
            "memory/num_ooms": memory.num_ooms,
        }
        if not math.isnan(self.gpu_peak_flops):
            scalars["mfu(%)"] = 100 * flops / self.gpu_peak_flops
        return scalars

    def log_validation(
        self,
        loss: float,
        step: int,
        extra_metrics: dict[str, Any] | None = None,
        *,
        split: str = "",
        losses: dict[str, tuple[float, int]] | None = None,
        shares: dict[str, float] | None = None,
        group: str = "modality",
        in_bits: bool = True,
    ) -> None:
        """Log one validation pass.

        Args:
            loss: Loss over the split, per supervised position.
            step: The training step.
            extra_metrics: Further scalars to write.
            split: Name of the split.
            losses: Loss and number of targets of each bucket: modality, or noise level.
            shares: Shares of right answers, by name.
            group: What buckets are.
            in_bits: Whether the loss is in nats per token.
        """
        losses, shares = losses or {}, shares or {}
        prefix = f"validation/{split}" if split else "validation"
        scalars = {f"{prefix}/loss": loss} | bucket_scalars(prefix, losses, in_bits)
        scalars |= {f"{prefix}/{name}": share for name, share in shares.items()}
        self.logger.log(scalars | (extra_metrics or {}), step)
        c, buckets = self.color, describe_losses(losses, group, in_bits)
        logger.info(
            f"{c.yellow}validate step: {step:2}  {c.white}{split}  {c.green}loss: {loss:8.5f}  "
            f"{c.turquoise}{buckets}{describe_shares(shares)}{c.reset}"
        )

    @property
    def loggers(self) -> list[BaseLogger]:
        """What this rank writes to; empty on ranks that write nothing."""
        return self.logger._loggers if isinstance(self.logger, LoggerContainer) else []

    def log_media(self, media: Media, step: int) -> None:
        """Write images, texts and sounds wherever scalars are written, and images as PNG files.

        Args:
            media: What to write.
            step: The training step.
        """
        for target in self.loggers:
            write_media(target, media, step)
        if self.loggers and self.picture_folder is not None and dist.get_rank() == 0:
            write_pictures(self.picture_folder, media, step)

    def restart_clock(self, step: int) -> None:
        """Measure throughput from here on; what came before (validation, say) does not count.

        Args:
            step: The last step that is left out.
        """
        self._step_of_interval = step
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.time_last_log = time.perf_counter()
        self.device_memory_monitor.reset_peak_stats()

    def _sum(self, numbers: list[float], dims: str) -> list[float]:
        """Sum numbers over the ranks of a mesh."""
        mesh = self.parallel_dims.get_mesh(dims)
        total = torch.tensor(numbers, dtype=torch.float64, device=mesh.device_type)
        dist.all_reduce(total, group=mesh.get_group())
        return total.tolist()

    def _largest_loss(self, meter: LossMeter) -> float:
        """Largest unweighted loss of a data-parallel rank, whose ranks each have a part of it."""
        dims = self.parallel_dims
        totals = meter.totals(torch.device(dims.world_mesh.device_type)).sum(1)  # nll, count
        for name in ("cp", "pp"):
            mesh = dims.get_optional_mesh(name)
            if mesh is not None:
                dist.all_reduce(totals, group=mesh.get_group())
        loss = totals[0] / totals[1].clamp(min=1)
        mesh = dims.get_optional_mesh("batch") if dims.dp_enabled else None
        if mesh is not None:
            dist.all_reduce(loss, op=dist.ReduceOp.MAX, group=mesh.get_group())
        return float(loss)

    def _bucket_losses(self) -> dict[str, tuple[float, int]]:
        """Reduce the loss meter over all data: loss per target and targets, per bucket."""
        if self.loss_meter is None:
            return {}
        return reduce_meter(self.loss_meter, self.parallel_dims)

    def _describe_buckets(self, losses: dict[str, tuple[float, int]]) -> dict[str, float]:
        """Name the scalars of the loss: of its buckets, and what else it reports."""
        if self.loss_meter is None:
            return {}
        in_bits = self.loss_meter.in_bits
        return bucket_scalars(self.loss_meter.group, losses, in_bits) | self.further_scalars()

    @torch.no_grad()
    def _tower_norms(self, grad_norm: float) -> dict[str, float]:
        """Gradient norm of each tower before clipping, and of all shared parameters.

        The gradients were clipped since; as clipping scales all alike, the ratio of the total
        norm before to the total norm now undoes it.
        """
        groups: dict[str, list[Tensor]] = {}
        for part in self.model_parts or []:
            for name, parameter in part.named_parameters():
                if parameter.grad is not None:
                    groups.setdefault(self._tower_of(name), []).append(parameter.grad)
        squares = {tower: _squared_norm(grads) for tower, grads in groups.items()}
        if self.parallel_dims.pp_enabled:  # not every stage has parameters of every group
            names = [*self._tower_names, SHARED]
            here = [float(name in squares) for name in names]
            sums = self._sum([*(squares.get(name, 0.0) for name in names), *here], "pp")
            stages = sums[len(names) :]
            squares = {name: sums[i] for i, name in enumerate(names) if stages[i]}
        total = math.sqrt(sum(squares.values()))
        scale = grad_norm / total if total > 0 and math.isfinite(grad_norm) else 1.0
        return {tower: math.sqrt(square) * scale for tower, square in sorted(squares.items())}

    def _tower_scalars(self) -> dict[str, float]:
        """Update-to-weight ratios, and the learning rates that are a tower's own."""
        ratios = self._updates.finish() if self._updates is not None else {}
        scalars = {f"update_ratio/{tower}": ratio for tower, ratio in ratios.items()}
        return scalars | {f"lr/{tower}": rate for tower, rate in self._rates.items()}

    def _data_scalars(self) -> dict[str, float]:
        """What the sources of the data have given so far, over all ranks."""
        if self.loader is None:
            return {}
        counts = self.loader.counts()
        numbers = [number for of_source in counts for number in of_source.values()]
        if self.parallel_dims.dp_enabled:
            numbers = self._sum(numbers, "batch")
        left = iter(numbers)
        *of_sources, packed = [{key: next(left) for key in of_source} for of_source in counts]
        return source_scalars(self.loader.source_names, of_sources, packed)

    def _warn_of_idle_towers(self, norms: dict[str, float]) -> None:
        job_config = cast(MixtureJobConfig, self.job_config)
        for tower in self._idle.update(norms):
            decay = job_config.optimizer.weight_decay
            decay = job_config.mixture.tower_weight_decay.get(tower, decay)
            shrinks = f"; weight decay ({decay:g}) goes on shrinking its weights" if decay else ""
            logger.warning(
                f"The tower {tower!r} got no gradient in {self._idle.PATIENCE} logged steps "
                f'running{shrinks}. Freeze it, mixture.frozen_towers = ["{tower}"], or train on '
                "data with its modality."
            )

    def _print(
        self,
        step: int,
        scalars: dict[str, Any],
        losses: dict[str, tuple[float, int]],
        norms: dict[str, float],
    ) -> None:
        c = self.color
        meter = self.loss_meter or LossMeter([])
        accuracy = {"accuracy": scalars[ACCURACY]} if ACCURACY in scalars else {}
        per_tower = " ".join(f"{tower} {norm:.3f}" for tower, norm in norms.items())
        per_tower = f" ({per_tower})" if list(norms) != [SHARED] else ""
        utilisation = f"  {c.magenta}mfu: {scalars['mfu(%)']:.2f}%" if "mfu(%)" in scalars else ""
        logger.info(
            f"{c.red}step: {step:2}  {c.green}loss: {scalars['loss_metrics/global_avg_loss']:8.5f}"
            f"  {c.turquoise}{describe_losses(losses, meter.group, meter.in_bits)}"
            f"{describe_shares(accuracy)}  "
            f"{c.orange}grad_norm: {scalars['grad_norm']:.4f}{per_tower}  "
            f"{c.yellow}memory: {scalars['memory/max_reserved(GiB)']:.2f}GiB  "
            f"{c.blue}tps: {round(scalars['throughput(tps)']):,}  "
            f"{c.cyan}tflops: {scalars['tflops']:,.2f}{utilisation}{c.reset}"
        )


def diverged(step: int, what: str) -> ValueError:
    """Make the error of a run whose numbers are none any more.

    Args:
        step: The training step.
        what: What is not finite.
    """
    return ValueError(
        f"step {step}: {what}: training has diverged, and nothing of it was saved. Checkpoints "
        "before are as they were; start again from one with a smaller optimizer.lr, more "
        "lr_scheduler.warmup_steps or a smaller training.max_norm, or look for broken data."
    )


def _squared_norm(tensors: list[Tensor]) -> float:
    norm = torch.nn.utils.get_total_norm(tensors, foreach=True)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return float(norm.double() ** 2)


def reduce_meter(meter: LossMeter, parallel_dims: ParallelDims) -> dict[str, tuple[float, int]]:
    """Sum a meter over all ranks that hold different data.

    Returns:
        For each bucket with targets: loss per target, and the number of targets.
    """
    totals = meter.totals(torch.device(parallel_dims.world_mesh.device_type)).clone()
    sums, counts = sum_over_ranks(totals, parallel_dims).tolist()
    rows = zip(meter.names, sums, counts, strict=True)
    return {name: (nll / count, round(count)) for name, nll, count in rows if count}


def sum_over_ranks(totals: Tensor, parallel_dims: ParallelDims) -> Tensor:
    """Sum, in place, over all ranks that hold different data."""
    meshes = ["loss"] if parallel_dims.dp_cp_enabled else []
    meshes += ["pp"] if parallel_dims.pp_enabled else []  # only last stages have something to add
    for name in meshes:
        dist.all_reduce(totals, group=parallel_dims.get_mesh(name).get_group())
    return totals


def build_metrics_processor(
    job_config: JobConfig, parallel_dims: ParallelDims, model_args: BaseModelArgs
) -> MixtureMetricsProcessor:
    """Build the processor for a TrainSpec; `model_args` says which tower a parameter is of."""
    tower_names = getattr(model_args, "tower_names", ())
    return MixtureMetricsProcessor(job_config, parallel_dims, tower_namer(model_args), tower_names)
