"""MixtureTrainer: TorchTitan's trainer, with this plugin's start-up checks and batches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer

from torchtitan_mixtures import checkpoint_config, device
from torchtitan_mixtures.checks import check_job
from torchtitan_mixtures.data.loader import MultimodalDataLoader
from torchtitan_mixtures.ema import EMA, STATE
from torchtitan_mixtures.expert_folder import start_from
from torchtitan_mixtures.job_config import MixtureJobConfig
from torchtitan_mixtures.metrics import MixtureMetricsProcessor, diverged
from torchtitan_mixtures.objectives.classification import lengthen_to_same_flops
from torchtitan_mixtures.objectives.meter import LossMeter
from torchtitan_mixtures.pipeline import Pipeline
from torchtitan_mixtures.sampling.during_training import Sampler, build_sampler


class MixtureTrainer(Trainer):
    """TorchTitan's trainer for the families of this plugin.

    It adds: checks of the whole configuration before anything is built; a batch's split into
    inputs and targets; the hand-over of the loss's meter to the metrics; an average of the
    parameters; samples while it trains; and a `config.json` in every checkpoint.

    A family's loss says how batches are prepared for it (`prepare`, see `NextTokenLoss`), and may
    be told which step begins (`start_step`, see `ClassificationLoss`).
    """

    loss_meter: LossMeter | None
    sampler: Sampler | None
    ema: EMA | None

    def __init__(self, job_config: MixtureJobConfig):
        check_job(job_config)
        if job_config.nested.same_flops:
            lengthen_to_same_flops(job_config)
        super().__init__(job_config)
        self.has_stepped = False
        self.loss_meter = getattr(self.loss_fn, "meter", None)
        self.processor = cast(MixtureMetricsProcessor, self.metrics_processor)
        self.processor.loss_meter = self.loss_meter
        self.processor.further_scalars = getattr(self.loss_fn, "scalars", dict)
        self.processor.picture_folder = Path(job_config.job.dump_folder)
        if isinstance(self.dataloader, MultimodalDataLoader):
            self.processor.loader = self.dataloader
        self.processor.measure_updates()
        if job_config.diffusers.start and not checkpoint_config.has_own_checkpoint(job_config):
            start_from(self.model_parts[0], self.model_args, job_config.diffusers)
        self.ema = None
        if job_config.ema.decay > 0:
            self.ema = EMA(self.model_parts, job_config.ema.decay)
            self.checkpointer.states[STATE] = self.ema
            if job_config.validation.enable:
                cast(Any, self.validator).ema = self.ema
        self.sampler = build_sampler(job_config, self.model_args, self.processor)
        if self.checkpointer.enable:
            if torch.distributed.get_rank() == 0:
                checkpoint_config.remove_incomplete(self.checkpointer.folder)
            torch.distributed.barrier()  # other ranks look into the folder next

    def init_distributed(self) -> ParallelDims:
        """Set up the process groups and the layout.

        For CPU offload TorchTitan adds gloo beside the accelerator's backend; on a CPU gloo is
        that backend, and PyTorch refuses to have it twice.
        """
        training = self.job_config.training
        offload = training.enable_cpu_offload
        training.enable_cpu_offload = offload and device.has_accelerator()
        try:
            return super().init_distributed()
        finally:
            training.enable_cpu_offload = offload

    def post_dataloading_process(  # pyrefly: ignore [bad-override]  (targets may be any object)
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Any, dict[str, Tensor], dict[str, Any]]:
        """Let the loss prepare the batch."""
        return cast(Any, self.loss_fn).prepare(
            self.model_parts[0],
            self.tokenizer,
            input_dict,
            labels,
            self.parallel_dims,
            cast(MixtureJobConfig, self.job_config),
        )

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        """Run one microbatch forward and backward; see `Pipeline` for what differs from the host.

        Returns:
            This rank's share of the loss, in nats per supervised position; a scalar, zero on
            pipeline ranks without the last stage.
        """
        # A step in which nothing is to be predicted has no loss and no gradient, instead of 0 / 0.
        count = cast(Any, global_valid_tokens)  # the host sums it to a number over several ranks
        count = cast(Any, count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))
        if not self.parallel_dims.pp_enabled:
            return super().forward_backward_step(
                input_dict=input_dict, labels=labels, global_valid_tokens=count
            )
        inputs, targets, _, kwargs = self.post_dataloading_process(input_dict, labels)
        with self.train_context():
            pipeline = cast(Pipeline, self.pp_schedule)
            return pipeline.step(inputs, kwargs, targets, count)

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        """Take one optimiser step; losses per modality are those of this step."""
        if not self.has_stepped:  # what start-up and loading took says nothing about steps
            self.processor.restart_clock(self.step - 1)
            self.has_stepped = True
            if self.ema is not None:
                self.ema.start()
        if hasattr(self.loss_fn, "start_step"):
            cast(Any, self.loss_fn).start_step(self.step)
        elif self.loss_meter is not None:
            # A loss with more meters than one resets them all.
            getattr(self.loss_fn, "reset", self.loss_meter.reset)()
        self.processor.start_step(self.step)
        super().train_step(data_iterator)
        if self.ema is not None:
            self.ema.update()
        last = self.step == self.job_config.training.steps
        if self.checkpointer.enable and self.checkpointer._should_save(self.step, last):
            self._require_finite_weights()
            weights_only = last and self.job_config.checkpoint.last_save_model_only
            self._write_config(self.step, weights_only)
        if self.sampler is not None and self.sampler.is_due(self.step):
            averaged = nullcontext() if self.ema is None else self.ema.swapped()
            with averaged, self.maybe_enable_amp:
                self.sampler.sample(self.model_parts[0], self.step)

    def _require_finite_weights(self) -> None:
        """Raise ValueError instead of letting a checkpoint push out one that is sound."""
        parameters = [p for part in self.model_parts for p in part.parameters()]
        own = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
        flags = torch.stack([p.detach().isfinite().all().to(self.device) for p in own])
        worst = flags.all().float()
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MIN)
        if not worst:
            raise diverged(self.step, "weights are not finite")

    def state_dict(self) -> dict[str, Any]:
        """Step and tokens seen; the latter by all ranks, for a resume with another number of them.

        TorchTitan saves those of one rank, which it multiplies by the ranks when it reports them.
        """
        return {**super().state_dict(), "ntokens_seen": self.ntokens_seen * self._data_ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; see `state_dict`."""
        super().load_state_dict(state_dict)
        self.ntokens_seen //= self._data_ranks

    @property
    def _data_ranks(self) -> int:
        return self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard

    def should_continue_training(self) -> bool:
        """Say whether a step is left; log if there was none to begin with."""
        steps = self.job_config.training.steps
        if self.step >= steps and not self.has_stepped:
            logger.warning(
                f"Nothing to train: {self.job_config.job.dump_folder} holds a run that is complete "
                f"at step {self.step}, and training.steps = {steps}. Raise training.steps to go "
                "on, or set another job.dump_folder to start anew."
            )
        return super().should_continue_training()

    def save_seed_checkpoint(self) -> None:
        """Save the initial weights of a single process as step 0 and stop."""
        if int(os.environ["WORLD_SIZE"]) != 1 or not self.checkpointer.enable:
            raise ValueError(
                "checkpoint.create_seed_checkpoint = true: needs one process (NGPU=1) and "
                "checkpoint.enable = true."
            )
        self._write_config(0, self.job_config.checkpoint.last_save_model_only)
        self.checkpointer.save(curr_step=0, last_step=True)
        logger.info("Created seed checkpoint")

    def _write_config(self, step: int, weights_only: bool) -> None:
        """Put `config.json` where TorchTitan is about to write the checkpoint of this step.

        Written first, so that a folder TorchTitan recognises as a complete checkpoint has it.
        """
        if torch.distributed.get_rank() == 0:
            folder = self.checkpointer._create_checkpoint_id(step)
            checkpoint_config.write(
                folder,
                self.job_config,
                self.model_args,
                self._data_ranks,
                weights_only=weights_only,
            )
