"""MixtureTrainer: TorchTitan's trainer, with this plugin's start-up checks and batches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger
from torchtitan.train import Trainer

from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.checks import check_job
from torchtitan_mixtures.objectives.next_token import Targets, split_batch


class MixtureTrainer(Trainer):
    """TorchTitan's trainer for the families of this plugin.

    It adds: checks of the whole configuration before anything is built; a batch's split into
    inputs and targets; the hand-over of the loss's meter to the metrics and of the batch handling
    to the validator; and a `config.json` in every checkpoint.
    """

    def __init__(self, job_config: JobConfig):
        check_job(job_config)
        super().__init__(job_config)
        self.metrics_processor.loss_meter = getattr(self.loss_fn, "meter", None)
        if job_config.validation.enable:
            self.validator.prepare_batch = self.post_dataloading_process

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Targets, dict[str, Tensor], dict[str, Any]]:
        """Split a batch into inputs, targets, and the keyword arguments of `forward`."""
        inputs, targets, extra_inputs = split_batch(input_dict, labels)
        extra_kwargs: dict[str, Any] = {}
        if getattr(self.model_args, "attn_type", "sdpa") in ("flex", "varlen"):
            extra_kwargs["attention_masks"] = self.model_parts[0].get_attention_masks(
                input_batch=inputs, tokenizer=self.tokenizer, extra_inputs=extra_inputs
            )
        return inputs, targets, extra_inputs, extra_kwargs

    def train_step(self, data_iterator: Iterator[tuple[dict[str, Tensor], Tensor]]) -> None:
        """Take one optimiser step; losses per modality are those of this step."""
        if self.metrics_processor.loss_meter is not None:
            self.metrics_processor.loss_meter.reset()
        super().train_step(data_iterator)
        last = self.step == self.job_config.training.steps
        if self.checkpointer.enable and self.checkpointer._should_save(self.step, last):
            self._write_config(self.step)

    def save_seed_checkpoint(self) -> None:
        """Save the initial weights of a single process as step 0 and stop."""
        if int(os.environ["WORLD_SIZE"]) != 1 or not self.checkpointer.enable:
            raise ValueError(
                "checkpoint.create_seed_checkpoint = true: needs one process (NGPU=1) and "
                "checkpoint.enable = true."
            )
        self._write_config(0)
        self.checkpointer.save(curr_step=0, last_step=True)
        logger.info("Created seed checkpoint")

    def _write_config(self, step: int) -> None:
        """Put `config.json` where TorchTitan is about to write the checkpoint of this step.

        Written first, so that a folder TorchTitan recognises as a complete checkpoint has it.
        """
        if torch.distributed.get_rank() == 0:
            folder = self.checkpointer._create_checkpoint_id(step)
            checkpoint_config.write(folder, self.job_config, self.model_args)
