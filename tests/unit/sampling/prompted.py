"""A tiny model of prompted images that is no family, and checkpoints of it."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchtitan.protocols import train_spec
from torchtitan.protocols.model import BaseModelArgs

import torchtitan_mixtures.models
from tests.jobs import debug_job
from torchtitan_mixtures import checkpoint_config
from torchtitan_mixtures.checkpoint_loading import load_model
from torchtitan_mixtures.data.prompt_spec import PromptSpec
from torchtitan_mixtures.objectives.outputs import DenoiserOutput
from torchtitan_mixtures.objectives.patches import patchify

FAMILY = "tiny_prompted"
TEXT = PromptSpec("text", "tokens", 16, vocab_size=2048, null_token=0)
SPEECH = PromptSpec("speech", "tokens", 40, vocab_size=513, null_token=512)


@dataclass
class TinyArgs(BaseModelArgs):
    """What samplers read, and what a prompt's tokens are weighed with."""

    patch_size: int = 4
    in_channels: int = 3
    out_channels: int = 3
    image_size: int = 32
    prompts: tuple[PromptSpec, ...] = (TEXT,)

    is_prompted: ClassVar[bool] = True

    def __post_init__(self):
        # As read from JSON.
        self.prompts = tuple(
            spec if isinstance(spec, PromptSpec) else PromptSpec(**spec) for spec in self.prompts
        )

    def update_from_config(self, job_config, **kwargs):
        pass

    def get_nparams_and_flops(self, model, seq_len):
        return 0, 0


class TinyModel(nn.Module):
    """Predicts the latents, brighter or darker by what is kept of the prompts."""

    def __init__(self, model_args):
        super().__init__()
        self.model_args = model_args
        self.gain = nn.Parameter(torch.tensor(0.5))

    def init_weights(self, buffer_device=None):
        nn.init.constant_(self.gain, 0.5)

    def forward(self, latents, times, prompts, kept=None):
        args = self.model_args
        assert set(prompts) == {spec.name for spec in args.prompts}
        words = torch.zeros(len(latents))
        for column, spec in enumerate(args.prompts):
            ids = prompts[spec.name]
            assert ids.shape == (len(latents), spec.length) and ids.dtype == torch.int64
            told = (ids * torch.arange(1, spec.length + 1)).float().sum(1).sin()
            words = words + (column + 1) * (told if kept is None else told * kept[:, column])
        shape = (-1, 1, 1, 1)
        fade = 1 + times.reshape(shape) / 1000
        change = self.gain * latents * fade + words.reshape(shape).to(latents)
        return DenoiserOutput(patchify(change, args.patch_size))


def register(monkeypatch, args=None):
    """Make the family known until the test ends."""
    spec = replace(
        train_spec.get_train_spec("mom"),
        model_cls=TinyModel,
        model_args={"debugmodel": args or TinyArgs()},
    )
    known = (*torchtitan_mixtures.models.FAMILIES, FAMILY)
    for module in ("checkpoint_loading", "sampling.command"):
        monkeypatch.setattr(f"torchtitan_mixtures.{module}.FAMILIES", known)
    monkeypatch.setitem(train_spec._extra_train_specs, FAMILY, spec)


def job_of(*overrides):
    job = debug_job("mom", "--objective.kind=flow", "--objective.prompt_dropout=0.1", *overrides)
    job.model.name = FAMILY
    return job


def save(folder, args, *overrides):
    """A checkpoint of a registered model."""
    step = folder / "checkpoint" / "step-7"
    model = TinyModel(args)
    checkpoint_config.write(step, job_of(*overrides), args)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    dcp.save(state, checkpoint_id=step, no_dist=True)
    return folder


def load(folder, args, *overrides):
    return load_model(save(folder, args, *overrides))
